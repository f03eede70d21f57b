"""Aspect ratio buckets: which size an image is trained at, how it is resized and what is cut off.

Sizes are (width, height) in pixels, one row an image, so that five million images are placed in a second.
The choice of bucket and of the resized size is the reference's (tests/golden/buckets.json). The crop that the
model is told of is the one that was made, in pixels of the resized image, as Podell et al. 2023 (SDXL,
arXiv 2307.01952, section 2.2) define it; the reference tells it the offset of a letterbox instead.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64

from sdxl_finetune.config.dataset import Dataset


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where images go; a bucket of (0, 0) means that the image is too narrow for any."""

    bucket: Int64[np.ndarray, "n 2"]
    resized: Int64[np.ndarray, "n 2"]
    """The size before the crop; not smaller than the bucket."""

    @property
    def fits(self) -> Bool[np.ndarray, " n"]:
        return self.bucket.min(axis=1) > 0


def place_images(sizes: Int64[np.ndarray, "n 2"], dataset: Dataset) -> Placement:
    """The bucket and the resized size of each image, by the dataset's bucket options."""
    if not dataset.enable_bucket:
        return nearest_buckets(sizes, np.array([dataset.resolution], np.int64))
    steps = dataset.bucket_reso_steps
    if dataset.bucket_no_upscale:
        return natural_buckets(sizes, dataset.resolution[0] * dataset.resolution[1], steps)
    smallest = dataset.min_bucket_reso // steps * steps
    largest = -(-dataset.max_bucket_reso // steps) * steps
    return nearest_buckets(sizes, make_buckets(dataset.resolution, smallest, largest, steps))


def make_buckets(
    resolution: tuple[int, int], smallest: int, largest: int, steps: int
) -> Int64[np.ndarray, "buckets 2"]:
    """All sizes whose sides are multiples of `steps` between `smallest` and `largest` and whose area comes next
    under that of `resolution`, for each width and each height; sorted. `smallest` is a multiple of `steps`.
    """
    area = resolution[0] * resolution[1]
    square = int(math.sqrt(area)) // steps * steps
    sizes = {(square, square)}
    for width in range(max(smallest, steps), largest + 1, steps):
        height = min(largest, area // width // steps * steps)
        if height >= max(smallest, steps):
            sizes |= {(width, height), (height, width)}
    return np.array(sorted(sizes), np.int64)


def nearest_buckets(sizes: Int64[np.ndarray, "n 2"], buckets: Int64[np.ndarray, "buckets 2"]) -> Placement:
    """The bucket of the image's own size, else the one whose width / height differs least (the first of equals);
    the image is resized, up or down, so that it just covers it.
    """
    ratio = sizes[:, 0] / sizes[:, 1]
    ratios = buckets[:, 0] / buckets[:, 1]
    sorted_ratios, first = np.unique(ratios, return_index=True)
    above = np.searchsorted(sorted_ratios, ratio).clip(max=len(first) - 1)
    below = (above - 1).clip(min=0)
    over, under = np.abs(sorted_ratios[above] - ratio), np.abs(sorted_ratios[below] - ratio)
    chosen = np.where((under < over) | ((under == over) & (first[below] < first[above])), first[below], first[above])
    keys, bucket_keys = _keys(sizes), _keys(buckets)
    found = np.searchsorted(bucket_keys, keys).clip(max=len(buckets) - 1)
    chosen = np.where(bucket_keys[found] == keys, found, chosen)
    bucket = buckets[chosen]
    scales = bucket / sizes
    scale = np.where(ratio > ratios[chosen], scales[:, 1], scales[:, 0])
    return Placement(bucket=bucket, resized=_rounded(sizes * scale[:, None]))


def natural_buckets(sizes: Int64[np.ndarray, "n 2"], area: int, steps: int) -> Placement:
    """bucket_no_upscale: an image of at most `area` pixels keeps its size, a larger one is shrunk to that area
    with one side a multiple of `steps`; its bucket is what remains when both sides are cut to such multiples.
    """
    ratio = sizes[:, 0] / sizes[:, 1]
    ideal_width = np.sqrt(area * ratio)
    ideal_height = area / ideal_width
    by_width = _floor(_rounded(ideal_width), steps)
    by_height = _floor(_rounded(ideal_height), steps)
    with np.errstate(divide="ignore", invalid="ignore"):
        # Of the two ways to round, the one that keeps the proportions better once both sides are multiples.
        width_error = np.abs(by_width / _floor(_rounded(by_width / ratio), steps) - ratio)
        height_error = np.abs(_floor(_rounded(by_height * ratio), steps) / by_height - ratio)
    shrunk = np.where(
        (width_error < height_error)[:, None],
        np.stack([by_width, _rounded(by_width / ratio)], axis=1),
        np.stack([_rounded(by_height * ratio), by_height], axis=1),
    )
    resized = np.where((sizes.prod(axis=1) > area)[:, None], shrunk, sizes)
    bucket = _floor(resized, steps)
    return Placement(bucket=np.where(bucket.min(axis=1, keepdims=True) > 0, bucket, 0), resized=resized)


def crop_left_top(resized: tuple[int, int], bucket: tuple[int, int], rng: random.Random | None) -> tuple[int, int]:
    """How many pixels of the resized image are cut off at its left and top: the middle, or anywhere with `rng`."""
    left, top = (
        0 if spare == 0 else spare // 2 if rng is None else rng.randint(0, spare)
        for spare in (resized[0] - bucket[0], resized[1] - bucket[1])
    )
    return left, top


def mirrored_left(left: int, resized_width: int, bucket_width: int) -> int:
    """What is cut off at the left of the same crop once the image is flipped: what was cut off at its right."""
    return resized_width - bucket_width - left


def _keys(sizes: Int64[np.ndarray, "n 2"]) -> Int64[np.ndarray, " n"]:
    return (sizes[:, 0] << 32) + sizes[:, 1]


def _rounded(values: np.ndarray) -> np.ndarray:
    return (values + 0.5).astype(np.int64)


def _floor(values: np.ndarray, steps: int) -> np.ndarray:
    return values - values % steps
