"""Options for storage that fails: a full disk, a quota, a network mount that is gone."""

from pydantic import Field

from sdxl_finetune.config.fields import FilePath, Options


class StorageOptions(Options):
    """Failing storage"""

    save_retry_minutes: float | None = Field(None, ge=0, allow_inf_nan=True)
    """Minutes in which the end of a run tries refused saves again; inf: without end. Default: 30. Not in sd-scripts."""
    save_fallback_dir: FilePath | None = None
    """Folder, best on another disk, for saves that `output_dir` refuses. Not in sd-scripts."""
