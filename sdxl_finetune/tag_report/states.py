"""The state of each tag, decided by stated bounds.

    skill = (accuracy - chance) / (1 - chance)      0: the tag is not known, 1: the right tag always wins

A tag is learned if its skill and its gain reach their bounds. Another tag is contradictory if training has seen it as
often as the median tag, and yet its accuracy is surely below the median of the rarer tags. More of the same would not
help such a tag. The remaining tags are underfitted. A tag with a large error is unclear.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sdxl_finetune.config.tag_options import TagReportOptions

SURE = 1.0
"""Standard errors by which the accuracy of a contradictory tag is below that of rarer tags."""
LARGE = 0.15
"""Error of the accuracy from which nothing is decided. Three images have about 0.2, eight about 0.1."""


@dataclass(frozen=True)
class Figures:
    """The figures of a tag that decide its state."""

    images: int
    exposures: int | None
    gain: float
    gain_error: float | None
    accuracy: float
    accuracy_error: float | None
    chance: float

    @classmethod
    def of_row(cls, row: Mapping[str, object]) -> "Figures":
        """The figures in a row of the tags table."""
        return cls(**{name: row[name] for name in cls.__dataclass_fields__})  # type: ignore[arg-type]


def bounds(options: TagReportOptions) -> dict[str, float]:
    """The bounds that a report states."""
    return {
        "learned_skill": options.tag_report_learned_skill,
        "learned_gain": options.tag_report_learned_gain,
        "contradictory_exposures": options.tag_report_contradictory_exposures,
    }


def find_states(tags: Sequence[Figures], options: TagReportOptions) -> list[str]:
    """The state of each tag of a report. The gain of a tag is compared with the median gain of all tags."""
    if not tags:
        return []
    least_gain = options.tag_report_learned_gain * statistics.median(tag.gain for tag in tags)
    skill, gain = options.tag_report_learned_skill, max(least_gain, 0.0)
    known = [tag.exposures for tag in tags if tag.exposures is not None]
    often = options.tag_report_contradictory_exposures * statistics.median(known) if known else math.inf
    return [_state(tag, tags, skill, gain, often) for tag in tags]


def _state(tag: Figures, tags: Sequence[Figures], skill: float, gain: float, often: float) -> str:
    if not _is_clear(tag):
        return "unclear"
    if tag.accuracy >= tag.chance + skill * (1 - tag.chance) and tag.gain >= gain and tag.gain > 0:
        return "learned"
    if tag.exposures is None or tag.exposures < often:
        return "underfitted"
    rarer = [other.accuracy for other in tags if other.exposures is not None and other.exposures < tag.exposures]
    surely_below = bool(rarer) and tag.accuracy + SURE * (tag.accuracy_error or 0.0) < statistics.median(rarer)
    return "contradictory" if surely_below else "underfitted"


def _is_clear(tag: Figures) -> bool:
    return tag.gain_error is not None and tag.accuracy_error is not None and tag.accuracy_error < LARGE
