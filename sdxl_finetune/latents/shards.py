"""Shards: files of many records of one shape, written once and never changed, in which records are found by key.

A record is what an encoder made: a latent, or the text encoders' outputs for a caption. All keys and hashes have 16
bytes. A record's cache key stands for all that it depends on besides the encoder (keys.py, captions.py). A shard of
latents also has the hash of the content of each image file, by the hash of the file's `stat`. Therefore known files
need not be read again. A shard on the disk is a .safetensors file whose name starts with the time. If several shards
have the same key, the oldest shard counts, on every process. Damaged and foreign files are named and set aside.
"""

import atexit
import contextlib
import json
import logging
import os
import secrets
import tempfile
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float16, Int64, Shaped, UInt8, UInt32, UInt64
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.files import atomic_path

logger = logging.getLogger(__name__)

TABLES = ("keys", "crcs", "stamps", "digests")
"""Names of the tables in a file: keys, checksums, `stat` hashes and content hashes."""
MAX_BYTES = 128 << 20
"""Largest size of the records in one shard: 128 MiB, which one process writes in seconds."""
LEFT_OVER = 86400
"""Seconds after which an unfinished file is taken for that of a killed process: one day."""
THREADS = 8
"""Threads that read shards at the start; reading is limited by the disk."""
PLACE = np.dtype([("file", "<i4"), ("crc", "<u4"), ("start", "<i8")])
"""Place of a record: number of the file (-1 for none), CRC-32 of its bytes, position of the first byte."""


@dataclass(frozen=True)
class Kind:
    """The meaning of the records in shards, and the encoder that made them. Shards of another kind are never read."""

    name: str
    """`latents` or `text_outputs`: the folder in `cache_dir`, the ending of the files and the name of their tensor."""
    encoder: str
    """Identity of the encoder: a hash of its weights. Empty for records in memory."""

    def folder(self, cache_dir: Path) -> Path:
        """The folder of the shards of this kind."""
        return cache_dir / self.name / self.encoder

    @property
    def ending(self) -> str:
        return f".{self.name}"

    @property
    def format(self) -> str:
        return f"sdxl_finetune {self.name} 1"


@dataclass(frozen=True)
class Shard:
    """The tables of one shard. Its records stay in the file."""

    path: Path
    start: int
    """Position of the first record in the file, in bytes."""
    size: int
    """Size of one record in bytes."""
    keys: UInt8[np.ndarray, "n 16"]
    crcs: UInt32[np.ndarray, " n"]
    stat_hashes: UInt8[np.ndarray, "m 16"]
    contents: UInt8[np.ndarray, "m 16"]
    """Content hashes of the files with these `stat_hashes`."""


class Lookup:
    """Finds rows of a table of hashes, many at once."""

    def __init__(self, hashes: UInt8[np.ndarray, "n 16"]) -> None:
        first_halves = _first_halves(hashes)
        self._hashes = hashes
        self._order = np.argsort(first_halves, kind="stable")
        self._sorted = first_halves[self._order]

    def find(self, hashes: UInt8[np.ndarray, "k 16"]) -> Int64[np.ndarray, " k"]:
        """The first row that equals each hash, or -1."""
        if not len(self._sorted):
            return np.full(len(hashes), -1)
        first_halves, last = _first_halves(hashes), len(self._sorted) - 1
        at = np.searchsorted(self._sorted, first_halves).clip(max=last)
        while True:
            rows = self._order[at]
            is_equal = (self._hashes[rows] == hashes).all(axis=1)
            # Another hash may have the same first half, and then the wanted one may follow it.
            goes_on = ~is_equal & (at < last) & (self._sorted[(at + 1).clip(max=last)] == first_halves)
            if not goes_on.any():
                return np.where(is_equal, rows, -1)
            at = at + goes_on


class Library:
    """Many shards as one: records by key, and content hashes by `stat` hash. Of equal keys the first shard counts."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.files = tuple(shard.path for shard in shards)
        nothing = np.zeros((0, 16), np.uint8)
        places = [np.zeros(0, PLACE)]
        for number, shard in enumerate(shards):
            own = np.zeros(len(shard.keys), PLACE)
            own["file"], own["crc"] = number, shard.crcs
            own["start"] = shard.start + np.arange(len(own)) * shard.size
            places.append(own)
        self._places = np.concatenate(places)
        self._keys = Lookup(np.concatenate([nothing, *(shard.keys for shard in shards)]))
        self._stat_hashes = Lookup(np.concatenate([nothing, *(shard.stat_hashes for shard in shards)]))
        self._contents = np.concatenate([nothing, *(shard.contents for shard in shards)])

    def places(self, keys: UInt8[np.ndarray, "k 16"]) -> Shaped[np.ndarray, " k"]:
        """The PLACE of the record of each key."""
        rows = self._keys.find(keys)
        found = np.full(len(keys), np.array((-1, 0, 0), PLACE))
        found[rows >= 0] = self._places[rows[rows >= 0]]
        return found

    def contents(
        self, stat_hashes: UInt8[np.ndarray, "k 16"]
    ) -> tuple[Int64[np.ndarray, " j"], UInt8[np.ndarray, "j 16"]]:
        """The positions of the known `stat_hashes`, and the content hashes of these."""
        rows = self._stat_hashes.find(stat_hashes)
        known = np.flatnonzero(rows >= 0)
        return known, self._contents[rows[known]]


def open_shards(folder: Path, kind: Kind, *, check: bool) -> list[Shard]:
    """The sound shards of this kind in `folder`, oldest first.

    With `check`, files that have changed since they were last checked are read and compared with their checksums.
    Damaged files are renamed to `.damaged`, with a warning. Only one process at a time may use `check`.
    """
    paths = sorted(folder.glob(f"*{kind.ending}"))
    checked = _load_checked(folder) if check else None
    with ThreadPoolExecutor(THREADS) as pool:
        opened = list(pool.map(partial(_open_shard, kind=kind, checked=checked), paths))
    for path, shard in zip(paths, opened, strict=True):
        if isinstance(shard, str) and check:
            logger.warning("%s: %s; %s, and what it held is encoded again", path, shard, set_aside(path))
    shards = [shard for shard in opened if isinstance(shard, Shard)]
    if check and folder.is_dir():
        remember_checked(folder, shards)
        for unfinished in folder.glob(f".*{kind.ending}.*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - unfinished.stat().st_mtime > LEFT_OVER:
                    unfinished.unlink()
    return shards


def set_aside(path: Path) -> str:
    """Renames a damaged shard to `.damaged`, and says what has become of it. Another process may have renamed it."""
    aside = path.with_suffix(".damaged")
    try:
        path.rename(aside)
    except OSError as error:
        if path.exists():
            return f"the file cannot be renamed ({error.strerror}) and should be deleted"
    return f"the file is renamed to {aside.name}"


def remember_checked(folder: Path, shards: Sequence[Shard]) -> None:
    """Records that these files were checked, with their size and modification time."""
    with contextlib.suppress(OSError), atomic_path(folder / "checked.json") as temporary:
        temporary.write_text(json.dumps({shard.path.name: _state(shard.path) for shard in shards}))


def read_shard(path: Path, kind: Kind) -> Shard:
    """Reads the tables of a shard. Raises ValueError, SafetensorError or OSError for any other or damaged file."""
    with safe_open(path, "numpy") as file:
        about = file.metadata() or {}
        # Shards of latents that were written before there were other kinds name their encoder "vae".
        if about.get("format") != kind.format or about.get("encoder", about.get("vae")) != kind.encoder:
            raise ValueError(f"it holds no {kind.name.replace('_', ' ')} of this encoder")
        tables = [file.get_tensor(name) for name in TABLES]
    if about.get("tables") != _crc_of(tables):
        raise ValueError("its tables are damaged")
    with path.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        records = json.loads(raw.read(length))[kind.name]
    size = int(np.prod(records["shape"][1:])) * 2
    return Shard(path, 8 + length + records["data_offsets"][0], size, *tables)


class ShardWriter:
    """Packs records into shards: files in `folder`, or without a folder, memory that is freed with the process.

    A thread writes a shard while the next one is filled. Leaving the context writes what is left.
    """

    def __init__(self, folder: Path | None, kind: Kind, rank: int, scratch: Path) -> None:
        self.shards: list[Shard] = []
        """The shards that were written."""
        self._folder, self._kind, self._rank = folder, kind, rank
        self._memory = None if folder else nameless_file(scratch)
        self._pool, self._writing = ThreadPoolExecutor(1), Future[None]()
        self._writing.set_result(None)
        self._records: list[tuple[bytes, Float16[np.ndarray, "*shape"]]] = []
        self._files: list[tuple[bytes, bytes]] = []

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_error: object) -> None:
        self.flush()
        self._writing.result()
        self._pool.shutdown()

    def add(self, key: bytes, record: Float16[np.ndarray, "*shape"]) -> None:
        """Adds a record with its cache key."""
        first = self._records[0][1] if self._records else record
        if first.shape != record.shape or (len(self._records) + 1) * record.nbytes > MAX_BYTES:
            self.flush()
        self._records.append((key, record))

    def add_file(self, stat_hash: bytes, content: bytes) -> None:
        """Adds an image file, by the hashes of its `stat` and its content. Its records are added before."""
        self._files.append((stat_hash, content))

    def flush(self) -> None:
        """Writes all that was added as a shard."""
        if self._records or self._files:
            self._writing.result()
            self._writing = self._pool.submit(self._write, self._records, self._files)
            self._records, self._files = [], []

    def _write(self, records: list[tuple[bytes, np.ndarray]], files: list[tuple[bytes, bytes]]) -> None:
        values = np.ascontiguousarray([record for _, record in records] or np.zeros((0, 0)), np.float16)
        crcs = np.array([zlib.crc32(record.data) for record in values], np.uint32)
        tables = [_hashes([key for key, _ in records]), crcs, *(_hashes([pair[i] for pair in files]) for i in (0, 1))]
        if self._folder is None:
            assert self._memory is not None
            start = self._memory.stat().st_size
            with self._memory.open("ab") as memory:
                memory.write(values.data)
            self.shards.append(Shard(self._memory, start, values[:1].nbytes, *tables))
            return
        kind = self._kind
        name = f"{time.time_ns():020d}-{self._rank:05d}-{secrets.token_hex(4)}{kind.ending}"
        about = {"format": kind.format, "encoder": kind.encoder, "tables": _crc_of(tables)}
        try:
            with atomic_path(self._folder / name) as temporary:
                temporary.write_bytes(save({kind.name: values, **dict(zip(TABLES, tables, strict=True))}, about))
        except (OSError, SafetensorError) as error:
            what = kind.name.replace("_", " ")
            message = f"{what} cannot be written ({error}): free space, or set another cache_dir"
            raise UserError(Problem(message, file=str(self._folder))) from None
        self.shards.append(read_shard(self._folder / name, kind))


def nameless_file(scratch: Path) -> Path:
    """Creates an empty file in memory. It lives as long as this process, which can share it with its child processes.

    On systems without such files it is a temporary file in `scratch`.
    """
    if hasattr(os, "memfd_create") and Path("/proc/self/fd").is_dir():
        return Path(f"/proc/{os.getpid()}/fd/{os.memfd_create('latents')}")
    scratch.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(".tmp", ".latents.", scratch)
    os.close(descriptor)
    atexit.register(_unlink, Path(name))
    for path in scratch.glob(".latents.*.tmp"):  # of killed processes, and of those that could not remove them
        if time.time() - path.stat().st_mtime > LEFT_OVER:
            _unlink(path)
    return Path(name)


def _unlink(path: Path) -> None:
    """Removes a file, unless it is mapped on Windows, which removes no mapped file."""
    with contextlib.suppress(OSError):
        path.unlink()


def _open_shard(path: Path, kind: Kind, checked: dict[str, list[int]] | None) -> Shard | str:
    """The shard, or a text that says what is wrong. Records are verified if the file has changed since `checked`."""
    try:
        shard = read_shard(path, kind)
        if checked is not None and checked.get(path.name) != _state(path):
            with path.open("rb") as file:
                file.seek(shard.start)
                if any(zlib.crc32(file.read(shard.size)) != crc for crc in shard.crcs.tolist()):
                    return "its records are damaged"
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        return f"not readable as a shard ({error})"
    return shard


def _load_checked(folder: Path) -> dict[str, list[int]]:
    try:
        return dict(json.loads((folder / "checked.json").read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _state(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ino]


def _crc_of(tables: Sequence[np.ndarray]) -> str:
    return f"{zlib.crc32(b''.join(table.tobytes() for table in tables)):08x}"


def _hashes(values: Sequence[bytes]) -> UInt8[np.ndarray, "n 16"]:
    return np.frombuffer(b"".join(values), np.uint8).reshape(-1, 16)


def _first_halves(hashes: UInt8[np.ndarray, "n 16"]) -> UInt64[np.ndarray, " n"]:
    """The first eight bytes of each hash as a number, which numpy sorts many times faster than 16 bytes of text."""
    return np.ascontiguousarray(hashes[:, :8]).view(np.uint64).ravel()
