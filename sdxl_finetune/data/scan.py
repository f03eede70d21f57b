"""The scan: finds every image file of the datasets, its size and its caption, before images are placed in buckets.

Results are kept in `cache_dir`, in one file for each set of folders, with the size and modification time of every image
and caption file. The next scan opens only the files that have changed. With `skip_cache_check` it does not even call
`stat`. Time and memory grow in proportion to the number of images (scripts/benchmarks/scan.py).
"""

import hashlib
import logging
import os
import signal
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from tqdm import tqdm

from sdxl_finetune.config.dataset import Subset
from sdxl_finetune.data.caption_sources import caption_paths, read_caption
from sdxl_finetune.data.images import ImageError, image_size
from sdxl_finetune.data.listing import Listing, list_all, say_missing_captions
from sdxl_finetune.data.sources import Described
from sdxl_finetune.data.tables import map_table, write_table
from sdxl_finetune.errors import Problem, UserError

logger = logging.getLogger(__name__)

CHUNK = 512
"""Images of one task: enough work to outweigh the cost of sending the task to another process."""
MOST_PROCESSES = 61
"""Processes at most that scan; Windows refuses more in one pool."""
IN_PROCESS = 4096
"""New images up to which no processes are started: about one second of work. Threads would not help, because Python
parses the headers."""
STAT_SHARE = 16
"""An unchanged image costs a sixteenth of a new one, because only its `stat` is read."""
SCANNED = pa.schema(
    {
        "subset": pa.int32(),
        "name": pa.large_binary(),  # a file name need not be text
        "caption": pa.large_string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "bytes": pa.int64(),
        "mtime": pa.int64(),
        "caption_stat": pa.int64(),
        "stat_hash": pa.binary(16),
        "train_width": pa.int32(),
        "train_height": pa.int32(),
    }
)
"""Columns of the result. `mtime` is in nanoseconds. `caption_stat` is a hash of the `stat` of all files that may hold
the caption, or of what a metadata file says of the image. `stat_hash` is the hash of path, size and modification time
by which shards know the image file. `train_width` and `train_height` are the metadata file's train_resolution, or 0."""
FORMAT = 3
"""Version of SCANNED. A file of another version is not found, and its images are scanned anew."""
SIZE_WAS_GIVEN = 1 << 56
"""Bit of `caption_stat` of an image whose size a metadata file gave. The hash itself has 56 bits."""


Row = tuple[int, bytes, str | None, int | None, int | None, int, int, int, bytes, int, int]
"""Values of SCANNED for one image; None for what has not changed since the last scan."""


@dataclass(frozen=True)
class Task:
    """Some images of one subset to inspect. It holds no Arrow data: pyarrow pickles the whole table with a slice."""

    number: int
    """Number of the subset."""
    subset: Subset
    names: Sequence[str]
    described: Sequence[Described] | None
    """Captions and sizes from a metadata file."""
    known: Sequence[tuple[int, int, int]] | None
    """`bytes`, `mtime` and `caption_stat` of each image in the last scan, -1 for an image that is new."""


@dataclass(frozen=True)
class Inspected:
    """Result of a task: only what has changed since the last scan."""

    changed: dict[int, Row]
    """Rows of new and changed images, by place in the task."""
    failed: list[int]
    """Places of the images that cannot be used."""
    problems: list[Problem]


def scan(subsets: Sequence[Subset], cache_dir: Path, *, skip_check: bool = False) -> tuple[pa.Table, list[Problem]]:
    """Returns the images of these subsets as a SCANNED table, ordered by subset and name, and the unusable files.

    With `skip_check` it returns the last scan, if there is one. Raises UserError for a folder or metadata file that
    cannot be used at all.
    """
    path = cache_dir / "scans" / f"{_key(subsets)}.scan"
    last = _load(path)
    if skip_check and last is not None:
        logger.info("skip_cache_check: using %d images as the last scan found them", last.num_rows)
        return last, []
    listed = list_all(subsets)
    total = sum(len(listing.names) for listing in listed)
    problems: list[Problem] = []
    batches = []
    with tqdm(total=total, desc="reading captions and sizes", unit=" images", disable=None) as progress:
        tasks = _tasks(subsets, listed, last)
        for task, known, inspected in _inspect_all(tasks, total, last.num_rows if last else 0):
            batches.append(_merge(task, known, inspected))
            problems += inspected.problems
            progress.update(len(task.names))
    table = pa.Table.from_batches(batches, SCANNED).combine_chunks()
    if last is None or not table.equals(last):
        written = table.replace_schema_metadata({"digest": digest_of(table)})
        write_table(path, written)
    _say_missing_captions(subsets, listed, table)
    return table, problems


def _say_missing_captions(subsets: Sequence[Subset], listed: Sequence[Listing], table: pa.Table) -> None:
    without = [_hash56(b" ".join([b"-"] * places)) for places in (1, 2)]  # of an image and of a face cutout
    is_missing = pa.compute.is_in(table["caption_stat"], value_set=pa.array(without, pa.int64()))
    counts = np.bincount(table["subset"].filter(is_missing).to_numpy(), minlength=len(subsets)).tolist()
    for subset, listing, missing in zip(subsets, listed, counts, strict=True):
        say_missing_captions(subset, listing, missing)


def digest_of(table: pa.Table, names: Sequence[str] | None = None, size: int = 12) -> str:
    """A hash of `size` bytes of the values of these columns, or of all. Each column must have one chunk."""
    digest = hashlib.blake2b(digest_size=size)
    for name in names or table.column_names:
        digest.update(name.encode())
        for chunk in table[name].chunks:
            # The first buffer marks nulls. It may be there or not where there are none.
            for buffer in chunk.buffers()[chunk.null_count == 0 :]:
                if buffer is not None:
                    digest.update(buffer)
    return digest.hexdigest()


def _key(subsets: Sequence[Subset]) -> str:
    """A hash of everything that decides which files are scanned and how their captions are found or joined."""
    sources = [
        (str(subset.image_dir.absolute()), str(subset.metadata_file), subset.caption_extension, subset.class_tokens)
        + ((subset.caption_separator, subset.enable_wildcard) if subset.metadata_file else ())
        for subset in subsets
    ]
    return hashlib.blake2b(repr((FORMAT, sources)).encode(), digest_size=12).hexdigest()


def _load(path: Path) -> pa.Table | None:
    """The last scan. A damaged file is named in a warning and not used."""
    if not path.exists():
        return None
    try:
        # Windows does not replace a file that is mapped, and this one is replaced after the scan.
        table = map_table(path, mapped=os.name != "nt").combine_chunks()
        if table.schema == SCANNED and (table.schema.metadata or {}).get(b"digest") == digest_of(table).encode():
            return table.replace_schema_metadata()
    except (OSError, pa.ArrowException):
        pass
    logger.warning("%s is damaged: every image is scanned anew", path)
    return None


def _tasks(
    subsets: Sequence[Subset], listed: Sequence[Listing], last: pa.Table | None
) -> Iterator[tuple[Task, pa.RecordBatch | None]]:
    """The tasks, each with the rows of the last scan for its images, which are null for new images."""
    for number, (subset, listing) in enumerate(zip(subsets, listed, strict=True)):
        names, described = listing.names, listing.described
        if last is not None:
            rows = last.filter(pa.compute.equal(last["subset"], number)).combine_chunks()
            wanted = pa.array([os.fsencode(name) for name in names], pa.large_binary())
            places = pa.compute.index_in(wanted, value_set=rows["name"].combine_chunks())
        for start in range(0, len(names), CHUNK):
            chunk = slice(start, start + CHUNK)
            known = stats = None
            if last is not None:
                known = rows.take(places[chunk]).combine_chunks().to_batches()[0]
                columns = (known[name].fill_null(-1).to_pylist() for name in ("bytes", "mtime", "caption_stat"))
                stats = list(zip(*columns, strict=True))
            yield Task(number, subset, names[chunk], described and described[chunk], stats), known


def _merge(task: Task, known: pa.RecordBatch | None, inspected: Inspected) -> pa.RecordBatch:
    """The rows of a task's usable images: those of the last scan, with what has changed."""
    if known is not None and not inspected.changed and not inspected.failed:
        return known
    columns: dict[str, list[Any]]
    columns = {name: [None] * len(task.names) for name in SCANNED.names} if known is None else known.to_pydict()
    for place, row in inspected.changed.items():
        for column, value in zip(columns.values(), row, strict=True):
            if value is not None:
                column[place] = value
    for place in reversed(inspected.failed):
        for column in columns.values():
            del column[place]
    return pa.RecordBatch.from_pydict(columns, SCANNED)


def _inspect_all(
    tasks: Iterator[tuple[Task, pa.RecordBatch | None]], total: int, known: int
) -> Iterator[tuple[Task, pa.RecordBatch | None, Inspected]]:
    """The results of all tasks, in order: in this process if they are quick, else in one process per CPU core."""
    if max(0, total - known) + total // STAT_SHARE <= IN_PROCESS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield from ((task, rows, _inspect(task)) for task, rows in tasks)
        return
    processes = min(os.cpu_count() or 1, -(-total // CHUNK), MOST_PROCESSES)
    pending: deque[tuple[Task, pa.RecordBatch | None, Future[Inspected]]] = deque()
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=_start_worker) as pool:
        for task, rows in tasks:
            pending.append((task, rows, pool.submit(_inspect, task)))
            if len(pending) > 4 * processes:  # more would only take memory
                first, its_rows, result = pending.popleft()
                yield first, its_rows, result.result()
        while pending:
            first, its_rows, result = pending.popleft()
            yield first, its_rows, result.result()


def _start_worker() -> None:
    """Leaves Ctrl-C to the main process, and hides warnings of image libraries."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")


def _inspect(task: Task) -> Inspected:
    folder = os.fsencode(task.subset.image_dir.absolute())
    inspected = Inspected({}, [], [])
    for place, name in enumerate(task.names):
        described = None if task.described is None else task.described[place]
        known = (-1, -1, -1) if task.known is None else task.known[place]
        try:
            row = _inspect_image(task, folder, name, described, known)
        except ImageError as error:
            inspected.failed.append(place)
            inspected.problems.append(Problem(error.reason, file=error.path))
        except UserError as error:
            inspected.failed.append(place)
            inspected.problems.extend(error.problems)
        else:
            if row is not None:
                inspected.changed[place] = row
    return inspected


def _inspect_image(
    task: Task, folder: bytes, name: str, described: Described | None, known: tuple[int, int, int]
) -> Row | None:
    """The row of one image, or None if nothing has changed since the last scan."""
    path = os.path.join(task.subset.image_dir, name)  # noqa: PTH118 (Path is slower, and there may be millions)
    try:
        stat = os.stat(path)  # noqa: PTH116
    except OSError as error:
        is_link = os.path.islink(path)  # noqa: PTH114
        raise ImageError(path, "a link to a missing file" if is_link else f"not readable ({error.strerror})") from None
    caption_stat = _caption_stat(path, task.subset) if described is None else _described_stat(described)
    is_same_image = (known[0], known[1]) == (stat.st_size, stat.st_mtime_ns)
    if is_same_image and known[2] == caption_stat:
        return None
    width = height = None
    if described and described.size:
        width, height = described.size
    elif not is_same_image or known[2] & SIZE_WAS_GIVEN:
        width, height = image_size(Path(path))
    caption = described.caption if described else None
    if described is None and known[2] != caption_stat:
        caption = read_caption(Path(path), task.subset)
    file_name = os.fsencode(name)
    stat_hash = hash_of_stat(os.path.join(folder, file_name), stat.st_size, stat.st_mtime_ns)  # noqa: PTH118
    stats = stat.st_size, stat.st_mtime_ns, caption_stat, stat_hash
    return task.number, file_name, caption, width, height, *stats, *((described and described.bucket) or (0, 0))


def hash_of_stat(path: bytes, size: int, mtime: int) -> bytes:
    """The 16-byte hash by which shards know an image file.

    It is made of the absolute path, the size in bytes and the modification time in nanoseconds.
    """
    return hashlib.blake2b(b"%s %d %d" % (path, size, mtime), digest_size=16).digest()


def _caption_stat(image: str, options: Subset) -> int:
    """A hash that changes when a file that may hold the caption changes, appears or disappears. It is never -1."""
    stats = []
    for path in caption_paths(image, options):
        try:
            stat = os.stat(path)  # noqa: PTH116
            stats.append(b"%d %d" % (stat.st_size, stat.st_mtime_ns))
        except OSError:  # noqa: PERF203 (a caption file is missing now and then)
            stats.append(b"-")
    return _hash56(b" ".join(stats))


def _described_stat(described: Described) -> int:
    return _hash56(repr(described).encode()) | (SIZE_WAS_GIVEN if described.size else 0)


def _hash56(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=7).digest(), "little")
