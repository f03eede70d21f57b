"""The images of a subset that are members of tar files, as WebDataset packs them: `000017.jpg` beside `000017.txt`.

The names of the images begin with the tar file's name: `data-001.tar/000017.jpg`. The members of each tar file are kept
in `cache_dir`, and are looked for again only if the tar file's size or version has changed. The images themselves are
read where they are.
"""

import contextlib
import fnmatch
import hashlib
import json
import math
import os
import re
from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path

import pyarrow as pa
import pyarrow.compute

from sdxl_finetune.config.dataset import TAR_SUFFIX, Subset
from sdxl_finetune.data.child_processes import process_pool
from sdxl_finetune.data.contents import absolute, container_version
from sdxl_finetune.data.images import image_extensions
from sdxl_finetune.data.sources.beside import Wanted, captions_of, wanted_of
from sdxl_finetune.data.sources.folders import list_folder
from sdxl_finetune.data.sources.listed import LISTED, Listing, sorted_by_name
from sdxl_finetune.data.sources.names import prefixed
from sdxl_finetune.data.sources.tar_files import Members, read_members, schema
from sdxl_finetune.data.tables import map_table, one_chunk, write_table
from sdxl_finetune.errors import Problem, Tally, UserError, listed
from sdxl_finetune.parsing import parse_json
from sdxl_finetune.progress import track
from sdxl_finetune.storage import Found, Location, StorageError

FORMAT = 2
"""Version of the files of members in `cache_dir`. Files of another version are not found."""
THREADS = 32
"""Tar files in an object store that are looked through at once. Each waits for one request at a time."""
IN_PROCESS = 1 << 24
"""Bytes of tar files up to which no processes are started."""
MOST_TARS = 1_000_000
"""Tar files that a pattern may name. More are a mistake in a range."""
NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")
"""A range of numbers in a name, as {000..099}: both ends belong to it, and zeros in front are kept."""


def expand(pattern: str) -> list[str]:
    """The names that a pattern such as `data-{000..099}.tar` stands for. Raises UserError for an impossible range."""
    sizes = [int(last) - int(first) + 1 for first, last in NUMBERS.findall(pattern)]
    if not all(size > 0 for size in sizes) or math.prod(sizes) > MOST_TARS:
        message = f"a range {{first..last}} must rise, and all of them may name {MOST_TARS:,} tar files at most"
        raise UserError(Problem(message, file=pattern))
    parts = NUMBERS.split(pattern)
    texts, firsts, lasts = parts[::3], parts[1::3], parts[2::3]
    ranges = [
        [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
        for first, last in zip(firsts, lasts, strict=True)
    ]
    return [
        "".join(text + number for text, number in zip(texts, (*numbers, ""), strict=True))
        for numbers in product(*ranges)
    ]


def find_tars(folder: Location, pattern: str | None) -> list[Found]:
    """The tar files of a folder, or those that a pattern names, sorted by name. Raises UserError."""
    there = {one.name: one for one in list_folder(folder) if one.name.lower().endswith(TAR_SUFFIX)}
    if pattern is None:
        names = list(there)
    elif "*" in pattern:
        names = [name for name in there if fnmatch.fnmatchcase(name, pattern)]
        if not names:
            raise UserError(Problem(f"no tar file has such a name: {_remedy(there)}", file=str(folder / pattern)))
    else:
        names = expand(pattern)
        if missing := [name for name in names if name not in there]:
            is_range = NUMBERS.search(pattern) and len(missing) < len(names)
            remedy = f"download them, or name those that are there: {NUMBERS.sub('*', pattern)}"
            message = f"{len(missing)} of {len(names)} tar files are missing ({listed(missing)})"
            message += f": {remedy if is_range else _remedy(there)}"
            raise UserError(Problem(message, file=str(folder / pattern)))
    return [there[name] for name in sorted(names)]


def _remedy(there: Collection[str]) -> str:
    """Says what to do if none of the tar files that a user names exists. `there` are those in the folder."""
    return f"check the name, because the folder holds {listed(sorted(there)) or 'no tar files'}"


def read_tars(subset: Subset, cache_dir: Path) -> Listing:
    """Lists the images in the tar files of a subset. Raises UserError if there are none."""
    folder, wanted = subset.image_dir, wanted_of(subset, in_tars=True)
    found = find_tars(folder, subset.tar_files)
    problems, others, tables = Tally(), Counter[str](), []
    for tar, members in zip(found, _all_members(folder, found, wanted, cache_dir), strict=True):
        tables.append(_listed(subset, tar, members.table, wanted))
        others += members.others
        problems.add_all(members.problems)
    table = pa.concat_tables(tables) if tables else LISTED.empty_table()
    return Listing(sorted_by_name(table), others, problems)


def _listed(subset: Subset, tar: Found, members: pa.Table, wanted: Wanted) -> pa.Table:
    """The images of one tar file in the columns of LISTED."""
    size = members.num_rows
    columns = {
        "name": prefixed(os.fsencode(tar.name) + b"/", members["name"]),
        "captions": captions_of(subset, {name: one_chunk(members[name]) for name in wanted.texts}),
        "mtime": pa.repeat(pa.scalar(container_version(tar.size, tar.version), pa.int64()), size),
    }
    columns |= {name: members[name] for name in ("width", "height", "score", "offset", "bytes")}
    return pa.table([columns.get(one.name, pa.nulls(size, one.type)) for one in LISTED], schema=LISTED)


def _all_members(folder: Location, found: Sequence[Found], wanted: Wanted, cache_dir: Path) -> Iterator[Members]:
    """The members of all tar files, in order: from `cache_dir`, or from the tar file if it is new or has changed."""
    about = repr((FORMAT, str(absolute(folder)), wanted, image_extensions())).encode("utf-8", "surrogateescape")
    key = hashlib.blake2b(about, digest_size=12)
    kept = cache_dir / "tars" / key.hexdigest()
    jobs = [Job(folder / tar.name, tar, wanted, kept / f"{tar.name}.members") for tar in found]
    known = [load_members(job) for job in jobs]
    missing = [job for job, members in zip(jobs, known, strict=True) if members is None]
    with _pool(folder, missing) as pool, track("looking through tar files", len(missing), "tars") as progress:
        fresh = run_ahead(pool, missing)
        for members in known:
            if members is not None:
                yield members
                continue
            yield next(fresh)
            progress.update()


def _pool(folder: Location, jobs: Sequence["Job"]) -> contextlib.AbstractContextManager[Executor | None]:
    """Processes for tar files on a disk, because Python parses the headers; threads that wait for an object store."""
    if not isinstance(folder, Path) and len(jobs) > 1:
        return ThreadPoolExecutor(THREADS)
    if isinstance(folder, Path) and len(jobs) > 1 and sum(job.tar.size for job in jobs) > IN_PROCESS:
        return process_pool(min(len(jobs), os.cpu_count() or 1))
    return contextlib.nullcontext()


@dataclass(frozen=True)
class Job:
    """A tar file to look through."""

    location: Location
    tar: Found
    wanted: Wanted
    kept: Path
    """The file that keeps its members."""


def keep_members(job: Job) -> Problem | None:
    """Looks through a tar file and keeps its members. Returns a problem if the tar file cannot be read."""
    try:
        members = read_members(job.location, job.tar.size, job.wanted)
    except OSError as error:
        return Problem(f"the tar file cannot be read ({error.strerror})", file=str(job.location))
    except StorageError as error:
        return error.problems[0]
    about = {
        "tar": [job.tar.size, job.tar.version],
        "problems": [[problem.message, problem.file, count] for problem, count in members.problems.counted()],
        "others": members.others,
    }
    write_table(job.kept, members.table.replace_schema_metadata({"about": json.dumps(about)}))
    return None


def load_members(job: Job) -> Members | None:
    """The members of a tar file as they are kept. None if they are not, or if the tar file has changed since then."""
    try:
        table = map_table(job.kept)
        about = parse_json((table.schema.metadata or {}).get(b"about", b"{}"))
        if about["tar"] != [job.tar.size, job.tar.version] or not table.schema.equals(schema(job.wanted)):
            return None
        problems = Tally()
        for message, file, count in about["problems"]:
            problems.add(Problem(message, file=file), count)
        return Members(table, problems, Counter(about["others"]))
    except (OSError, pa.ArrowException, ValueError, LookupError, TypeError):
        return None


def run_ahead(pool: Executor | None, jobs: Sequence[Job]) -> Iterator[Members]:
    """Yields the members of each tar file, in order. The pool works on the next tar files meanwhile."""
    waiting: deque[Future[Problem | None]] = deque()
    ahead = iter(jobs)
    for job in jobs:
        if pool is not None:
            waiting.extend(pool.submit(keep_members, one) for one in islice(ahead, 2 * THREADS - len(waiting)))
        problem = keep_members(job) if pool is None else waiting.popleft().result()
        members = load_members(job)
        if problem or members is None:
            problem = problem or Problem("the tar file was changed while it was read", file=str(job.location))
            members = Members(schema(job.wanted).empty_table(), Tally([problem]), Counter())
        yield members
