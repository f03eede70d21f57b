"""Local copies of whole objects that never change, in a folder with a size limit, shared by processes.

A copy appears under its name when it is complete. A lock for each object keeps other processes from sending for the
same object. The copies that were used longest ago are removed first, but none that was used within the last hour. A
run that reads more than the folder may hold would otherwise send for whole objects again and again.
"""

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sdxl_finetune.files import atomic_path
from sdxl_finetune.storage import objects
from sdxl_finetune.storage.address import Address

logger = logging.getLogger(__name__)

IN_USE = 3600.0
"""Seconds after its last use in which a copy is not removed: one hour."""
TOUCH_EVERY = 600.0
"""Seconds between two notes that a copy is in use, which are its modification time."""
ENDING = ".copy"


@dataclass(frozen=True)
class LocalCopies:
    """A folder of copies. A small value that other processes can receive."""

    folder: Path
    limit: int
    """Largest size of all copies in bytes."""

    def path(self, address: Address) -> Path:
        """The place of an object's copy."""
        digest = hashlib.blake2b(str(address.parent).encode(), digest_size=8).hexdigest()
        return self.folder / digest / f"{address.name}{ENDING}"

    def find(self, address: Address) -> Path | None:
        """The copy of an object, after sending for the object if there is no copy.

        Returns None if there is no room. Raises StorageError if the object cannot be read.
        """
        path = self.path(address)
        if path.exists():
            touch(path)
            return path
        size = objects.stat(address).size
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(path.with_name(f".{path.name}.lock")):
                if not path.exists():
                    if not self._make_room(size):
                        return None
                    objects.download(address, path, size)
        except OSError as error:
            logger.warning("%s: no local copy of %s (%s)", self.folder, address, error.strerror)
            return None
        return path

    def keep(self, address: Address, data: bytes) -> None:
        """Keeps a copy of an object that this process has written, if there is room. A failure changes nothing."""
        with contextlib.suppress(OSError):
            if self._make_room(len(data)):
                with atomic_path(self.path(address)) as temporary:
                    temporary.write_bytes(data)

    def drop(self, address: Address) -> None:
        """Removes a damaged copy."""
        with contextlib.suppress(OSError):
            self.path(address).unlink()

    def _make_room(self, size: int) -> bool:
        """Removes the copies that were used longest ago until `size` bytes fit. Returns False if they do not fit."""
        found = []
        for path in self.folder.glob(f"*/*{ENDING}"):
            with contextlib.suppress(OSError):
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        free = self.limit - sum(size for _, size, _ in found)
        for used, other, path in sorted(found):
            if free >= size or used > time.time() - IN_USE:
                break
            with contextlib.suppress(OSError):
                path.unlink()
            free += other
        return free >= size


def touch(path: Path) -> None:
    """Notes that a copy is in use."""
    with contextlib.suppress(OSError):
        os.utime(path)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits until no other process of this machine holds the lock. The system frees the lock of a process that ends."""
    if os.name == "nt":  # two processes may then send for the same object, which does no harm
        yield
        return
    import fcntl

    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        with contextlib.suppress(OSError):
            path.unlink()
