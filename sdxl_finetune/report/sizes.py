"""Statistics of image sizes and aspect-ratio buckets, over whole columns.

Sizes are in pixels. An image is resized by its scale factor, and what then lies outside its bucket is cut off.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from sdxl_finetune.data.index import Index

GRID = 48
"""Cells of the map of sizes along one side."""
BINS = 40
"""Bars of a histogram."""
MOST_ENLARGED = 1.5
"""Scale factor from which an enlarged image looks blurred."""
MUCH_CUT = 0.2
"""Share of an image's pixels from which a crop is likely to lose something."""


@dataclass(frozen=True)
class Histogram:
    """Counts of values between `edges`. The first and the last bar also count what lies beyond them."""

    edges: Float64[np.ndarray, " bars_and_one"]
    counts: Int64[np.ndarray, " bars"]


@dataclass(frozen=True)
class SizeMap:
    """Number of images by width and height, both on a logarithmic scale."""

    width_edges: Float64[np.ndarray, " columns_and_one"]
    height_edges: Float64[np.ndarray, " rows_and_one"]
    counts: Int64[np.ndarray, "rows columns"]


@dataclass(frozen=True, kw_only=True)
class BucketRow:
    """The images of one bucket."""

    width: int
    height: int
    images: int
    occurrences: int
    """Uses of the images in an epoch: each image counts with its repeats."""
    cut: float
    """Mean share of the pixels that the crop removes."""
    scale: float
    """Mean scale factor of the images; above 1 they are enlarged."""
    enlarged: int
    """Number of enlarged images."""
    batch_size: int

    @property
    def label(self) -> str:
        return f"{self.width}×{self.height}"


@dataclass(frozen=True, kw_only=True)
class SubsetRow:
    """The images of one subset."""

    folder: str
    images: int
    occurrences: int
    held_out: int


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The statistics of sizes and buckets of an index."""

    map: SizeMap
    ratios: Histogram
    """Width / height."""
    megapixels: Histogram
    cut: Float64[np.ndarray, " n"]
    """Share of the pixels of each image that the crop removes."""
    scale: Float64[np.ndarray, " n"]
    """Scale factor of each image."""
    cuts: Histogram
    scales: Histogram
    buckets: Sequence[BucketRow]
    """Buckets with images, the fullest first."""
    subsets: Sequence[SubsetRow]
    repeats: Sequence[tuple[int, int]]
    """Each number of repeats and the images that have it."""


def measure_sizes(index: Index) -> Sizes:
    """Returns the statistics of the sizes and buckets of all images of an index."""
    width, height, resized_width, resized_height = (
        index.numbers(name).astype(np.float64) for name in ("width", "height", "resized_width", "resized_height")
    )
    sides = np.array([(bucket.width, bucket.height) for bucket in index.buckets], np.float64)
    bucket_area = sides.prod(axis=1)[index.bucket]
    cut = 1 - bucket_area / (resized_width * resized_height)
    scale = np.sqrt(resized_width * resized_height / (width * height))
    values, images = np.unique(index.repeats, return_counts=True)
    return Sizes(
        map=map_sizes(width, height),
        ratios=log_histogram(width / height, least=1 / 4, most=4.0),
        megapixels=log_histogram(width * height / 1e6, least=0.01, most=100.0),
        cut=cut,
        scale=scale,
        cuts=histogram(cut, np.linspace(0, max(0.1, np.ceil(cut.max() * 20) / 20), 26)),
        scales=log_histogram(scale, least=1 / 8, most=8.0),
        buckets=_buckets(index, cut, scale),
        subsets=_subsets(index),
        repeats=list(zip(values.tolist(), images.tolist(), strict=True)),
    )


def map_sizes(width: Float64[np.ndarray, " n"], height: Float64[np.ndarray, " n"]) -> SizeMap:
    """Counts images by width and height. Both axes have cells of equal ratio, so that an aspect ratio is a diagonal."""
    edges = [_log_edges(side.min(), side.max() + 1, GRID) for side in (width, height)]
    counts, _, _ = np.histogram2d(height, width, bins=[edges[1], edges[0]])
    return SizeMap(edges[0], edges[1], counts.astype(np.int64))


def histogram(values: Float64[np.ndarray, " n"], edges: Float64[np.ndarray, " k"]) -> Histogram:
    """Counts values between edges. Values beyond the edges count in the first or the last bar."""
    within = values.clip(edges[0], edges[-1])
    return Histogram(edges, np.histogram(within, edges)[0].astype(np.int64))


def log_histogram(values: Float64[np.ndarray, " n"], *, least: float, most: float) -> Histogram:
    """Counts positive values in bars of equal ratio, from the smallest to the largest value within the limits."""
    low, high = values.min().clip(least, most), values.max().clip(least, most)
    return histogram(values, _log_edges(low / 1.01, high * 1.01, BINS))


def _log_edges(low: float, high: float, count: int) -> Float64[np.ndarray, " count_and_one"]:
    return np.geomspace(low, high, count + 1)


def _buckets(index: Index, cut: np.ndarray, scale: np.ndarray) -> list[BucketRow]:
    count, bucket = len(index.buckets), index.bucket
    images = np.bincount(bucket, minlength=count)
    occurrences, cuts, scales, enlarged = (
        np.bincount(bucket, values, count) for values in (index.repeats, cut, scale, scale > 1)
    )
    rows = [
        BucketRow(
            width=one.width,
            height=one.height,
            images=int(images[number]),
            occurrences=int(occurrences[number]),
            cut=float(cuts[number] / images[number]),
            scale=float(scales[number] / images[number]),
            enlarged=int(enlarged[number]),
            batch_size=index.datasets[one.dataset].batch_size,
        )
        for number, one in enumerate(index.buckets)
        if images[number]
    ]
    return sorted(rows, key=lambda row: (-row.images, row.width, row.height))


def _subsets(index: Index) -> list[SubsetRow]:
    count = len(index.subsets)
    images = np.bincount(index.subset, minlength=count)
    occurrences, held_out = (np.bincount(index.subset, values, count) for values in (index.repeats, index.held_out))
    rows = [
        SubsetRow(
            folder=str(one.image_dir),
            images=int(images[number]),
            occurrences=int(occurrences[number]),
            held_out=int(held_out[number]),
        )
        for number, one in enumerate(index.subsets)
    ]
    return sorted(rows, key=lambda row: -row.occurrences)
