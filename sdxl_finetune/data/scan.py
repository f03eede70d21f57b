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

import pyarrow as pa
import pyarrow.compute
from tqdm import tqdm

from sdxl_finetune.config.dataset import Subset
from sdxl_finetune.data.captions import caption_paths, read_caption
from sdxl_finetune.data.images import ImageError, image_extensions, image_size
from sdxl_finetune.data.sources import read_metadata
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.files import atomic_path

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
    }
)
"""Columns of the result. `mtime` is in nanoseconds. `caption_stat` is a hash of the `stat` of all files that may hold
the caption, or of the caption in a metadata file. `stat_hash` is the hash of path, size and modification time by which
shards know the image file."""
FORMAT = 2
"""Version of SCANNED. A file of another version is not found, and its images are scanned anew."""


Row = tuple[int, bytes, str | None, int | None, int | None, int, int, int, bytes]
"""Values of SCANNED for one image; None for what has not changed since the last scan."""


@dataclass(frozen=True)
class Task:
    """Some images of one subset to inspect. It holds no Arrow data: pyarrow pickles the whole table with a slice."""

    number: int
    """Number of the subset."""
    subset: Subset
    names: Sequence[str]
    captions: Sequence[str] | None
    """Captions from a metadata file."""
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
    listed = _list_all(subsets)
    total = sum(len(names) for names, _ in listed)
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
        with atomic_path(path) as temporary, pa.ipc.new_file(str(temporary), written.schema) as writer:
            writer.write_table(written)
    return table, problems


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
    """A hash of everything that decides which files are scanned and how their captions are found."""
    sources = [
        (str(subset.image_dir.absolute()), str(subset.metadata_file), subset.caption_extension, subset.class_tokens)
        for subset in subsets
    ]
    return hashlib.blake2b(repr((FORMAT, sources)).encode(), digest_size=12).hexdigest()


def _load(path: Path) -> pa.Table | None:
    """The last scan. A damaged file is named in a warning and not used."""
    if not path.exists():
        return None
    try:
        # Windows does not replace a file that is mapped, and this one is replaced after the scan.
        source = path.read_bytes() if os.name == "nt" else pa.memory_map(str(path))
        table = pa.ipc.open_file(source).read_all().combine_chunks()
        if table.schema == SCANNED and (table.schema.metadata or {}).get(b"digest") == digest_of(table).encode():
            return table.replace_schema_metadata()
    except (OSError, pa.ArrowException):
        pass
    logger.warning("%s is damaged: every image is scanned anew", path)
    return None


def _list_all(subsets: Sequence[Subset]) -> list[tuple[list[str], list[str] | None]]:
    """The names of each subset's images, in order, and their captions if a metadata file has them."""
    listed = []
    problems: list[Problem] = []
    for subset in subsets:
        try:
            listed.append(_list(subset))
        except UserError as error:  # noqa: PERF203 (all problems are reported together)
            problems += error.problems
    if problems:
        raise UserError(problems)
    return listed


def _list(subset: Subset) -> tuple[list[str], list[str] | None]:
    if subset.metadata_file:
        captions = dict(sorted(read_metadata(subset).items()))
        return list(captions), list(captions.values())
    endings = image_extensions()
    try:
        with os.scandir(subset.image_dir) as entries:
            names = [entry.name for entry in entries if entry.name.lower().endswith(endings) and entry.is_file()]
    except OSError as error:
        raise UserError(Problem(f"the folder cannot be listed: {error.strerror}", file=str(subset.image_dir))) from None
    if not names:
        message = f"the folder holds no images ({' '.join(endings)}): put images there or remove it from the config"
        raise UserError(Problem(message, file=str(subset.image_dir)))
    return sorted(names), None


def _tasks(
    subsets: Sequence[Subset], listed: Sequence[tuple[list[str], list[str] | None]], last: pa.Table | None
) -> Iterator[tuple[Task, pa.RecordBatch | None]]:
    """The tasks, each with the rows of the last scan for its images, which are null for new images."""
    for number, (subset, (names, captions)) in enumerate(zip(subsets, listed, strict=True)):
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
            yield Task(number, subset, names[chunk], captions and captions[chunk], stats), known


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
        caption = None if task.captions is None else task.captions[place]
        known = (-1, -1, -1) if task.known is None else task.known[place]
        try:
            row = _inspect_image(task, folder, name, caption, known)
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
    task: Task, folder: bytes, name: str, caption: str | None, known: tuple[int, int, int]
) -> Row | None:
    """The row of one image, or None if nothing has changed since the last scan."""
    path = os.path.join(task.subset.image_dir, name)  # noqa: PTH118 (Path is slower, and there may be millions)
    try:
        stat = os.stat(path)  # noqa: PTH116
    except OSError as error:
        raise ImageError(path, f"not readable ({error.strerror})") from None
    caption_stat = _caption_stat(path, task.subset) if caption is None else _hash56(os.fsencode(caption))
    is_same_image = (known[0], known[1]) == (stat.st_size, stat.st_mtime_ns)
    if is_same_image and known[2] == caption_stat:
        return None
    width, height = (None, None) if is_same_image else image_size(Path(path))
    if caption is None and known[2] != caption_stat:
        caption = read_caption(Path(path), task.subset)
    file_name = os.fsencode(name)
    stat_hash = hash_of_stat(os.path.join(folder, file_name), stat.st_size, stat.st_mtime_ns)  # noqa: PTH118
    return task.number, file_name, caption, width, height, stat.st_size, stat.st_mtime_ns, caption_stat, stat_hash


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


def _hash56(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=7).digest(), "little")
