"""Shards: files of many records of one shape, written once and never changed, on the disk or in an object store.

A record is what an encoder made: a latent, or the text encoders' outputs for a caption. All keys and hashes have 16
bytes. A record's cache key stands for all that it depends on besides the encoder (keys.py, captions.py). A shard of
latents also has the hash of the content of each image file, by the hash of the file's `stat`. Therefore known files
need not be read again. A shard on the disk is a .safetensors file whose name starts with the time. If several shards
have the same key, the oldest shard counts, on every process. Damaged and foreign files are named and set aside.
"""

import atexit
import contextlib
import math
import os
import secrets
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Float16, UInt8, UInt32
from safetensors import SafetensorError
from safetensors.numpy import save

from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.parsing import parse_json
from sdxl_finetune.storage import Address, LocalCopies, Location, StorageError, read, write

L = TypeVar("L", Path, Address, Location)

TABLES = ("keys", "crcs", "stamps", "digests")
"""Names of the tables in a file: keys, checksums, `stat` hashes and content hashes."""
DTYPES = (np.uint8, np.uint32, np.uint8, np.uint8)
"""Data types of the tables."""
MAX_BYTES = 128 << 20
"""Largest size of the records in one shard: 128 MiB, which one process writes in seconds."""
LEFT_OVER = 86400
"""Seconds after which an unfinished file is taken for that of a killed process: one day."""
FIRST = 1 << 15
"""Bytes of a shard that are read first. They hold its header, and the checksums of up to 8,000 records."""


class NewerShard(ValueError):
    """A newer version of the program has written the shard. It is not damaged and must stay."""


@dataclass(frozen=True)
class Kind:
    """The meaning of the records in shards, and the encoder that made them. Shards of another kind are never read."""

    name: str
    """`latents` or `text_outputs`: the folder in `cache_dir`, the ending of the files and the name of their tensor."""
    encoder: str
    """Identity of the encoder: a hash of its weights. Empty for records in memory."""

    def folder(self, cache_dir: L) -> L:
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

    path: Location
    start: int
    """Position of the first record in the file, in bytes."""
    size: int
    """Size of one record in bytes."""
    keys: UInt8[np.ndarray, "n 16"]
    crcs: UInt32[np.ndarray, " n"]
    stat_hashes: UInt8[np.ndarray, "m 16"]
    contents: UInt8[np.ndarray, "m 16"]
    """Content hashes of the files with these `stat_hashes`."""


def read_shard(path: Location, kind: Kind, size: int, reads: Callable[[int, int], bytes] | None = None) -> Shard:
    """Reads the tables of a shard of `size` bytes, in two reads; `reads` replaces reading from `path`.

    Raises NewerShard, ValueError for any other or damaged file, and StorageError.
    """
    part = reads or (lambda start, length: read(path, start, length))
    head = part(0, min(FIRST, size))
    begin = 8 + int.from_bytes(head[:8], "little")
    if begin > size:
        raise ValueError("it is cut short")
    head += part(len(head), begin - len(head)) if begin > len(head) else b""
    header = parse_json(head[8:begin])
    try:
        about, spans = header["__metadata__"], [tuple(header[name]["data_offsets"]) for name in TABLES]
        records, shapes = header[kind.name], [header[name]["shape"] for name in TABLES]
    except (KeyError, TypeError):
        raise ValueError("it is no shard") from None
    written = str(about.get("format"))
    if written != kind.format and written.rpartition(" ")[0] == kind.format.rpartition(" ")[0]:
        raise NewerShard(f'it has the format "{written}" of a newer version of the program, and is not used')
    # Shards of latents that were written before there were other kinds name their encoder "vae".
    if about.get("format") != kind.format or about.get("encoder", about.get("vae")) != kind.encoder:
        raise ValueError(f"it holds no {kind.name.replace('_', ' ')} of this encoder")
    if begin + max(end for _, end in [*spans, records["data_offsets"]]) != size:
        raise ValueError("it is cut short")
    if records["data_offsets"][1] - records["data_offsets"][0] != 2 * math.prod(records["shape"]):
        raise ValueError("its records are not of the size that it says")
    behind = [span for span in spans if begin + span[1] > len(head)]
    first = min(start for start, _ in behind) if behind else 0
    tail = part(begin + first, max(end for _, end in behind) - first) if behind else b""
    data = [
        tail[start - first : end - first] if (start, end) in behind else head[begin + start : begin + end]
        for start, end in spans
    ]
    tables = [np.frombuffer(one, dtype).reshape(shape) for one, dtype, shape in zip(data, DTYPES, shapes, strict=True)]
    if about.get("tables") != _crc_of(tables):
        raise ValueError("its tables are damaged")
    if [len(table) for table in tables] != [records["shape"][0]] * 2 + [len(tables[3])] * 2:
        raise ValueError("its tables are of different lengths")
    return Shard(path, begin + records["data_offsets"][0], math.prod(records["shape"][1:]) * 2, *tables)


class ShardWriter:
    """Packs records into shards in `folder`, or without a folder, in memory that is freed with the process.

    A thread writes a shard while the next one is filled. Leaving the context writes what is left.
    """

    def __init__(
        self, folder: Location | None, kind: Kind, rank: int, scratch: Path, copies: LocalCopies | None = None
    ) -> None:
        """`copies` keeps a local copy of each shard that is written to an address."""
        self.shards: list[Shard] = []
        """The shards that were written."""
        self._folder, self._kind, self._rank, self._copies = folder, kind, rank, copies
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
        path = self._folder / name
        try:
            data = save({kind.name: values, **dict(zip(TABLES, tables, strict=True))}, about)
            write(path, data)
        except (StorageError, SafetensorError) as error:
            what = kind.name.replace("_", " ")
            reason = error.reason if isinstance(error, StorageError) else f"cannot be written ({error})"
            message = f"{what} {reason}: free space, or set another cache_dir"
            raise UserError(Problem(message, file=str(self._folder))) from None
        if self._copies and isinstance(path, Address):
            self._copies.keep(path, data)
        self.shards.append(read_shard(path, kind, len(data), lambda start, length: data[start : start + length]))


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


def _crc_of(tables: Sequence[np.ndarray]) -> str:
    return f"{zlib.crc32(b''.join(table.tobytes() for table in tables)):08x}"


def _hashes(values: Sequence[bytes]) -> UInt8[np.ndarray, "n 16"]:
    return np.frombuffer(b"".join(values), np.uint8).reshape(-1, 16)
