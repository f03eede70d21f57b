"""Options that end a run, or save its training state, by the clock."""

from pydantic import Field

from sdxl_finetune.config.fields import Options


class LimitOptions(Options):
    """Limits of time"""

    max_train_hours: float | None = Field(None, gt=0)
    """Hours after its start at which a run has saved its state and ended. Default: no limit. Not in sd-scripts."""
    save_state_every_minutes: float | None = Field(None, gt=0)
    """Minutes between training states. Each replaces the one before. Default: never. Not in sd-scripts."""
