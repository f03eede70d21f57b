"""Options of tag reports, which measure which tags a model has learned."""

from typing import Annotated, Any

from pydantic import Field

from sdxl_finetune.config.fields import FilePath, OnlyWith, Options, Shown, parsed

REPORTS = OnlyWith("tag_report_every_n_epochs")


def _timesteps(value: object) -> object:
    """Returns different timesteps in order, of a number, a list, or text of numbers."""
    listed = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    numbers: list[Any] = [int(one) if isinstance(one, str) else one for one in listed]
    if not numbers or not all(type(number) is int and 0 <= number < 1000 for number in numbers):
        raise ValueError
    return tuple(sorted(set(numbers)))


Timesteps = Annotated[tuple[int, ...], parsed(_timesteps), Shown('timesteps from 0 to 999, as "400,600,800"')]


class TagReportOptions(Options):
    """Tag reports"""

    tag_report_every_n_epochs: int | None = Field(None, ge=1)
    """Measure before the first step and every N epochs which tags are learned. Not in sd-scripts."""
    tag_report_tags: Annotated[str | None, REPORTS] = None
    """Tags to measure, with patterns, as "style_*" or "cat, dog". Not in sd-scripts."""
    tag_report_tags_file: Annotated[FilePath | None, REPORTS] = None
    """File of tags to measure, one tag or pattern on a line. Not in sd-scripts."""
    tag_report_min_images: Annotated[int | None, REPORTS] = Field(None, ge=1)
    """Measure all tags that at least N images have. Not in sd-scripts."""
    tag_report_images: Annotated[int, REPORTS] = Field(16, ge=1)
    """Images that each tag is measured on at most; held-out images come first. Not in sd-scripts."""
    tag_report_others: Annotated[int | None, REPORTS] = Field(None, ge=0)
    """Other tags that compete with the right one. Default: 3, or fewer for a short list. Not in sd-scripts."""
    tag_report_timesteps: Annotated[Timesteps, REPORTS] = (900, 950, 975, 999)
    """Timesteps at which each image is measured. Not in sd-scripts."""
    tag_report_budget: Annotated[int | None, REPORTS] = Field(None, ge=1)
    """Forward passes of a report at most. Fewer images for each tag keep it. Default: no limit. Not in sd-scripts."""
    tag_report_learned_skill: Annotated[float, REPORTS] = Field(0.75, ge=0, le=1)
    """Accuracy of a learned tag at least, from 0 at chance to 1. Not in sd-scripts."""
    tag_report_learned_gain: Annotated[float, REPORTS] = Field(0.5, ge=0)
    """Gain of a learned tag at least, as a share of what the best tenth of the tags reach. Not in sd-scripts."""
    tag_report_contradictory_exposures: Annotated[float, REPORTS] = Field(1.0, gt=0)
    """Exposures, as a share of the median tag's, from which a tag may be contradictory. Not in sd-scripts."""
