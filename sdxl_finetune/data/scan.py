"""The scan: what every image file of the datasets is, its size and its caption, before anything is placed in buckets.

It is kept in `cache_dir`, a file for each set of folders, with the state (size and time of change) of every image and
caption file, so that the next scan opens only what has changed. With `skip_cache_check` it does not even look.
"""

import hashlib
import logging
import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
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
"""Files that one task of the scan looks into."""
IN_PROCESS = 4096
"""Up to so many images that are new (a second) are looked into without starting processes; threads would only wait
for one another, since reading a header is Python's work."""
LOOKED_AT = 16
"""So many times as many images that are known: they are only looked at."""
FOUND = pa.schema(
    {
        "subset": pa.int32(),
        "name": pa.large_binary(),  # file names need not be text
        "caption": pa.large_string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "bytes": pa.int64(),
        "mtime": pa.int64(),
        "caption_state": pa.int64(),
    }
)
"""What the scan finds out about an image; `mtime` is in nanoseconds."""
FORMAT = 1


@dataclass(frozen=True)
class Task:
    """Images of one subset to look into."""

    number: int
    subset: Subset
    names: Sequence[str]
    captions: Sequence[str] | None
    """Those of a metadata file."""
    known: pa.RecordBatch | None
    """What the last scan found of them, a row each, null where it knows nothing."""


def scan(subsets: Sequence[Subset], cache_dir: Path, *, skip_check: bool = False) -> tuple[pa.Table, list[Problem]]:
    """The images of these subsets as FOUND, ordered by subset and name, and what is wrong with others. Raises
    UserError for a folder or metadata file that cannot be used at all.

    With `skip_check`, what the last scan found, if there was one.
    """
    path = cache_dir / "scans" / f"{_key(subsets)}.scan"
    last = _load(path)
    if skip_check and last is not None:
        logger.info("skip_cache_check: %d images as they were when they were last looked at", last.num_rows)
        return last, []
    tasks = list(_tasks(subsets, last))
    problems: list[Problem] = []
    batches = []
    total = sum(len(task.names) for task in tasks)
    with tqdm(total=total, desc="reading captions and sizes", unit=" images", disable=None) as progress:
        for batch, failed in _inspect_all(tasks, total, fresh=total - (last.num_rows if last else 0)):
            batches.append(batch)
            problems += failed
            progress.update(batch.num_rows + len(failed))
    table = pa.Table.from_batches(batches, FOUND).combine_chunks()
    if last is None or not table.equals(last):
        written = table.replace_schema_metadata({"digest": digest_of(table)})
        with atomic_path(path) as temporary, pa.ipc.new_file(str(temporary), written.schema) as writer:
            writer.write_table(written)
    return table, problems


def digest_of(table: pa.Table, names: Sequence[str] | None = None, size: int = 12) -> str:
    """Of the values of these columns, or of all; the table's columns have one chunk each."""
    digest = hashlib.blake2b(digest_size=size)
    for name in names or table.column_names:
        digest.update(name.encode())
        for chunk in table[name].chunks:
            for buffer in chunk.buffers():
                if buffer is not None:
                    digest.update(buffer)
    return digest.hexdigest()


def _key(subsets: Sequence[Subset]) -> str:
    """Of all that decides which files are looked at, and how their captions are found."""
    sources = [
        (str(subset.image_dir.absolute()), str(subset.metadata_file), subset.caption_extension, subset.class_tokens)
        for subset in subsets
    ]
    return hashlib.blake2b(repr((FORMAT, sources)).encode(), digest_size=12).hexdigest()


def _load(path: Path) -> pa.Table | None:
    """The last scan; one that is not as it was written is named, and not used."""
    if not path.exists():
        return None
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all().combine_chunks()
        if table.schema == FOUND and (table.schema.metadata or {}).get(b"digest") == digest_of(table).encode():
            return table.replace_schema_metadata()
    except (OSError, pa.ArrowException):
        pass
    logger.warning("%s is damaged: every image is looked into again", path)
    return None


def _tasks(subsets: Sequence[Subset], last: pa.Table | None) -> Iterator[Task]:
    problems: list[Problem] = []
    listed = [_list(subset, problems) for subset in subsets]
    if problems:
        raise UserError(problems)
    for number, (subset, (names, captions)) in enumerate(zip(subsets, listed, strict=True)):
        known = None
        if last is not None:
            rows = last.filter(pa.compute.equal(last["subset"], number))
            wanted = pa.array([os.fsencode(name) for name in names], pa.large_binary())
            known = rows.take(pa.compute.index_in(wanted, value_set=rows["name"].combine_chunks()))
        for start in range(0, len(names), CHUNK):
            part = slice(start, start + CHUNK)
            batch = known.slice(start, CHUNK).combine_chunks().to_batches()[0] if known is not None else None
            yield Task(number, subset, names[part], captions and captions[part], batch)


def _list(subset: Subset, problems: list[Problem]) -> tuple[list[str], list[str] | None]:
    """The names of a subset's images, in order, and their captions if a metadata file says them."""
    if subset.metadata_file:
        try:
            named = sorted(read_metadata(subset).items())
        except UserError as error:
            problems += error.problems
            return [], None
        return [name for name, _ in named], [caption for _, caption in named]
    endings = image_extensions()
    try:
        with os.scandir(subset.image_dir) as entries:
            names = [entry.name for entry in entries if entry.name.lower().endswith(endings) and entry.is_file()]
    except OSError as error:
        problems.append(Problem(f"cannot be listed: {error.strerror}", file=str(subset.image_dir)))
        return [], None
    if not names:
        problems.append(Problem(f"holds no images ({' '.join(endings)})", file=str(subset.image_dir)))
    return sorted(names), None


def _inspect_all(tasks: list[Task], total: int, *, fresh: int) -> Iterator[tuple[pa.RecordBatch, list[Problem]]]:
    if fresh + total // LOOKED_AT <= IN_PROCESS:
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


def _inspect(task: Task) -> tuple[pa.RecordBatch, list[Problem]]:
    """The readable ones of these images, and what is wrong with the others."""
    columns: dict[str, list[Any]] = {name: [] for name in FOUND.names}
    known = task.known.to_pydict() if task.known is not None else None
    problems = []
    for at, name in enumerate(task.names):
        try:
            row = _look(task, name, None if task.captions is None else task.captions[at], known, at)
        except ImageError as error:  # noqa: PERF203 (all are told)
            problems.append(Problem(error.reason, file=error.path))
        except UserError as error:
            problems.extend(error.problems)
        else:
            for column, value in zip(columns.values(), (task.number, os.fsencode(name), *row), strict=True):
                column.append(value)
    return pa.RecordBatch.from_pydict(columns, FOUND), problems


def _look(
    task: Task, name: str, caption: str | None, known: dict[str, list[Any]] | None, at: int
) -> tuple[str, int, int, int, int, int]:
    """Caption, width, height, bytes, mtime and state of the caption of one image; of an unchanged file as known."""
    path = task.subset.image_dir / name
    try:
        found = os.stat(path)  # noqa: PTH116 (millions)
    except OSError as error:
        raise ImageError(str(path), f"not readable ({error.strerror})") from None
    state = _state_of_caption(path, task.subset) if caption is None else 0
    same = known is not None and (known["bytes"][at], known["mtime"][at]) == (found.st_size, found.st_mtime_ns)
    width, height = (known["width"][at], known["height"][at]) if known and same else image_size(path)
    if caption is None:
        unchanged = known is not None and known["caption_state"][at] == state
        caption = known["caption"][at] if known and unchanged else read_caption(path, task.subset)
    return caption, width, height, found.st_size, found.st_mtime_ns, state


def _state_of_caption(image: Path, rules: Subset) -> int:
    """Changes when a file that the caption may be in changes, appears or goes."""
    state = []
    for path in caption_paths(image, rules):
        try:
            found = os.stat(path)  # noqa: PTH116 (millions)
            state += [found.st_size, found.st_mtime_ns]
        except OSError:  # noqa: PERF203 (not there, mostly)
            state += [-1, -1]
    return int.from_bytes(hashlib.blake2b(repr(state).encode(), digest_size=8).digest(), "little", signed=True)
