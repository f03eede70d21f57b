"""The dataset index: one row for each image, in columns, memory-mapped from an Arrow file by every process.

Five million images are numbers in a few arrays and text in two more, never Python objects. The main process, the other
ranks and the data-loader workers share one copy through the page cache; a process receives the file's name alone. The
file's name is a hash of its content, so that runs can share a `cache_dir`. Rows are ordered by subset and file name,
whatever order the file system lists them in.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
from jaxtyping import Bool, Int, Int32, UInt8

from sdxl_finetune.config.dataset import Dataset, Subset
from sdxl_finetune.data.buckets import place_images
from sdxl_finetune.data.images import load_crop
from sdxl_finetune.data.scan import digest_of, scan
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.files import atomic_path

logger = logging.getLogger(__name__)

MAX_RESIZED_PIXELS = 1 << 27
"""Largest size of an image before the crop: 400 MB. Only a very narrow image becomes larger."""


@dataclass(frozen=True)
class Bucket:
    """An aspect-ratio bucket: the images of one dataset that are trained at one size in pixels."""

    dataset: int
    width: int
    height: int


@dataclass(frozen=True)
class Entry:
    """One image of the index. Sizes are (width, height) in pixels."""

    path: Path
    caption: str
    """The whole text of the caption file."""
    subset: Subset
    size: tuple[int, int]
    resized: tuple[int, int]
    bucket: Bucket
    interpolation: str | None

    def load(self, left_top: tuple[int, int], data: bytes | None = None) -> UInt8[np.ndarray, "H W 3"]:
        """The image's pixels in its bucket. Raises ImageError.

        `left_top` is the position of the crop in the resized image. `data` is the file's content, if it was read.
        """
        return load_crop(
            self.path,
            size=self.size,
            resized=self.resized,
            left_top=left_top,
            bucket=(self.bucket.width, self.bucket.height),
            interpolation=self.interpolation,
            data=data,
        )


@dataclass(frozen=True)
class Index:
    """The images of a run. A small value: copies of it in other processes map the same file."""

    path: Path
    datasets: tuple[Dataset, ...]
    """The datasets that `build_index` received."""
    excluded: tuple[int, ...] = ()
    """Rows of images that could not be read after the scan."""
    bad_files: int = 0
    """Number of files that the scan left out."""

    def __reduce__(self) -> tuple:
        return Index, (self.path, self.datasets, self.excluded, self.bad_files)

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, row: int) -> Entry:
        subset, bucket = self.subsets[self.subset[row]], self.buckets[self.bucket[row]]
        return Entry(
            path=subset.image_dir / os.fsdecode(self._table["name"][row].as_py()),
            caption=self._table["caption"][row].as_py(),
            subset=subset,
            size=(int(self.numbers("width")[row]), int(self.numbers("height")[row])),
            resized=(int(self.numbers("resized_width")[row]), int(self.numbers("resized_height")[row])),
            bucket=bucket,
            interpolation=subset.resize_interpolation,
        )

    @property
    def subset(self) -> Int32[np.ndarray, " n"]:
        """Number of each image's subset, counted over all datasets."""
        return self.numbers("subset")

    @property
    def bucket(self) -> Int32[np.ndarray, " n"]:
        """Position of each image's bucket in `buckets`."""
        return self.numbers("bucket")

    @cached_property
    def repeats(self) -> Int32[np.ndarray, " n"]:
        """Number of times that each image is used in an epoch."""
        return self._without_excluded(self.numbers("repeats"))

    @cached_property
    def held_out(self) -> Bool[np.ndarray, " n"]:
        """True for images that are for validation and not trained on."""
        return self._without_excluded(self.numbers("held_out") > 0)

    def _without_excluded(self, column: np.ndarray) -> np.ndarray:
        """The column with 0 or False for the excluded images."""
        if self.excluded:
            column = column.copy()
            column[list(self.excluded)] = 0
        return column

    @property
    def used(self) -> Bool[np.ndarray, " n"]:
        """True for images that are trained on or validated."""
        return (self.repeats > 0) | self.held_out

    @cached_property
    def flips(self) -> Bool[np.ndarray, " n"]:
        """True for images that are also used mirrored."""
        return np.array([subset.flip_aug for subset in self.subsets])[self.subset]

    @property
    def interpolations(self) -> tuple[list[str | None], Int[np.ndarray, " n"]]:
        """The values of resize_interpolation in use, and the position of each image's value among them."""
        own: list[str | None] = [subset.resize_interpolation for subset in self.subsets]
        ways = sorted(set(own), key=str)
        return ways, np.array([ways.index(way) for way in own])[self.subset]

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        return tuple(Bucket(*bucket) for bucket in json.loads(self._table.schema.metadata[b"buckets"]))

    def facts(self) -> dict[str, str | int]:
        """Numbers and digests that are equal if the same images come in the same order, wherever their files are.

        Training states save them, and a resumed run compares them.
        """
        table = self._table
        repeats = hashlib.blake2b(self.repeats.tobytes(), digest_size=4).hexdigest()
        return {
            "images": int((self.repeats > 0).sum()),
            "images with repeats": int(self.repeats.sum()),
            "names of images": digest_of(table, ["subset", "name"], 4),
            "captions": digest_of(table, ["caption"], 4),
            "sizes and buckets": digest_of(table, ["width", "height", "resized_width", "resized_height", "bucket"], 4),
            "files": digest_of(table, ["bytes"], 4),
            "repeats": repeats,
        }

    def without(self, rows: Iterable[int]) -> "Index":
        """A copy that no longer uses these rows. Row numbers stay. Raises UserError if no image is left."""
        index = replace(self, excluded=tuple(sorted({*self.excluded, *rows})))
        _check_some_left(index.repeats, index.held_out)
        return index

    def describe(self) -> str:
        """A description for the log: a line on all images, then a line for each bucket."""
        used = self.used
        enlarged = (self.numbers("resized_width") > self.numbers("width")) | (
            self.numbers("resized_height") > self.numbers("height")
        )
        images = np.bincount(self.bucket[used], minlength=len(self.buckets))
        occurrences = np.bincount(self.bucket, self.repeats, len(self.buckets)).astype(np.int64)
        lines = [
            f"{used.sum()} images, {occurrences.sum()} with repeats, in {len(self.buckets)} buckets;"
            f" {(enlarged & used).sum()} enlarged, {self.bad_files + len(self.excluded)} skipped"
            + (f", {self.held_out.sum()} held out for validation" if self.held_out.any() else "")
        ]
        lines += [
            f"bucket {bucket.width}x{bucket.height}: {image} images, {occurrence} with repeats"
            for bucket, image, occurrence in zip(self.buckets, images, occurrences, strict=True)
        ]
        return "\n".join(lines)

    @cached_property
    def _table(self) -> pa.Table:
        return pa.ipc.open_file(pa.memory_map(str(self.path))).read_all()

    def captions(self, start: int, end: int) -> list[str]:
        """The whole texts of the caption files of the rows from `start` to `end`."""
        texts: list[str] = self._table["caption"].slice(start, end - start).to_pylist()
        return texts

    @cached_property
    def subsets(self) -> tuple[Subset, ...]:
        """The subsets of all datasets."""
        return tuple(chain.from_iterable(dataset.subsets for dataset in self.datasets))

    @property
    def stat_hashes(self) -> UInt8[np.ndarray, "n 16"]:
        """The hash of each image file's path, size and modification time, as in `scan.hash_of_stat`."""
        column = self._table["stat_hash"].chunk(0)
        return np.frombuffer(column.buffers()[1], np.uint8).reshape(-1, 16)[column.offset : column.offset + len(column)]

    def numbers(self, name: str) -> Int[np.ndarray, " n"]:
        """A numeric column of the file. `bytes` and `mtime` (nanoseconds) are size and modification time of images."""
        return self._table[name].chunk(0).to_numpy()


def build_index(datasets: Sequence[Dataset], cache_dir: Path, on_bad_image: str, *, skip_check: bool = False) -> Index:
    """Scans all images and captions, places the images in buckets, and writes the index.

    With `skip_check` the results of the last scan are used unchecked. Raises UserError for a folder without images.
    Files that cannot be used raise one UserError with all their names if `on_bad_image` is "stop". If it is "skip", a
    warning names them, and they are left out. Only the first rank calls this; the other ranks receive the Index.
    """
    subsets = [subset for dataset in datasets for subset in dataset.subsets]
    found, problems = scan(subsets, cache_dir, skip_check=skip_check)
    table = _place(found, datasets, problems)
    report_bad_images(problems, on_bad_image)
    _check_some_left(table["repeats"].to_numpy(), table["held_out"].to_numpy())
    if uncaptioned := pa.compute.sum(pa.compute.equal(table["caption"], "")).as_py():
        logger.warning("%d of %d images have no caption file, or an empty one", uncaptioned, table.num_rows)
    table = table.combine_chunks()
    buckets = str(table.schema.metadata[b"buckets"])
    name = hashlib.blake2b(f"{buckets} {digest_of(table)}".encode(), digest_size=12).hexdigest()
    path = cache_dir / f"{name}.index"
    if not path.exists():
        with atomic_path(path) as temporary, pa.ipc.new_file(str(temporary), table.schema) as writer:
            writer.write_table(table)
    return Index(path, tuple(datasets), bad_files=len(problems))


def _check_some_left(repeats: np.ndarray, held_out: np.ndarray) -> None:
    if repeats.any():
        return
    if held_out.any():
        message = f"no image is left to train on, because {held_out.sum()} are held out: lower validation_split"
        raise UserError(Problem(message, key="validation_split"))
    raise UserError("no image is left to train on: see the warnings above, and add images or repeats")


def report_bad_images(problems: Sequence[Problem], on_bad_image: str) -> None:
    """Raises UserError with all problems if `on_bad_image` is "stop", or names them in one warning if it is "skip"."""
    if problems and on_bad_image == "stop":
        raise UserError(problems)
    if problems:
        lines = "\n".join(str(problem) for problem in problems)
        logger.warning("%d files are skipped (on_bad_image = skip):\n%s", len(problems), lines)


def regularized_repeats(
    repeats: Int32[np.ndarray, " n"], regularization: Bool[np.ndarray, " n"]
) -> Int32[np.ndarray, " n"]:
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


def hold_out(names: Sequence[bytes], share: float, seed: int) -> Int[np.ndarray, " k"]:
    """Chooses the images to hold out: this share of all, rounded, and at least one. Returns their positions.

    The choice depends only on each image's file and folder name and on the seed, so that it stays when other images are
    added or removed.
    """
    key = str(seed).encode()
    ends = (b"/".join(name.split(b"/")[-2:]) for name in names)
    digests = [hashlib.blake2b(end, digest_size=8, key=key).digest() for end in ends]
    first = np.argsort(np.array(digests, "S8"), kind="stable")
    return np.sort(first[: max(1, round(share * len(names)))])


def _place(table: pa.Table, datasets: Sequence[Dataset], problems: list[Problem]) -> pa.Table:
    """Adds bucket, resized size, repeats and held_out to the table, and drops images that fit no bucket."""
    subsets = [subset for dataset in datasets for subset in dataset.subsets]
    subset = table["subset"].to_numpy()
    sizes = np.stack([table["width"].to_numpy(), table["height"].to_numpy()], axis=1).astype(np.int64)
    owner = np.repeat(np.arange(len(datasets)), [len(dataset.subsets) for dataset in datasets])[subset]
    repeats = np.array([subset.num_repeats for subset in subsets], np.int32)[subset]
    regularization = np.array([subset.is_reg for subset in subsets])[subset]
    bucket, resized = np.zeros_like(sizes), np.zeros_like(sizes)
    kept, held_out = np.ones(len(sizes), bool), np.zeros(len(sizes), bool)
    folders = [os.fsencode(one.image_dir.name) for one in subsets]
    asked = [(one.validation_split, one.validation_seed) if not one.is_reg else (0.0, 0) for one in subsets]
    for share, seed in sorted(one for one in set(asked) if one[0]):
        rows = np.flatnonzero(np.array([one == (share, seed) for one in asked])[subset])
        if len(rows):
            found = zip(subset[rows].tolist(), table["name"].take(rows).to_pylist(), strict=True)
            held = rows[hold_out([folders[number] + b"/" + name for number, name in found], share, seed)]
            held_out[held], repeats[held] = True, 0
    for number, dataset in enumerate(datasets):
        rows = np.flatnonzero(owner == number)
        placement = place_images(sizes[rows], dataset)
        bucket[rows], resized[rows] = placement.bucket, placement.resized
        kept[rows] = (bucket[rows].min(axis=1) > 0) & (resized[rows].prod(axis=1) <= MAX_RESIZED_PIXELS)
        rows = rows[kept[rows] & ~held_out[rows]]
        repeats[rows] = regularized_repeats(repeats[rows], regularization[rows])
    for row in np.flatnonzero(~kept).tolist():
        path = subsets[subset[row]].image_dir / os.fsdecode(table["name"][row].as_py())
        message = _misfit(*(tuple(array[row].tolist()) for array in (sizes, bucket, resized)))
        problems.append(Problem(message, file=str(path)))
    names = ["repeats", "held_out", "resized_width", "resized_height", "bucket"]
    keys = (owner.astype(np.int64) << 48) + (bucket[:, 0] << 24) + bucket[:, 1]
    keys, numbers = np.unique(keys[kept], return_inverse=True)
    arrays = [repeats[kept], held_out[kept], resized[kept, 0], resized[kept, 1], numbers]
    table = table if kept.all() else table.filter(pa.array(kept))
    for name, array in zip(names, arrays, strict=True):
        table = table.append_column(name, pa.array(array.astype(np.int32)))
    buckets = [(key >> 48, key >> 24 & 0xFFFFFF, key & 0xFFFFFF) for key in keys.tolist()]
    return table.replace_schema_metadata({"buckets": json.dumps(buckets)})


def _misfit(size: tuple[int, int], bucket: tuple[int, int], resized: tuple[int, int]) -> str:
    if not min(bucket):
        return f"{size[0]}x{size[1]} has too short a side for bucket_no_upscale: no multiple of bucket_reso_steps"
    return (
        f"{size[0]}x{size[1]} is too narrow: to fill a bucket of {bucket[0]}x{bucket[1]} it would have to be"
        f" enlarged to {resized[0]}x{resized[1]}"
    )
