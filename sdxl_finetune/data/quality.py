"""Quality tags: turns a score for each image into a place in the list of quality tags.

The first tag whose condition holds is the image's. A condition is a bound on the score or a share of the images:

    tag > b        score > b
    tag top p%     fewer than p % of the images of the group have a higher score

Equal scores therefore always get the same tag. Scores and bounds are compared as float32 numbers. All functions work on
whole columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from jaxtyping import Bool, Float32, Int, Int16

from sdxl_finetune.config.quality_options import QualityTag

NO_TAG = -1
"""Place of an image without a quality tag."""


@dataclass(frozen=True)
class Groups:
    """The groups of images within which shares are counted."""

    names: Sequence[str]
    number: Int[np.ndarray, " n"]
    """Number of each image's group."""


def assign_tags(
    scores: Float32[np.ndarray, " n"], tags: Sequence[QualityTag], groups: Groups | None = None
) -> Int16[np.ndarray, " n"]:
    """The place of each image's tag in `tags`; NO_TAG if no condition holds or the score is not finite.

    Shares are those of the images with a finite score, within each group.
    """
    scored = np.isfinite(scores)
    number = np.zeros(len(scores), np.int64) if groups is None else groups.number
    count = 1 if groups is None else len(groups.names)
    places = np.full(len(scores), NO_TAG, np.int16)
    lowest = share_bounds(scores, tags, number, count)
    for place in reversed(range(len(tags))):  # an earlier tag overwrites a later one
        tag = tags[place]
        if tag.share is not None:
            holds = scores >= lowest[place][number]
        elif tag.bound is None:
            holds = scored
        else:
            bound = np.float32(tag.bound)
            holds = scores >= bound if tag.includes_bound else scores > bound
        places[holds & scored] = place
    return places


def share_bounds(
    scores: Float32[np.ndarray, " n"], tags: Sequence[QualityTag], number: Int[np.ndarray, " n"], groups: int
) -> dict[int, Float32[np.ndarray, " groups"]]:
    """The lowest score of each tag with a share, in each group, by the tag's place; NaN for a group without scores.

    A share of p % of n images is ceil(n p / 100) images, and more if the last of them has others of the same score.
    """
    shares = {place: Fraction(repr(tag.share)) for place, tag in enumerate(tags) if tag.share is not None}
    if not shares:
        return {}
    rows = np.flatnonzero(np.isfinite(scores))
    rows = rows[np.lexsort((-scores[rows], number[rows]))]  # by group, the highest score first
    sizes = np.bincount(number[rows], minlength=groups)
    starts = np.cumsum(sizes) - sizes
    bounds = {}
    for place, share in shares.items():
        last = np.array([-(-size * share // 100) for size in sizes.tolist()], np.int64)
        bound = np.full(groups, np.nan, np.float32)
        bound[sizes > 0] = scores[rows[(starts + last - 1)[sizes > 0]]]
        bounds[place] = bound
    return bounds


def count_tags(places: Int16[np.ndarray, " n"], tags: Sequence[QualityTag]) -> dict[str, int]:
    """Number of images of each tag, in the order of the tags."""
    counts = np.bincount(places[places >= 0], minlength=len(tags)).tolist()
    return {tag.tag: count for tag, count in zip(tags, counts, strict=True)}


def with_missing(
    places: Int16[np.ndarray, " n"], scored: Bool[np.ndarray, " n"], rule: str, tags: Sequence[QualityTag]
) -> Int16[np.ndarray, " n"]:
    """The places with the tag that the rule `quality_missing` names for images without a score, if it names one."""
    names = [tag.tag for tag in tags]
    return np.where(scored, places, names.index(rule)).astype(np.int16) if rule in names else places
