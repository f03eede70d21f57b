"""The state of each tag, decided by stated bounds.

    skill = (accuracy - chance) / (1 - chance)      0: the tag is not known, 1: the right tag always wins

A tag is learned if its skill and its gain reach their bounds. A tag that does not is contradictory if training has seen
it as often as the median learned tag: more of the same would not help. Otherwise it is underfitted. If a figure lies so
near its bound that chance decides, the tag is unclear.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sdxl_finetune.config.tag_options import TagReportOptions

SURE = 1.0
"""Standard errors by which a figure must miss its bound before the tag is called not learned."""
FEW = 3
"""Images of a tag below which nothing is decided."""


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
    found = [_is_learned(tag, options.tag_report_learned_skill, max(least_gain, 0.0)) for tag in tags]
    seen = [
        tag.exposures for tag, learned in zip(tags, found, strict=True) if learned is True and tag.exposures is not None
    ]
    often = options.tag_report_contradictory_exposures * statistics.median(seen) if seen else None
    states = []
    for tag, learned in zip(tags, found, strict=True):
        if learned is None:
            states.append("unclear")
        elif learned:
            states.append("learned")
        elif often is not None and tag.exposures is not None and tag.exposures >= often:
            states.append("contradictory")
        else:
            states.append("underfitted")
    return states


def _is_learned(tag: Figures, least_skill: float, least_gain: float) -> bool | None:
    """True if both figures reach their bounds, False if one of them surely does not, None if that is not clear."""
    if tag.images < FEW or tag.gain_error is None or tag.accuracy_error is None:
        return None
    least_accuracy = tag.chance + least_skill * (1 - tag.chance)
    if tag.chance < 1 and tag.accuracy < least_accuracy:
        return False if tag.accuracy + SURE * tag.accuracy_error < least_accuracy else None
    if tag.gain < least_gain or tag.gain <= 0:
        return False if tag.gain + SURE * tag.gain_error < least_gain or tag.gain <= 0 else None
    return True
