"""Statistics of scores, quality tags and loss weights, where an index has these columns."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from sdxl_finetune.data.index import Index
from sdxl_finetune.data.scores import find_scores, read_all_beside
from sdxl_finetune.report.rows import Rows
from sdxl_finetune.report.sizes import Histogram, histogram

BARS = 50
NO_TAG = "no quality tag"


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of images, the quality tags that follow from them, and loss weights."""

    scores: Histogram | None
    """None if no image has a score."""
    known: int
    """Images with a score."""
    mean: float
    bounds: Sequence[float]
    """Scores at which one quality tag ends and the next one begins."""
    quality: Sequence[tuple[str, int]]
    """Each quality tag and the number of its images, in the order of the config. Empty without quality tags."""
    weights: Sequence[tuple[float, int]]
    """Each loss weight and the number of its images. Empty if all images weigh the same."""


def measure_scores(rows: Rows, cache_dir: Path) -> Scores | None:
    """Returns the statistics of an index, or None if its images have no scores, quality tags and loss weights."""
    scores = all_scores(rows, cache_dir)
    known: Float64[np.ndarray, " k"] = scores[np.isfinite(scores)]
    found = None
    if len(known):
        found = histogram(known, np.linspace(known.min(), max(known.max(), known.min() + 1e-6), BARS + 1))
    weights: list[tuple[float, int]] = []
    if rows.has("loss_weight"):
        values, counts = np.unique(rows.index.numbers("loss_weight"), return_counts=True)
        weights = list(zip(values.tolist(), counts.tolist(), strict=True)) if len(values) > 1 else []
    quality = count_quality(rows.index) if rows.has("quality") else []
    if not (found or weights or quality):
        return None
    mean = float(known.mean()) if len(known) else float("nan")
    tags = [tag for subset in rows.index.subsets for tag in subset.quality_tags or ()]
    bounds = sorted({tag.bound for tag in tags if tag.bound is not None})
    return Scores(scores=found, known=len(known), mean=mean, bounds=bounds, quality=quality, weights=weights)


def all_scores(rows: Rows, cache_dir: Path) -> Float64[np.ndarray, " n"]:
    """The score of each image, from its listing or from `quality_scores`; NaN for an image without one."""
    scores, subsets = rows.index.numbers("score"), rows.index.subsets
    if any(subset.quality_tags for subset in subsets):
        beside = read_all_beside(rows.table, subsets, cache_dir, skip_check=True)
        joined = find_scores(rows.table, subsets, beside)[0].values
        scores = np.where(np.isfinite(joined), joined, scores)
    return scores.astype(np.float64)


def count_quality(index: Index) -> list[tuple[str, int]]:
    """Number of images of each quality tag; empty if no subset has quality tags. Subsets may have tags of their own."""
    names = [[tag.tag for tag in subset.quality_tags or ()] for subset in index.subsets]
    most = max(map(len, names))
    if not most:
        return []
    # Place -1 of an image without a quality tag is column 0.
    places = index.subset.astype(np.int64) * (most + 1) + index.numbers("quality") + 1
    counts = np.bincount(places, minlength=len(names) * (most + 1)).reshape(len(names), most + 1).tolist()
    total: Counter[str] = Counter()
    for own, (_, *images) in zip(names, counts, strict=True):
        total.update(dict(zip(own, images, strict=False)))
    return [*total.items(), (NO_TAG, sum(row[0] for row in counts))]
