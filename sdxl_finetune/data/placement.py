"""Places the images of a scan: their buckets, repeats, and which of them are held out, in columns.

`place` adds these columns to the scan's table, and drops images that fit no bucket.
"""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int, Int64

from sdxl_finetune.config.dataset import Dataset
from sdxl_finetune.data.buckets import fill_buckets, place_images
from sdxl_finetune.data.hold_out import find_held_out
from sdxl_finetune.data.scan import digest_of
from sdxl_finetune.data.tables import one_chunk
from sdxl_finetune.errors import SHOWN, Problem, Tally, UserError

logger = logging.getLogger(__name__)

BUCKET_STEP = 8
"""Pixels of one latent along one side. The sides of every bucket are multiples of it."""
PLACED = ("repeats", "held_out", "resized_width", "resized_height", "bucket")
"""Columns that the index adds to those of the scan."""
MARKED = ("quality", "loss_weight")
"""Columns that the index has if options ask for quality tags or weights."""
MOST_IN_AN_EPOCH = 1_000_000_000
"""Images in an epoch, with repeats. The order of so many takes some 12 GB of memory."""
MAX_RESIZED_PIXELS = 1 << 27
"""Largest size of an image before the crop: 400 MB. Only a very narrow image becomes larger."""


def place(
    table: pa.Table, datasets: Sequence[Dataset], problems: Tally, cache_dir: Path, marks: pa.Table | None = None
) -> pa.Table:
    """Adds the columns of PLACED to the table, and drops images that fit no bucket.

    `marks` has a row for each image, as in marks.py. Its factors multiply the repeats, and MARKED is added as well.
    """
    subsets = [subset for dataset in datasets for subset in dataset.subsets]
    subset = one_chunk(table["subset"]).to_numpy()
    sizes = np.stack([one_chunk(table[side]).to_numpy() for side in ("width", "height")], axis=1).astype(np.int64)
    owner = np.repeat(np.arange(len(datasets)), [len(dataset.subsets) for dataset in datasets])[subset]
    named = _named_buckets(table, datasets, owner)
    repeats = np.array([subset.num_repeats for subset in subsets], np.int64)[subset]
    regularization = np.array([subset.is_reg for subset in subsets])[subset]
    bucket, resized = np.zeros_like(sizes), np.zeros_like(sizes)
    held_out = find_held_out(table, subsets, cache_dir)
    if marks is not None:
        factors = one_chunk(marks["repeats"]).to_numpy()
        repeats = np.minimum(np.rint(repeats * factors), MOST_IN_AN_EPOCH + 1).astype(np.int64)
        held_out &= factors > 0
    repeats[held_out] = 0
    kept = np.ones(len(sizes), bool)
    for number, dataset in enumerate(datasets):
        rows = np.flatnonzero(owner == number)
        placement = place_images(sizes[rows], dataset) if dataset.resolution else fill_buckets(sizes[rows], named[rows])
        bucket[rows], resized[rows] = placement.bucket, placement.resized
        kept[rows] = (bucket[rows].min(axis=1) > 0) & (resized[rows].prod(axis=1) <= MAX_RESIZED_PIXELS)
        rows = rows[kept[rows] & ~held_out[rows]]
        repeats[rows] = regularized_repeats(repeats[rows], regularization[rows])
    for is_kind in (bucket.min(axis=1) == 0, bucket.min(axis=1) > 0):
        rows = np.flatnonzero(~kept & is_kind)
        for number, row in enumerate(rows[: SHOWN + 1].tolist()):
            path = subsets[subset[row]].image_dir / os.fsdecode(table["name"][row].as_py())
            message = _misfit(*(tuple(array[row].tolist()) for array in (sizes, bucket, resized)))
            problems.add(Problem(message, file=str(path)), 1 if number < SHOWN else len(rows) - SHOWN)
    _check_size(repeats[kept])
    keys = (owner.astype(np.int64) << 48) + (bucket[:, 0] << 24) + bucket[:, 1]
    keys, numbers = np.unique(keys[kept], return_inverse=True)
    buckets = json.dumps([(key >> 48, key >> 24 & 0xFFFFFF, key & 0xFFFFFF) for key in keys.tolist()])
    if not kept.all():
        table = table.filter(pa.array(kept)).combine_chunks()
        table = table.replace_schema_metadata({"digest": digest_of(table)})
    arrays = [repeats[kept], held_out[kept], resized[kept, 0], resized[kept, 1], numbers]
    digest = table.schema.metadata[b"digest"]
    for name, array in zip(PLACED, arrays, strict=True):
        table = table.append_column(name, pa.array(array.astype(np.int32)))
    if marks is not None:
        for name in MARKED:
            table = table.append_column(name, pa.array(one_chunk(marks[name]).to_numpy()[kept]))
    return table.replace_schema_metadata({"digest": digest, "buckets": buckets})


def _check_size(repeats: Int64[np.ndarray, " n"]) -> None:
    """Raises UserError if an epoch is too long for the order of its images to fit into memory."""
    if (total := int(repeats.sum())) > MOST_IN_AN_EPOCH:
        message = f"an epoch would have {total:,} images with repeats, and {MOST_IN_AN_EPOCH:,} are possible"
        raise UserError(Problem(f"{message}: lower num_repeats, or the factors of image_weights"))


def regularized_repeats(
    repeats: Int64[np.ndarray, " n"], regularization: Bool[np.ndarray, " n"]
) -> Int64[np.ndarray, " n"]:
    """The reference's rule for the repeats of regularisation images.

    They are taken in order, each with its repeats, until they are as many as the training images. If all of them are
    too few, each gets one more repeat in turn.
    """
    wanted = int(repeats[~regularization].sum())
    own = repeats[regularization]
    taken = np.where(np.cumsum(own) - own < wanted, own, 0)
    missing = wanted - int(taken.sum())
    if missing > 0 and len(own):
        taken = taken + missing // len(own) + (np.arange(len(own)) < missing % len(own))
    result = repeats.copy()
    result[regularization] = taken
    return result


def _named_buckets(
    table: pa.Table, datasets: Sequence[Dataset], owner: Int[np.ndarray, " n"]
) -> Int64[np.ndarray, "n 2"]:
    """The size of each image's bucket in a metadata file, (0, 0) if it is not given.

    Raises UserError if a dataset without a resolution has images without such a size. `owner` is the dataset of each
    image. Warns if sizes are given and the resolution of the dataset takes their place.
    """
    sides = [one_chunk(table[side]).to_numpy() for side in ("train_width", "train_height")]
    named = np.stack(sides, axis=1).astype(np.int64)
    problems = []
    for number, dataset in enumerate(datasets):
        own = named[owner == number]
        if dataset.resolution is None:
            if missing := int(((own == 0) | (own % BUCKET_STEP != 0)).any(axis=1).sum()):
                message = f"{missing} of {len(own)} images have no train_resolution in multiples of {BUCKET_STEP}"
                problems.append(Problem(f"is needed, because {message} in the metadata file", key="resolution"))
        elif not dataset.enable_bucket and (sizes := len(np.unique(own[own[:, 0] > 0], axis=0))) > 1:
            logger.warning(
                "the metadata file has %d sizes as train_resolution, but all images are cut to %dx%d, as in the"
                " reference: set enable_bucket, or remove resolution to train at the sizes of the file",
                sizes,
                *dataset.resolution,
            )
    if problems:
        raise UserError(problems)
    return named


def _misfit(size: tuple[int, int], bucket: tuple[int, int], resized: tuple[int, int]) -> str:
    if not min(bucket):
        message = "its shorter side is below bucket_reso_steps, and bucket_no_upscale does not enlarge images"
        return f"{size[0]}x{size[1]}: {message}: remove the image or bucket_no_upscale, or lower bucket_reso_steps"
    return (
        f"{size[0]}x{size[1]} is too narrow: to fill a bucket of {bucket[0]}x{bucket[1]} it would have to be"
        f" enlarged to {resized[0]}x{resized[1]}, and the limit is {MAX_RESIZED_PIXELS} pixels"
    )
