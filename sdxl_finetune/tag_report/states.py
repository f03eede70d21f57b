"""The state of each tag, decided by stated bounds.

    skill = (accuracy - chance) / (1 - chance)      0: the tag is not known, 1: the right tag always wins

A tag is learned if its skill and its gain reach their bounds. The bound of the gain is a share of what the best tenth
of the tags reach. Another tag is contradictory if training has seen it as often as the median tag, and yet its accuracy
is surely below the median of the rarer tags. More of the same would not help such a tag. The remaining tags are
underfitted.

A tag with a large error is unclear. So is a tag that would be contradictory, but whose gain reaches the bound: the
model uses it, and a tag that looks alike takes its accuracy.
"""

import math
import statistics
from bisect import insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import numpy as np

from sdxl_finetune.config.tag_options import TagReportOptions

BEST = 0.9
"""Quantile of all gains that stands for a well-learned tag. A single tag of another kind may have a larger gain."""
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
    """The state of each tag of a report. Gains, exposures and accuracies are compared with those of the other tags."""
    if not tags:
        return []
    best = float(np.quantile([tag.gain for tag in tags], BEST))
    known = [tag.exposures for tag in tags if tag.exposures is not None]
    limits = _Limits(
        skill=options.tag_report_learned_skill,
        gain=max(options.tag_report_learned_gain * best, 0.0),
        often=options.tag_report_contradictory_exposures * statistics.median(known) if known else math.inf,
    )
    return [_state(tag, limits, rarer) for tag, rarer in zip(tags, _accuracies_of_rarer(tags), strict=True)]


@dataclass(frozen=True)
class _Limits:
    skill: float
    gain: float
    often: float
    """Exposures from which a tag may be contradictory."""


def _state(tag: Figures, limits: _Limits, rarer: float | None) -> str:
    if not _is_clear(tag):
        return "unclear"
    has_gain = tag.gain >= limits.gain and tag.gain > 0
    if has_gain and tag.accuracy >= tag.chance + limits.skill * (1 - tag.chance):
        return "learned"
    if rarer is None or tag.exposures is None or tag.exposures < limits.often:
        return "underfitted"
    if tag.accuracy + SURE * (tag.accuracy_error or 0.0) >= rarer:
        return "underfitted"
    return "unclear" if has_gain else "contradictory"


def _accuracies_of_rarer(tags: Sequence[Figures]) -> list[float | None]:
    """The median accuracy of all tags with fewer exposures, for each tag; None if there is no such tag."""
    medians: list[float | None] = [None] * len(tags)
    known = sorted((tag.exposures, place) for place, tag in enumerate(tags) if tag.exposures is not None)
    accuracies: list[float] = []
    for _, group in groupby(known, key=itemgetter(0)):
        alike = [place for _, place in group]
        for place in alike:
            medians[place] = _middle(accuracies) if accuracies else None
        for place in alike:
            insort(accuracies, tags[place].accuracy)
    return medians


def _middle(ordered: Sequence[float]) -> float:
    """The median of numbers in order."""
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _is_clear(tag: Figures) -> bool:
    return tag.gain_error is not None and tag.accuracy_error is not None and tag.accuracy_error < LARGE
