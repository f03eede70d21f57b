"""Aspect-ratio buckets: the size at which an image is trained, its size before the crop, and the crop.

Sizes are (width, height) in pixels, in arrays with one row per image: five million images take a second. Bucket and
resized size are the reference's (tests/golden/buckets.json).

The model is given the offset of the real crop, in pixels of the resized image, as the paper defines it (Podell et al.,
SDXL, arXiv 2307.01952, section 2.2). The reference gives it the offset of a letterbox instead.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64

from sdxl_finetune.config.dataset import Dataset


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Bucket and resized size of each image. Images that are too narrow for every bucket have bucket (0, 0)."""

    bucket: Int64[np.ndarray, "n 2"]
    resized: Int64[np.ndarray, "n 2"]
    """Size before the crop, at least that of the bucket."""

    @property
    def fits(self) -> Bool[np.ndarray, " n"]:
        return self.bucket.min(axis=1) > 0


def place_images(sizes: Int64[np.ndarray, "n 2"], dataset: Dataset) -> Placement:
    """Places images in buckets by the bucket options of their dataset, which has a resolution.

    Each different size is placed once, because millions of images share thousands of sizes.
    """
    keys, rows = np.unique(_keys(sizes), return_inverse=True)
    placement = _place_sizes(np.stack([keys >> 32, keys & 0xFFFFFFFF], axis=1), dataset)
    return Placement(bucket=placement.bucket[rows], resized=placement.resized[rows])


def _place_sizes(sizes: Int64[np.ndarray, "n 2"], dataset: Dataset) -> Placement:
    assert dataset.resolution is not None
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
    """All bucket sizes, sorted: for each width the largest height whose area is at most that of `resolution`.

    The same sizes follow with width and height exchanged. Sides are multiples of `steps` from `smallest` to `largest`.
    `smallest` is a multiple of `steps`.
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
    """Places each image in the bucket of exactly its size, else in the one with the nearest width / height.

    Of two equally near buckets the first is taken.
    """
    ratio = sizes[:, 0] / sizes[:, 1]
    ratios = buckets[:, 0] / buckets[:, 1]
    sorted_ratios, first = np.unique(ratios, return_index=True)
    above = np.searchsorted(sorted_ratios, ratio).clip(max=len(first) - 1)
    below = (above - 1).clip(min=0)
    error_above, error_below = np.abs(sorted_ratios[above] - ratio), np.abs(sorted_ratios[below] - ratio)
    use_below = (error_below < error_above) | ((error_below == error_above) & (first[below] < first[above]))
    chosen = np.where(use_below, first[below], first[above])
    keys, bucket_keys = _keys(sizes), _keys(buckets)
    same_size = np.searchsorted(bucket_keys, keys).clip(max=len(buckets) - 1)
    chosen = np.where(bucket_keys[same_size] == keys, same_size, chosen)
    return fill_buckets(sizes, buckets[chosen])


def fill_buckets(sizes: Int64[np.ndarray, "n 2"], bucket: Int64[np.ndarray, "n 2"]) -> Placement:
    """Places each image in the bucket that is given for it. The image is resized, up or down, to just cover it."""
    scales = bucket / sizes
    is_wider = sizes[:, 0] / sizes[:, 1] > bucket[:, 0] / bucket[:, 1]
    scale = np.where(is_wider, scales[:, 1], scales[:, 0])
    return Placement(bucket=bucket, resized=_rounded(sizes * scale[:, None]))


def natural_buckets(sizes: Int64[np.ndarray, "n 2"], area: int, steps: int) -> Placement:
    """Places images for `bucket_no_upscale`, which never enlarges an image.

    An image of at most `area` pixels keeps its size. A larger image is shrunk to that area, with one side a multiple of
    `steps`. Both sides are then cut to multiples of `steps`, which gives the bucket.
    """
    ratio = sizes[:, 0] / sizes[:, 1]
    ideal_width = np.sqrt(area * ratio)
    ideal_height = area / ideal_width
    by_width = _floor(_rounded(ideal_width), steps)
    by_height = _floor(_rounded(ideal_height), steps)
    with np.errstate(divide="ignore", invalid="ignore"):
        # Width or height is rounded first: whichever keeps the proportions better when both sides are multiples.
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
    """Pixels of the resized image that are cut off at its left and top: for the middle, or at random with `rng`."""
    left, top = (
        0 if spare == 0 else spare // 2 if rng is None else rng.randint(0, spare)
        for spare in (resized[0] - bucket[0], resized[1] - bucket[1])
    )
    return left, top


def mirrored_left(left: int, resized_width: int, bucket_width: int) -> int:
    """Pixels that are cut off at the left of the mirrored image: those that were cut off at the right before."""
    return resized_width - bucket_width - left


def _keys(sizes: Int64[np.ndarray, "n 2"]) -> Int64[np.ndarray, " n"]:
    return (sizes[:, 0] << 32) + sizes[:, 1]


def _rounded(values: np.ndarray) -> np.ndarray:
    return (values + 0.5).astype(np.int64)


def _floor(values: np.ndarray, steps: int) -> np.ndarray:
    return values - values % steps
