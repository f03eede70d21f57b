"""The scan: finds every image file of the datasets, its size and its caption, before images are placed in buckets.

Results are kept in `cache_dir`, in one file for each set of folders, with the size and modification time of every image
and caption file. The next scan opens only the files that have changed. With `skip_cache_check` it does not even call
`stat`. The scan works on columns, a chunk of rows at a time; chunks without changes are not copied. Time and memory
grow in proportion to the number of images (scripts/benchmarks/scale.py).
"""

import hashlib
import logging
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute
from jaxtyping import Bool, Int64, Shaped

from sdxl_finetune.config.dataset import Subset, holds_tars
from sdxl_finetune.data.child_processes import process_pool
from sdxl_finetune.data.contents import absolute
from sdxl_finetune.data.inspection import Contents, Files, Stats, look_at, read, stat_of_missing
from sdxl_finetune.data.listing import list_all, say_missing_captions
from sdxl_finetune.data.sources.listed import Listing
from sdxl_finetune.data.tables import fixed_binary, map_table, one_chunk, write_table
from sdxl_finetune.data.unusable import Unusable
from sdxl_finetune.errors import Problem, Tally
from sdxl_finetune.progress import track

logger = logging.getLogger(__name__)

CHUNK = 4096
"""Images of one task: enough work to outweigh the cost of sending the task to another process."""
MOST_PROCESSES = 61
"""Processes at most that scan; Windows refuses more in one pool."""
IN_PROCESS = 10_000
"""New images up to which no processes are started: about one second of work. Threads would not help, because Python
parses the headers."""
AHEAD = 16
"""Tasks that wait for the processes."""
STAT_SHARE = 16
"""An unchanged image costs a sixteenth of a new one, because only its `stat` is read."""
SCANNED = pa.schema(
    {
        "subset": pa.int32(),
        "name": pa.large_binary(),  # a file name need not be text
        "captions": pa.large_list(pa.large_string()),
        "width": pa.int32(),
        "height": pa.int32(),
        "bytes": pa.int64(),
        "mtime": pa.int64(),
        "caption_stat": pa.int64(),
        "stat_hash": pa.binary(16),
        "train_width": pa.int32(),
        "train_height": pa.int32(),
        "score": pa.float32(),
        "offset": pa.int64(),
    }
)
"""Columns of the result: those of LISTED, and the following. `caption_stat` is a hash of the `stat` of all files that
may hold the caption, or FROM_SOURCE. `stat_hash` is the hash of path, size and modification time by which shards know
the image file. Values that the source does not give are 0 (train_width, train_height), NaN (score) and -1 (offset)."""
DEFAULTS = {"train_width": 0, "train_height": 0, "score": float("nan"), "offset": -1}
FORMAT = 4
"""Version of SCANNED. A file of another version is not found, and its images are scanned anew."""
FROM_SOURCE = 1 << 57
"""`caption_stat` of an image whose caption the listing gave. Hashes have 56 bits."""
SIZE_WAS_GIVEN = 1 << 56
"""Bit of `caption_stat` of an image whose size the listing gave."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Chunk:
    """Some neighbouring images of one subset, as they are listed and as the last scan knew them."""

    number: int
    """Number of the subset."""
    subset: Subset
    listed: pa.Table
    known: pa.Table
    """All images of the subset in the last scan."""
    places: Int64[np.ndarray, " n"]
    """Row of each image in `known`, or -1."""
    bad_places: Int64[np.ndarray, " n"]
    """Row of each image among those that the last scan could not use, or -1."""

    def is_given(self, name: str) -> Bool[np.ndarray, " n"]:
        """True for images of which the listing gives this column."""
        return self.listed[name].is_valid().to_numpy()

    def given(self, name: str) -> Shaped[np.ndarray, " n"]:
        """A numeric column of the listing, with the default where the listing gives nothing."""
        return self.listed[name].fill_null(DEFAULTS.get(name, 0)).to_numpy()

    def last(self, name: str) -> Shaped[np.ndarray, " n"]:
        """A numeric column of the last scan, with -1 for new images."""
        values = one_chunk(self.known[name]).to_numpy()
        if not len(values):
            return np.full(len(self.places), -1, values.dtype)
        return np.where(self.places >= 0, values[self.places], values.dtype.type(-1))

    def files(self, rows: Int64[np.ndarray, " k"], *, images: np.ndarray, captions: np.ndarray) -> Files:
        """The files of these rows. The arrays say for all rows if the image and the caption are looked at."""
        names = self.listed["name"] if len(rows) == len(self.places) else self.listed["name"].take(pa.array(rows))
        return Files(self.subset, names.to_pylist() if len(rows) else [], images[rows], captions[rows])


@dataclass(frozen=True)
class Changes:
    """A chunk, with the current `stat` of its files and the rows whose files have to be read."""

    chunk: Chunk
    stats: Stats
    rows: Int64[np.ndarray, " k"]
    """Rows of new and changed images and captions."""
    files: Files
    """The files of these rows."""
    known_bad: Mapping[int, Sequence[Problem]]
    """Problems of rows that the last scan could not use, and that have not changed."""


def scan(subsets: Sequence[Subset], cache_dir: Path, *, skip_check: bool = False) -> tuple[pa.Table, Tally]:
    """Returns the images of these subsets as a SCANNED table, ordered by subset and name, and the unusable files.

    The table's metadata has a `digest` of its values. With `skip_check` it returns the last scan, if there is one.
    Raises UserError for a folder or metadata file that cannot be used at all.
    """
    path = cache_dir / "scans" / f"{_key(subsets)}.scan"
    last = _load(path)
    if skip_check and last is not None:
        logger.info("skip_cache_check: using %d images as the last scan found them", last.num_rows)
        return last, Tally()
    listed = list_all(subsets, cache_dir)
    known = SCANNED.empty_table() if last is None else last
    unusable = Unusable.load(path.with_suffix(".unusable"))
    total = sum(listing.table.num_rows for listing in listed)
    problems, parts = Tally(), [SCANNED.empty_table()]
    for listing in listed:
        problems.add_all(listing.problems)
    has_changed = last is None
    with (
        _executor(max(0, total - known.num_rows) + total // STAT_SHARE) as pool,
        track("reading captions and sizes", total, "images") as progress,
    ):
        looked = _run_ahead(
            pool, look_at, ((chunk, _to_look_at(chunk)) for chunk in _chunks(subsets, listed, known, unusable))
        )
        changes = (_changes(chunk, stats, unusable) for chunk, stats in looked)
        reading = _run_ahead(pool, read, ((found, _to_read(found)) for found in changes))
        for found, contents in reading:
            merged = None if _is_unchanged(found) else _merge(found, contents, problems, unusable)
            before = _known_rows(found.chunk, len(found.chunk.places) if merged is None else merged.num_rows)
            is_unchanged = merged is None or _equal(merged, before)
            parts.append(before if is_unchanged else merged)
            has_changed |= not is_unchanged
            progress.update(found.chunk.listed.num_rows)
    unusable.save()
    table = known
    if has_changed or sum(part.num_rows for part in parts) != known.num_rows:
        table = pa.concat_tables(parts).combine_chunks()
        table = table.replace_schema_metadata({"digest": digest_of(table)})
        write_table(path, table)
    _say_missing_captions(subsets, listed, table)
    return table, problems


def digest_of(table: pa.Table, names: Sequence[str] | None = None, size: int = 12) -> str:
    """A hash of `size` bytes of the values of these columns, or of all. Each column must have one chunk."""
    digest = hashlib.blake2b(digest_size=size)
    for name in names or table.column_names:
        digest.update(name.encode())
        for chunk in filter(len, table[name].chunks):  # an empty chunk may have buffers, and has none in a file
            # The first buffer marks nulls. It may be there or not where there are none.
            for buffer in chunk.buffers()[chunk.null_count == 0 :]:
                if buffer is not None:
                    digest.update(buffer)
    return digest.hexdigest()


def _key(subsets: Sequence[Subset]) -> str:
    """A hash of everything that decides which files are scanned and how their captions are found or joined."""
    sources = [
        (str(absolute(subset.image_dir)), str(subset.metadata_file), subset.caption_extension, subset.class_tokens)
        + ((subset.tar_files,) if subset.tar_files else ())
        + ((subset.metadata_columns,) if subset.metadata_columns else ())
        + ((subset.caption_separator, subset.enable_wildcard) if _joins_texts(subset) else ())
        + tuple(source.name for source in subset.caption_sources or ())
        for subset in subsets
    ]
    return hashlib.blake2b(repr((FORMAT, sources)).encode(), digest_size=12).hexdigest()


def _joins_texts(subset: Subset) -> bool:
    """True if captions may be joined from several texts, as those of metadata files and tar files are."""
    folder = subset.image_dir
    return bool(subset.metadata_file or subset.tar_files) or not isinstance(folder, Path) or holds_tars(folder)


def _load(path: Path) -> pa.Table | None:
    """The last scan. A damaged file is named in a warning and not used."""
    if not path.exists():
        return None
    try:
        # Windows does not replace a file that is mapped, and this one is replaced after the scan.
        table = map_table(path, mapped=os.name != "nt").combine_chunks()
        if table.schema == SCANNED and (table.schema.metadata or {}).get(b"digest") == digest_of(table).encode():
            return table
    except (OSError, pa.ArrowException):
        pass
    logger.warning("%s is damaged: every image is scanned anew", path)
    return None


def _chunks(
    subsets: Sequence[Subset], listed: Sequence[Listing], last: pa.Table, unusable: Unusable
) -> Iterator[Chunk]:
    """The images of all subsets, in order."""
    starts = np.searchsorted(one_chunk(last["subset"]).to_numpy(), np.arange(len(subsets) + 1))
    for number, (subset, listing) in enumerate(zip(subsets, listed, strict=True)):
        names, known = one_chunk(listing.table["name"]), last.slice(starts[number], starts[number + 1] - starts[number])
        known_names = one_chunk(known["name"])
        if names.equals(known_names):
            places = np.arange(len(names))
        else:
            places = pa.compute.index_in(names, value_set=known_names).fill_null(-1).to_numpy().astype(np.int64)
        bad = unusable.places(number, names)
        for start in range(0, len(names), CHUNK):
            own = slice(start, start + CHUNK)
            yield Chunk(number, subset, listing.table.slice(start, CHUNK), known, places[own], bad[own])


def _to_look_at(chunk: Chunk) -> tuple[Files]:
    everything = np.arange(len(chunk.places))
    images, captions = ~chunk.is_given("mtime"), ~chunk.is_given("captions")
    return (chunk.files(everything, images=images, captions=captions),)


def _changes(chunk: Chunk, stats: Stats, unusable: Unusable) -> Changes:
    """Compares the chunk with the last scan, and with the images that it could not use."""
    size_given, from_source = chunk.is_given("width"), chunk.is_given("captions")
    for name in ("bytes", "mtime"):
        getattr(stats, name)[chunk.is_given(name)] = chunk.given(name)[chunk.is_given(name)]
    stats.caption_stat[from_source] = FROM_SOURCE
    stats.caption_stat[size_given] |= SIZE_WAS_GIVEN
    size_was_given = chunk.last("caption_stat") & SIZE_WAS_GIVEN > 0
    is_same = (stats.bytes == chunk.last("bytes")) & (stats.mtime == chunk.last("mtime"))
    is_same &= chunk.given("offset") == chunk.last("offset")
    same_caption = (stats.caption_stat | SIZE_WAS_GIVEN) == (chunk.last("caption_stat") | SIZE_WAS_GIVEN)
    images = ~size_given & (~is_same | size_was_given)
    captions = ~from_source & ~(same_caption & (chunk.places >= 0))
    wanted = ~is_same | images | captions
    numbers = {"bytes": stats.bytes, "mtime": stats.mtime, "text_stat": stats.caption_stat}
    known_bad = unusable.find(chunk.bad_places, numbers)
    wanted[[*stats.failed, *known_bad]] = False
    rows = np.flatnonzero(wanted)
    return Changes(chunk, stats, rows, chunk.files(rows, images=images, captions=captions), known_bad)


def _to_read(found: Changes) -> tuple[Files, Int64[np.ndarray, "k 2"]]:
    return found.files, np.stack([found.stats.bytes, found.stats.mtime], axis=1)[found.rows]


def _is_unchanged(found: Changes) -> bool:
    """True if the rows of a chunk are neighbours in the last scan too, and nothing about them has changed."""
    chunk, places = found.chunk, found.chunk.places
    if (
        len(found.rows)
        or found.stats.failed
        or found.known_bad
        or (places != np.arange(places[0], places[0] + len(places))).any()
    ):
        return False
    given = [name for name in ("captions", "width", "height") if chunk.is_given(name).any()]
    for name in given:
        now, before = one_chunk(chunk.listed[name]), one_chunk(_known_rows(chunk, len(places))[name])
        is_given = pa.array(chunk.is_given(name))
        if not now.filter(is_given).equals(before.filter(is_given)):
            return False
    same = (np.array_equal(chunk.given(name), chunk.last(name), equal_nan=True) for name in DEFAULTS)
    return all(same) and bool((found.stats.caption_stat == chunk.last("caption_stat")).all())


def _known_rows(chunk: Chunk, count: int) -> pa.Table:
    """Returns `count` rows of the last scan, from the first that is in the chunk. They are not copied."""
    known = chunk.places[chunk.places >= 0]
    return chunk.known.slice(known[0] if len(known) else 0, count)


def _equal(first: pa.Table, second: pa.Table) -> bool:
    """True if both tables have the same values. Scores may be NaN, which Arrow never takes for equal."""
    score, other_score = (one_chunk(table["score"]).to_numpy() for table in (first, second))
    rest, other_rest = (table.drop_columns("score") for table in (first, second))
    return rest.equals(other_rest) and np.array_equal(score, other_score, equal_nan=True)


def _merge(found: Changes, contents: Contents, problems: Tally, unusable: Unusable) -> pa.Table:
    """The rows of a chunk's usable images: those of the last scan, with what has changed.

    Counts the problems, and notes images that cannot be used until they change.
    """
    chunk, rows, stats = found.chunk, found.rows, found.stats
    failed: dict[int, Sequence[Problem]] = {place: (problem,) for place, problem in stats.failed.items()}
    failed |= {int(rows[place]): own for place, own in contents.failed.items()} | dict(found.known_bad)
    lasting = {int(rows[place]) for place in contents.lasting} | set(found.known_bad)
    for place in sorted(failed):
        for problem in failed[place]:
            problems.add(problem)
        if place in lasting:
            numbers = [int(column[place]) for column in (stats.bytes, stats.mtime, stats.caption_stat)]
            unusable.add(chunk.number, chunk.listed["name"][place].as_py(), numbers, failed[place])
    kept = np.delete(np.arange(len(chunk.places)), list(failed))
    hashes = np.zeros((len(chunk.places), 16), np.uint8)
    is_known = chunk.places >= 0
    hashes[is_known] = fixed_binary(one_chunk(chunk.known["stat_hash"]))[chunk.places[is_known]]
    hashes[rows] = contents.stat_hashes
    columns: dict[str, Any] = {name: chunk.given(name) for name in DEFAULTS}
    columns |= {"bytes": stats.bytes, "mtime": stats.mtime, "caption_stat": stats.caption_stat}
    columns["subset"] = np.full(len(chunk.places), chunk.number)
    for name in ("width", "height"):
        columns[name] = np.where(chunk.is_given(name), chunk.given(name), chunk.last(name))
        columns[name][rows[found.files.images]] = getattr(contents, name)[found.files.images]
    arrays = {name: pa.array(values[kept]).cast(SCANNED.field(name).type) for name, values in columns.items()}
    arrays["name"] = one_chunk(chunk.listed["name"]).take(pa.array(kept))
    arrays["stat_hash"] = pa.Array.from_buffers(pa.binary(16), len(kept), [None, pa.py_buffer(hashes[kept].tobytes())])
    arrays["captions"] = _captions(found, contents, kept)
    return pa.table([arrays[name] for name in SCANNED.names], schema=SCANNED)


def _captions(found: Changes, contents: Contents, kept: Int64[np.ndarray, " k"]) -> pa.LargeListArray:
    """The captions of these rows: from the listing, from the files that were read, or from the last scan."""
    chunk, type_ = found.chunk, SCANNED.field("captions").type
    listed, known = one_chunk(chunk.listed["captions"]), one_chunk(chunk.known["captions"])
    own = np.flatnonzero(found.files.captions)
    was_read, is_given = np.zeros(len(chunk.places), bool), chunk.is_given("captions")
    was_read[found.rows[own]] = True
    is_old = ~is_given & ~was_read & (chunk.places >= 0)
    old = known.take(pa.array(chunk.places[is_old]))
    place = np.zeros(len(chunk.places), np.int64)
    place[is_old] = np.arange(len(old))
    place[is_given] = len(old) + np.flatnonzero(is_given)
    place[was_read] = len(old) + len(listed) + np.arange(len(own))
    new = pa.array([contents.captions[number] for number in own.tolist()], type_)
    return pa.concat_arrays([old, listed, new]).take(pa.array(place[kept]))


def _say_missing_captions(subsets: Sequence[Subset], listed: Sequence[Listing], table: pa.Table) -> None:
    without = [stat_of_missing(places) | given for places in (1, 2) for given in (0, SIZE_WAS_GIVEN)]
    is_missing = np.isin(one_chunk(table["caption_stat"]).to_numpy(), without)
    counts = np.bincount(one_chunk(table["subset"]).to_numpy()[is_missing], minlength=len(subsets)).tolist()
    for subset, listing, missing in zip(subsets, listed, counts, strict=True):
        say_missing_captions(subset, listing, missing)


@contextmanager
def _executor(new_images: int) -> Iterator[Executor | None]:
    """One process per CPU core, or None if this process is quick enough for so many new images."""
    if new_images <= IN_PROCESS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield None
        return
    processes = max(1, min(os.cpu_count() or 1, new_images // CHUNK, MOST_PROCESSES))
    with process_pool(processes) as pool:
        yield pool


def _run_ahead(
    pool: Executor | None, function: Callable[..., Result], work: Iterable[tuple[Item, tuple]]
) -> Iterator[tuple[Item, Result]]:
    """Calls the function with the arguments of each item, whose first argument has a length. Yields in order.

    The processes of a pool work ahead. Items without length are not sent to them.
    """
    waiting: deque[tuple[Item, Future[Result] | Result]] = deque()
    for item, arguments in work:
        in_pool = pool is not None and len(arguments[0]) > 0
        waiting.append((item, pool.submit(function, *arguments) if in_pool and pool else function(*arguments)))
        while len(waiting) > (AHEAD if pool else 0):  # more would only take memory
            first, result = waiting.popleft()
            yield first, result.result() if isinstance(result, Future) else result
    for first, result in waiting:
        yield first, result.result() if isinstance(result, Future) else result
