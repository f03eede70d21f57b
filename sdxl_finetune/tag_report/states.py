"""The state of each tag, decided by stated bounds.

    skill = (accuracy - chance) / (1 - chance)      0: the tag is not known, 1: the right tag always wins

A tag is learned if its skill and its gain reach their bounds. Another tag is underfitted if training has seen it more
seldom than the median learned tag. If training has seen it as often, more of the same would not help: the tag is
contradictory if a figure surely misses its bound, and else unclear. A tag is also unclear if its error is large.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sdxl_finetune.config.tag_options import TagReportOptions

SURE = 1.0
"""Standard errors by which a figure must miss its bound before a tag is called contradictory."""
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
    learned = [_is_clear(tag) and _reaches(tag, skill, gain) for tag in tags]
    seen = [tag.exposures for tag, is_learned in zip(tags, learned, strict=True) if is_learned]
    known = [exposures for exposures in seen if exposures is not None]
    often = options.tag_report_contradictory_exposures * statistics.median(known) if known else math.inf
    states = []
    for tag, is_learned in zip(tags, learned, strict=True):
        if is_learned:
            states.append("learned")
        elif not _is_clear(tag):
            states.append("unclear")
        elif tag.exposures is None or tag.exposures < often:
            states.append("underfitted")
        else:
            states.append("unclear" if _reaches(tag, skill, gain, SURE) else "contradictory")
    return states


def _is_clear(tag: Figures) -> bool:
    return tag.gain_error is not None and tag.accuracy_error is not None and tag.accuracy_error < LARGE


def _reaches(tag: Figures, skill: float, gain: float, errors: float = 0.0) -> bool:
    """True if both figures, raised by so many standard errors, reach their bounds. The gain must be above 0."""
    accuracy = tag.accuracy + errors * (tag.accuracy_error or 0.0)
    raised = tag.gain + errors * (tag.gain_error or 0.0)
    return accuracy >= tag.chance + skill * (1 - tag.chance) and raised >= gain and raised > 0
