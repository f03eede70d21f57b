"""The dataset index: one row an image, in columns, memory-mapped from an Arrow file by every process.

Five million images are numbers in a few arrays and text in two more, never objects: the main process, the other
ranks and the workers share one copy through the page cache, and a process is given the file's name. The file's
own name is a hash of its content, so that runs can share a `cache_dir`; rows are ordered by subset and file name,
whatever order the file system lists them in.
"""

import hashlib
import json
import logging
import os
import signal
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
from jaxtyping import Bool, Int32, UInt8
from tqdm import tqdm

from sdxl_finetune.config.dataset import Dataset, Subset
from sdxl_finetune.data.buckets import place_images
from sdxl_finetune.data.captions import read_caption
from sdxl_finetune.data.images import ImageError, image_extensions, image_size, load_crop
from sdxl_finetune.files import atomic_path
from sdxl_finetune.problems import Problem, UserError

logger = logging.getLogger(__name__)

CHUNK = 512
"""Files that one task of the scan looks into."""
IN_PROCESS = 4096
"""Up to so many images (a second) are looked into without starting processes; threads would only wait for one
another, since reading a header is Python's work."""
FOUND = pa.schema(
    {
        "subset": pa.int32(),
        "name": pa.large_binary(),  # file names need not be text
        "caption": pa.large_string(),
        "width": pa.int32(),
        "height": pa.int32(),
    }
)
"""What the scan finds out about an image."""
MAX_RESIZED_PIXELS = 1 << 27
"""An image may become so large before the crop (400 MB); only a sliver of an image becomes larger."""


@dataclass(frozen=True)
class Bucket:
    """Images that can share a batch: those of one dataset at one size in pixels."""

    dataset: int
    width: int
    height: int


@dataclass(frozen=True)
class Entry:
    """One image of the index. Sizes are (width, height) in pixels."""

    path: Path
    caption: str
    """As it stands in the file."""
    subset: Subset
    size: tuple[int, int]
    resized: tuple[int, int]
    bucket: Bucket
    interpolation: str | None

    def load(self, left_top: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"]:
        """The pixels in the bucket, with so much cut off at the left and top of the resized image. Raises
        ImageError.
        """
        return load_crop(
            self.path,
            size=self.size,
            resized=self.resized,
            left_top=left_top,
            bucket=(self.bucket.width, self.bucket.height),
            interpolation=self.interpolation,
        )


@dataclass(frozen=True)
class Index:
    """The images of a run. A small value: copies in other processes map the same file."""

    path: Path
    datasets: tuple[Dataset, ...]
    """As they were given to `build_index`."""
    excluded: tuple[int, ...] = ()
    """Rows that turned out unreadable after the scan."""
    bad_files: int = 0
    """Files that the scan left out."""

    def __reduce__(self) -> tuple:
        return Index, (self.path, self.datasets, self.excluded, self.bad_files)

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, row: int) -> Entry:
        subset, bucket = self._subsets[self.subset[row]], self.buckets[self.bucket[row]]
        return Entry(
            path=subset.image_dir / os.fsdecode(self._table["name"][row].as_py()),
            caption=self._table["caption"][row].as_py(),
            subset=subset,
            size=(int(self._numbers("width")[row]), int(self._numbers("height")[row])),
            resized=(int(self._numbers("resized_width")[row]), int(self._numbers("resized_height")[row])),
            bucket=bucket,
            interpolation=self.datasets[bucket.dataset].resize_interpolation,
        )

    @property
    def subset(self) -> Int32[np.ndarray, " n"]:
        """Each image's subset, counted over all datasets."""
        return self._numbers("subset")

    @property
    def bucket(self) -> Int32[np.ndarray, " n"]:
        """Each image's place in `buckets`."""
        return self._numbers("bucket")

    @cached_property
    def repeats(self) -> Int32[np.ndarray, " n"]:
        """How often each image is used in an epoch."""
        repeats = self._numbers("repeats")
        if self.excluded:
            repeats = repeats.copy()
            repeats[list(self.excluded)] = 0
        return repeats

    @cached_property
    def flips(self) -> Bool[np.ndarray, " n"]:
        """Whether an image is used mirrored as well."""
        return np.array([subset.flip_aug for subset in self._subsets])[self.subset]

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        return tuple(Bucket(*bucket) for bucket in json.loads(self._table.schema.metadata[b"buckets"]))

    @property
    def fingerprint(self) -> str:
        """The same for the same images, sizes, captions and repeats, wherever they lie."""
        if not self.excluded:
            return self.path.stem
        return hashlib.blake2b(f"{self.path.stem} {self.excluded}".encode(), digest_size=12).hexdigest()

    def without(self, rows: Iterable[int]) -> "Index":
        """The index with these rows used no more; row numbers stay. Raises UserError if none is left."""
        index = replace(self, excluded=tuple(sorted({*self.excluded, *rows})))
        if not index.repeats.any():
            raise UserError("no image is left to train on")
        return index

    def describe(self) -> str:
        """What was found, for the log: the images, then a line for each bucket."""
        used = self.repeats > 0
        enlarged = (self._numbers("resized_width") > self._numbers("width")) | (
            self._numbers("resized_height") > self._numbers("height")
        )
        images = np.bincount(self.bucket[used], minlength=len(self.buckets))
        occurrences = np.bincount(self.bucket, self.repeats, len(self.buckets)).astype(np.int64)
        lines = [
            f"{used.sum()} images, {occurrences.sum()} with repeats, in {len(self.buckets)} buckets;"
            f" {(enlarged & used).sum()} enlarged, {self.bad_files + len(self.excluded)} skipped"
        ]
        lines += [
            f"bucket {bucket.width}x{bucket.height}: {image} images, {occurrence} with repeats"
            for bucket, image, occurrence in zip(self.buckets, images, occurrences, strict=True)
        ]
        return "\n".join(lines)

    @cached_property
    def _table(self) -> pa.Table:
        return pa.ipc.open_file(pa.memory_map(str(self.path))).read_all()

    @cached_property
    def _subsets(self) -> tuple[Subset, ...]:
        return tuple(chain.from_iterable(dataset.subsets for dataset in self.datasets))

    def _numbers(self, name: str) -> Int32[np.ndarray, " n"]:
        return self._table[name].chunk(0).to_numpy()


def build_index(datasets: Sequence[Dataset], cache_dir: Path, *, on_bad_image: str) -> Index:
    """Looks into every image (its header) and caption, places the images in buckets and writes the index.

    Raises UserError for a folder without images, and, if `on_bad_image` is "stop", naming every file that cannot
    be used; with "skip" they are named in one warning and left out. Other ranks take the Index from the first.
    """
    tasks = _list_images([subset for dataset in datasets for subset in dataset.subsets])
    problems: list[Problem] = []
    table = _place(_scan(tasks, problems), datasets, problems)
    report_bad_images(problems, on_bad_image)
    if not np.any(table["repeats"]):
        raise UserError("no image is left to train on")
    if uncaptioned := pa.compute.sum(pa.compute.equal(table["caption"], "")).as_py():
        logger.warning("%d of %d images have no caption, or an empty one", uncaptioned, table.num_rows)
    table = table.combine_chunks()
    path = cache_dir / f"{_digest(table)}.index"
    if not path.exists():
        with atomic_path(path) as temporary, pa.ipc.new_file(str(temporary), table.schema) as writer:
            writer.write_table(table)
    return Index(path, tuple(datasets), bad_files=len(problems))


def report_bad_images(problems: Sequence[Problem], on_bad_image: str) -> None:
    """Files that cannot be used: raises UserError with all of them ("stop"), or names them in a warning ("skip")."""
    if problems and on_bad_image == "stop":
        raise UserError(problems)
    if problems:
        lines = "\n".join(str(problem) for problem in problems)
        logger.warning("%d files are skipped (on_bad_image = skip):\n%s", len(problems), lines)


def regularized_repeats(
    repeats: Int32[np.ndarray, " n"], regularization: Bool[np.ndarray, " n"]
) -> Int32[np.ndarray, " n"]:
    """The reference's rule for regularisation images: taken in order, each with its repeats, until they are as
    many as the training images; if all of them do not suffice, each gets one more in turn until they do.
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


def _list_images(subsets: Sequence[Subset]) -> list[tuple[int, Subset, list[str]]]:
    """The files to look into: (subset number, subset, names in order), up to CHUNK at a time."""
    tasks: list[tuple[int, Subset, list[str]]] = []
    problems: list[Problem] = []
    for number, subset in enumerate(subsets):
        names = _image_names(subset.image_dir, problems)
        tasks += [(number, subset, names[start : start + CHUNK]) for start in range(0, len(names), CHUNK)]
    if problems:
        raise UserError(problems)
    return tasks


def _image_names(folder: Path, problems: list[Problem]) -> list[str]:
    endings = image_extensions()
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.name.lower().endswith(endings) and entry.is_file()]
    except OSError as error:
        problems.append(Problem(f"cannot be listed: {error.strerror}", file=str(folder)))
        return []
    if not names:
        problems.append(Problem(f"holds no images ({' '.join(endings)})", file=str(folder)))
    return sorted(names)


def _scan(tasks: list[tuple[int, Subset, list[str]]], problems: list[Problem]) -> pa.Table:
    """The readable images, as FOUND, in the order of the tasks; what is wrong with others goes to `problems`."""
    total = sum(len(names) for _, _, names in tasks)
    batches = []
    with tqdm(total=total, desc="reading captions and sizes", unit=" images", disable=None) as progress:
        for batch, failed in _inspect_all(tasks, total):
            batches.append(batch)
            problems += failed
            progress.update(batch.num_rows + len(failed))
    return pa.Table.from_batches(batches, FOUND)


def _inspect_all(
    tasks: list[tuple[int, Subset, list[str]]], total: int
) -> Iterator[tuple[pa.RecordBatch, list[Problem]]]:
    if total <= IN_PROCESS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield from map(_inspect, tasks)
        return
    processes = min(os.cpu_count() or 1, len(tasks))
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=_start_quietly) as pool:
        yield from pool.map(_inspect, tasks)


def _start_quietly() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")


def _inspect(task: tuple[int, Subset, list[str]]) -> tuple[pa.RecordBatch, list[Problem]]:
    """The readable ones of these images, and what is wrong with the others."""
    number, subset, names = task
    rows, problems = [], []
    for name in names:
        path = subset.image_dir / name
        try:
            width, height = image_size(path)
            caption = read_caption(path, subset)
        except ImageError as error:
            problems.append(Problem(error.reason, file=error.path))
        except UserError as error:
            problems.extend(error.problems)
        else:
            values = (number, os.fsencode(name), caption, width, height)
            rows.append(dict(zip(FOUND.names, values, strict=True)))
    return pa.RecordBatch.from_pylist(rows, FOUND), problems


def _place(table: pa.Table, datasets: Sequence[Dataset], problems: list[Problem]) -> pa.Table:
    """The table with bucket, resized size and repeats of each image, without the images that fit no bucket."""
    subsets = [subset for dataset in datasets for subset in dataset.subsets]
    subset = table["subset"].to_numpy()
    sizes = np.stack([table["width"].to_numpy(), table["height"].to_numpy()], axis=1).astype(np.int64)
    owner = np.repeat(np.arange(len(datasets)), [len(dataset.subsets) for dataset in datasets])[subset]
    repeats = np.array([subset.num_repeats for subset in subsets], np.int32)[subset]
    regularization = np.array([subset.is_reg for subset in subsets])[subset]
    bucket, resized = np.zeros_like(sizes), np.zeros_like(sizes)
    kept = np.ones(len(sizes), bool)
    for number, dataset in enumerate(datasets):
        rows = np.flatnonzero(owner == number)
        placement = place_images(sizes[rows], dataset)
        bucket[rows], resized[rows] = placement.bucket, placement.resized
        kept[rows] = (bucket[rows].min(axis=1) > 0) & (resized[rows].prod(axis=1) <= MAX_RESIZED_PIXELS)
        rows = rows[kept[rows]]
        repeats[rows] = regularized_repeats(repeats[rows], regularization[rows])
    for row in np.flatnonzero(~kept).tolist():
        path = subsets[subset[row]].image_dir / os.fsdecode(table["name"][row].as_py())
        message = _misfit(*(tuple(array[row].tolist()) for array in (sizes, bucket, resized)))
        problems.append(Problem(message, file=str(path)))
    names = ["repeats", "resized_width", "resized_height", "bucket"]
    keys = (owner.astype(np.int64) << 48) + (bucket[:, 0] << 24) + bucket[:, 1]
    keys, numbers = np.unique(keys[kept], return_inverse=True)
    arrays = [repeats[kept], resized[kept, 0], resized[kept, 1], numbers]
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


def _digest(table: pa.Table) -> str:
    digest = hashlib.blake2b(repr(sorted(table.schema.metadata.items())).encode(), digest_size=12)
    for name in table.column_names:
        digest.update(name.encode())
        for buffer in table[name].chunk(0).buffers():
            if buffer is not None:
                digest.update(buffer)
    return digest.hexdigest()
