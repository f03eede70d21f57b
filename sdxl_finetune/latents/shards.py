"""Shards: files of many latents of one shape, written once and never changed, in which latents are found by key.

Keys, digests and stamps are hashes of 16 bytes. A latent's key stands for all that it depends on besides the VAE. A
stamp stands for an image file as the file system describes it, and the shards tell which content (a digest) it had,
so that known files need not be read. A shard on the disk is a .safetensors file whose name begins with the time: of
equal keys the one of the oldest shard counts, on every process. What is damaged or foreign is named and set aside.
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

FORMAT = "sdxl_finetune latents 1"
ENDING = ".latents"
TABLES = ("keys", "crcs", "stamps", "digests")
MAX_BYTES = 128 << 20
"""Latents of one shard."""
LEFT_OVER = 86400
"""Seconds after which an unfinished file is one of a process that was killed."""
THREADS = 8
"""That read shards which have not been read before."""
PLACE = np.dtype([("file", "<i4"), ("crc", "<u4"), ("start", "<i8")])
"""Where a latent lies: which file (-1: none), the CRC-32 of its bytes, the first of them."""


@dataclass(frozen=True)
class Shard:
    """One shard's tables; its latents stay in the file."""

    path: Path
    start: int
    """Byte at which the latents begin."""
    size: int
    """Bytes of one latent."""
    keys: UInt8[np.ndarray, "n 16"]
    crcs: UInt32[np.ndarray, " n"]
    stamps: UInt8[np.ndarray, "m 16"]
    digests: UInt8[np.ndarray, "m 16"]
    """Of the files that had the `stamps`."""


class Lookup:
    """The rows of a table of hashes by their values, many at once."""

    def __init__(self, hashes: UInt8[np.ndarray, "n 16"]) -> None:
        first_halves = _first_halves(hashes)
        self._hashes = hashes
        self._order = np.argsort(first_halves, kind="stable")
        self._sorted = first_halves[self._order]

    def find(self, hashes: UInt8[np.ndarray, "k 16"]) -> Int64[np.ndarray, " k"]:
        """The first row that holds each, -1 where none does."""
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
    """Shards as one: latents by key, contents of files by stamp. The order of the shards decides between equals."""

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
        self._stamps = Lookup(np.concatenate([nothing, *(shard.stamps for shard in shards)]))
        self._digests = np.concatenate([nothing, *(shard.digests for shard in shards)])

    def places(self, keys: UInt8[np.ndarray, "k 16"]) -> Shaped[np.ndarray, " k"]:
        """The PLACE of each latent."""
        rows = self._keys.find(keys)
        found = np.full(len(keys), np.array((-1, 0, 0), PLACE))
        found[rows >= 0] = self._places[rows[rows >= 0]]
        return found

    def contents(self, stamps: UInt8[np.ndarray, "k 16"]) -> tuple[Int64[np.ndarray, " j"], UInt8[np.ndarray, "j 16"]]:
        """Which of the stamps are known, and the digests of those."""
        rows = self._stamps.find(stamps)
        known = np.flatnonzero(rows >= 0)
        return known, self._digests[rows[known]]


def open_shards(folder: Path, vae: str, *, check: bool) -> list[Shard]:
    """The sound shards in `folder` of latents of the VAE with this identity, oldest first.

    With `check`, for one process at a time, latents of files that were not seen as they are before are read and
    compared with their checksums, and files that are not as they should be are renamed to `.damaged`, with a warning.
    """
    paths = sorted(folder.glob(f"*{ENDING}"))
    checked = _load_checked(folder) if check else None
    with ThreadPoolExecutor(THREADS) as pool:
        opened = list(pool.map(partial(_open_shard, vae=vae, checked=checked), paths))
    for path, shard in zip(paths, opened, strict=True):
        if isinstance(shard, str) and check:
            aside = set_aside(path)
            logger.warning("%s: %s; renamed to %s, its images are encoded again", path, shard, aside.name)
    shards = [shard for shard in opened if isinstance(shard, Shard)]
    if check and folder.is_dir():
        remember_checked(folder, shards)
        for unfinished in folder.glob(f".*{ENDING}.*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - unfinished.stat().st_mtime > LEFT_OVER:
                    unfinished.unlink()
    return shards


def set_aside(path: Path) -> Path:
    """Renames a damaged shard, if it is still there; returns the name that it has then."""
    aside = path.with_suffix(".damaged")
    with contextlib.suppress(OSError):
        path.rename(aside)
    return aside


def remember_checked(folder: Path, shards: Sequence[Shard]) -> None:
    """Notes that the latents of these files are sound as the files are."""
    with contextlib.suppress(OSError), atomic_path(folder / "checked.json") as temporary:
        temporary.write_text(json.dumps({shard.path.name: _state(shard.path) for shard in shards}))


def read_shard(path: Path, vae: str) -> Shard:
    """The tables of a file. Raises ValueError, SafetensorError or OSError if it is no shard or a damaged one."""
    with safe_open(path, "numpy") as file:
        about = file.metadata() or {}
        if about.get("format") != FORMAT or about.get("vae") != vae:
            raise ValueError("it holds no latents of this VAE")
        tables = [file.get_tensor(name) for name in TABLES]
    if about.get("tables") != _crc_of(tables):
        raise ValueError("its tables are damaged")
    with path.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        latents = json.loads(raw.read(length))["latents"]
    size = int(np.prod(latents["shape"][1:])) * 2
    return Shard(path, 8 + length + latents["data_offsets"][0], size, *tables)


class ShardWriter:
    """Packs latents into shards: files in `folder` or, without one, memory that is freed with the process.

    A thread writes while the next shard is being filled. Close it (or leave its `with`) to write what is left.
    """

    def __init__(self, folder: Path | None, vae: str, rank: int, scratch: Path) -> None:
        self.shards: list[Shard] = []
        """Those that are written."""
        self._folder, self._vae, self._rank = folder, vae, rank
        self._memory = None if folder else nameless_file(scratch)
        self._pool, self._writing = ThreadPoolExecutor(1), Future[None]()
        self._writing.set_result(None)
        self._latents: list[tuple[bytes, Float16[np.ndarray, "4 h w"]]] = []
        self._files: list[tuple[bytes, bytes]] = []

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_error: object) -> None:
        self.flush()
        self._writing.result()
        self._pool.shutdown()

    def add(self, stamp: bytes, digest: bytes, latents: Sequence[tuple[bytes, Float16[np.ndarray, "4 h w"]]]) -> None:
        """An image file, what it contained, and latents of it by key."""
        for key, latent in latents:
            first = self._latents[0][1] if self._latents else latent
            if first.shape != latent.shape or (len(self._latents) + 1) * latent.nbytes > MAX_BYTES:
                self.flush()
            self._latents.append((key, latent))
        self._files.append((stamp, digest))

    def flush(self) -> None:
        """What was added becomes a shard."""
        if self._latents or self._files:
            self._writing.result()
            self._writing = self._pool.submit(self._write, self._latents, self._files)
            self._latents, self._files = [], []

    def _write(self, latents: list[tuple[bytes, np.ndarray]], files: list[tuple[bytes, bytes]]) -> None:
        values = np.ascontiguousarray([latent for _, latent in latents] or np.zeros((0, 4, 0, 0)), np.float16)
        crcs = np.array([zlib.crc32(latent.data) for latent in values], np.uint32)
        tables = [_hashes([key for key, _ in latents]), crcs, *(_hashes([pair[i] for pair in files]) for i in (0, 1))]
        if self._folder is None:
            assert self._memory is not None
            start = self._memory.stat().st_size
            with self._memory.open("ab") as memory:
                memory.write(values.data)
            self.shards.append(Shard(self._memory, start, values[:1].nbytes, *tables))
            return
        name = f"{time.time_ns():020d}-{self._rank:05d}-{secrets.token_hex(4)}{ENDING}"
        about = {"format": FORMAT, "vae": self._vae, "tables": _crc_of(tables)}
        try:
            with atomic_path(self._folder / name) as temporary:
                temporary.write_bytes(save({"latents": values, **dict(zip(TABLES, tables, strict=True))}, about))
        except (OSError, SafetensorError) as error:
            raise UserError(Problem(f"latents cannot be written ({error})", file=str(self._folder))) from None
        self.shards.append(read_shard(self._folder / name, self._vae))


def nameless_file(scratch: Path) -> Path:
    """An empty file in memory that lives as long as this process, for it and those that it starts; where the system
    has none, a temporary file in `scratch`.
    """
    if hasattr(os, "memfd_create"):
        return Path(f"/proc/{os.getpid()}/fd/{os.memfd_create('latents')}")
    scratch.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(".tmp", ".latents.", scratch)
    os.close(descriptor)
    atexit.register(Path(name).unlink, missing_ok=True)
    return Path(name)


def _open_shard(path: Path, vae: str, checked: dict[str, list[int]] | None) -> Shard | str:
    """The shard, or what is wrong with it; its latents are looked at unless its state is among the `checked`."""
    try:
        shard = read_shard(path, vae)
        if checked is not None and checked.get(path.name) != _state(path):
            with path.open("rb") as file:
                file.seek(shard.start)
                if any(zlib.crc32(file.read(shard.size)) != crc for crc in shard.crcs.tolist()):
                    return "its latents are damaged"
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
