"""The catalogue of a folder of shards: the tables of all of them in one local file.

A start lists the folder once, and opens only the shards whose size or version is not in the catalogue. Thousands of
shards, on a disk or in an object store, then cost one listing. Damaged and foreign files are named and set aside.
"""

import contextlib
import json
import logging
import time
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdxl_finetune.files import atomic_path
from sdxl_finetune.latents.shards import LEFT_OVER, TABLES, Kind, NewerShard, Shard, read_shard
from sdxl_finetune.parsing import parse_json
from sdxl_finetune.storage import Address, Found, Location, StorageError, delete, list_files

logger = logging.getLogger(__name__)

THREADS = 8
"""Threads that read shards at the start. Reading is limited by the disk or the store."""
VERSION = "shard catalogue 1"
CATALOGUE = "shards.catalogue"
"""Name of the file."""
WIDTHS = {"keys": 16, "crcs": 4, "stamps": 16, "digests": 16}
"""Bytes of a row of each table."""


@dataclass(frozen=True)
class Known:
    """A shard in the catalogue."""

    shard: Shard
    found: Found


@dataclass(frozen=True)
class Shelf:
    """A folder of shards of one kind, and the local file of its catalogue."""

    folder: Location
    kind: Kind
    catalogue: Path

    def open(self, *, check: bool) -> list[Shard]:
        """The sound shards of this kind in the folder, oldest first.

        With `check`, the records of new and changed local files are read and compared with their checksums, damaged
        files are set aside with a warning, and the catalogue is written. Only one process at a time may use `check`.
        Raises StorageError if an object store does not answer.
        """
        listed = sorted(self._listed(), key=lambda found: found.name)
        known = {} if not listed else self._load()
        unknown = [found for found in listed if found.name not in known or known[found.name].found != found]
        sound = _checked_before(self.folder) if check and unknown else {}
        with ThreadPoolExecutor(THREADS) as pool:
            opened = pool.map(
                lambda found: self._open(found, check and sound.get(found.name, [])[:2] != [found.size, found.version]),
                unknown,
            )
            new = {found.name: shard for found, shard in zip(unknown, opened, strict=True)}
        for name, shard in new.items():
            if isinstance(shard, str) and check:
                path = self.folder / name
                logger.warning("%s: %s; %s, and what it held is encoded again", path, shard, set_aside(path))
        entries = []
        for found in listed:
            entry = new[found.name] if found.name in new else known[found.name]
            if isinstance(entry, Shard):
                entry = Known(entry, found)
            if isinstance(entry, Known):
                entries.append(entry)
        if check:
            if unknown or len(known) != len(entries):
                self._write(entries)
            self._remove_leftovers()
        return [entry.shard for entry in entries]

    def remember(self, shards: Iterable[Shard]) -> None:
        """Writes the catalogue of these shards, which were just opened or written."""
        listed = {found.name: found for found in self._listed()}
        self._write([Known(shard, listed[shard.path.name]) for shard in shards if shard.path.name in listed])

    def sees(self, shards: Iterable[Shard]) -> bool:
        """True if this process finds these shards in the folder."""
        return {found.name for found in self._listed()} >= {shard.path.name for shard in shards}

    def _listed(self) -> list[Found]:
        return [
            found
            for found in list_files(self.folder)
            if found.name.endswith(self.kind.ending) and "/" not in found.name and not found.name.startswith(".")
        ]

    def _open(self, found: Found, check: bool) -> Shard | str | None:
        """The shard, a text that says what is wrong with it, or None for a shard of a newer version."""
        path = self.folder / found.name
        try:
            shard = read_shard(path, self.kind, found.size)
            if check and isinstance(path, Path) and not _is_sound(path, shard):
                return "its records are damaged"
        except StorageError as error:
            if isinstance(path, Address) and not error.missing:
                raise
            return f"not readable as a shard ({error.reason})"
        except NewerShard as error:
            logger.warning("%s: %s", path, error)
            return None
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError, OSError) as error:
            return f"not readable as a shard ({error})"
        return shard

    def _remove_leftovers(self) -> None:
        if isinstance(self.folder, Path):
            for unfinished in self.folder.glob(f".*{self.kind.ending}.*.tmp"):
                with contextlib.suppress(OSError):
                    if time.time() - unfinished.stat().st_mtime > LEFT_OVER:
                        unfinished.unlink()

    def _write(self, entries: Sequence[Known]) -> None:
        """Writes the catalogue. A failure costs time at the next start, and nothing else."""
        rows = []
        for shard, found in ((entry.shard, entry.found) for entry in entries):
            counts = len(shard.keys), len(shard.contents)
            rows.append([found.name, found.size, found.version, shard.start, shard.size, *counts])
        crc = 0
        if not entries and not self.catalogue.exists():
            return
        with contextlib.suppress(OSError), atomic_path(self.catalogue) as temporary, temporary.open("wb") as file:
            for name in TABLES:
                for entry in entries:
                    data = _table(entry.shard, name).tobytes()
                    crc = zlib.crc32(data, crc)
                    file.write(data)
            about = json.dumps({"version": VERSION, "kind": self.kind.format, "shards": rows}).encode()
            file.write(about)
            file.write(len(about).to_bytes(8, "little") + zlib.crc32(about, crc).to_bytes(4, "little"))

    def _load(self) -> dict[str, Known]:
        """The shards of the catalogue by name; none if it is missing or damaged."""
        try:
            data = np.fromfile(self.catalogue, np.uint8)
            end = len(data) - 12
            size, crc = (int.from_bytes(data[a:b].tobytes(), "little") for a, b in ((end, end + 8), (end + 8, None)))
            about = parse_json(data[end - size : end].tobytes())
            if about["version"] != VERSION or about["kind"] != self.kind.format or zlib.crc32(data[:end].data) != crc:
                return {}
            return dict(self._split(data, about["shards"]))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError):
            return {}

    def _split(self, data: np.ndarray, rows: list[list]) -> Iterable[tuple[str, Known]]:
        counts = {"keys": 5, "crcs": 5, "stamps": 6, "digests": 6}
        at, total = {}, 0
        for table in TABLES:
            at[table] = total
            total += WIDTHS[table] * sum(row[counts[table]] for row in rows)
        for row in rows:
            name, size, version, start, record = row[:5]
            tables = []
            for table in TABLES:
                count = row[counts[table]]
                part = data[at[table] : at[table] + WIDTHS[table] * count]
                at[table] += WIDTHS[table] * count
                tables.append(part.view(np.uint32) if table == "crcs" else part.reshape(-1, 16))
            yield name, Known(Shard(self.folder / name, start, record, *tables), Found(size, version, name))


def local_shelf(folder: Path, kind: Kind) -> Shelf:
    """The shards of a local folder, with their catalogue among them."""
    return Shelf(folder, kind, folder / CATALOGUE)


def set_aside(path: Location) -> str:
    """Renames a damaged shard to `.damaged`, and says what has become of it. Another process may have renamed it.

    A damaged object is deleted.
    """
    if isinstance(path, Address):
        try:
            delete(path)
        except StorageError as error:
            return f"the object cannot be deleted ({error.reason}) and should be"
        return "the object is deleted"
    aside = path.with_suffix(".damaged")
    try:
        path.rename(aside)
    except OSError as error:
        if path.exists():
            return f"the file cannot be renamed ({error.strerror}) and should be deleted"
    return f"the file is renamed to {aside.name}"


def _is_sound(path: Path, shard: Shard) -> bool:
    """True if all records of the shard have their checksums."""
    with path.open("rb") as file:
        file.seek(shard.start)
        return all(zlib.crc32(file.read(shard.size)) == crc for crc in shard.crcs.tolist())


def _table(shard: Shard, name: str) -> np.ndarray:
    return {"keys": shard.keys, "crcs": shard.crcs, "stamps": shard.stat_hashes, "digests": shard.contents}[name]


def _checked_before(folder: Location) -> dict[str, list[int]]:
    """Size and modification time of the files that a version without catalogues has checked, by name."""
    try:
        return {} if isinstance(folder, Address) else dict(parse_json((folder / "checked.json").read_text()))
    except (OSError, ValueError, TypeError):
        return {}
