"""Files of a log that grow. A file that cannot be written never stops training.

Records that storage does not take wait in memory, and are written as soon as it takes them again. A file holds whole
records only: what a failed write has left of a record is cut off before the next write.
"""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from sdxl_finetune.files import atomic_path, check_mounted, mount_of

logger = logging.getLogger(__name__)

MOST_WAITING = 64 << 20
"""Bytes of records that wait in memory for storage: 64 MiB, days of scalars. Further records are dropped."""
RETRY_AFTER = 10.0
"""Seconds after a failed write in which `write` does not try again. A full disk then costs one call in this time."""


class LogFile:
    """A file to which whole records are appended. No method raises an error of storage."""

    def __init__(self, path: Path, *, every: float = 0.0) -> None:
        """`every` is the number of seconds for which records are collected; 0 writes each record at once."""
        self._path, self._every, self._mount = path, every, mount_of(path.parent)
        self._descriptor: int | None = None
        self._size: int | None = None
        self._waiting: list[bytes] = []
        self._waiting_bytes = self._dropped = 0
        self._is_failing = False
        self._next_write = time.monotonic()

    def write(self, record: bytes) -> None:
        """Appends a record, now or with later ones."""
        if self._waiting_bytes + len(record) > MOST_WAITING:
            self._dropped += 1
        else:
            self._waiting.append(record)
            self._waiting_bytes += len(record)
        if time.monotonic() >= self._next_write:
            self.flush()

    def flush(self) -> None:
        """Writes all records that wait. A failure is a warning, once until a write succeeds again."""
        try:
            self._append(b"".join(self._waiting))
        except OSError as error:
            self._leave()
            self._next_write = time.monotonic() + RETRY_AFTER
            if not self._is_failing:
                self._is_failing = True
                message = "%s cannot be written (%s): training goes on, and what is missing is written later"
                logger.warning(message, self._path, error.strerror or error)
            return
        self._waiting, self._waiting_bytes = [], 0
        self._next_write = time.monotonic() + self._every
        if self._is_failing:
            self._is_failing = False
            lost = f"; {self._dropped} records were lost, because too many waited" if self._dropped else ""
            self._dropped = 0
            logger.warning("%s is written again%s", self._path, lost)

    def close(self) -> None:
        """Writes all records that wait, and says how many are lost if storage does not take them."""
        self.flush()
        if lost := len(self._waiting) + self._dropped:
            logger.warning("%s: the last %d records are lost, because it cannot be written", self._path, lost)
        self._leave()

    def _append(self, data: bytes) -> None:
        """Appends data to the whole records that the file holds. Raises OSError."""
        if self._descriptor is not None and not self._is_same_file(self._descriptor):
            self._leave()  # deleted, or another file system is mounted there now
        if self._descriptor is None:
            check_mounted(self._mount)  # what is written beneath would be lost, and would cut the file of the disk
            self._path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0)
            self._descriptor = os.open(self._path, flags, 0o666)
            found = os.fstat(self._descriptor).st_size
            self._size = found if self._size is None else min(found, self._size)
            if found > self._size:
                os.ftruncate(self._descriptor, self._size)
            os.lseek(self._descriptor, self._size, os.SEEK_SET)
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        self._size = (self._size or 0) + len(data)

    def _is_same_file(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(self._path.stat(), os.fstat(descriptor))
        except OSError:
            return False

    def _leave(self) -> None:
        """Closes the file, so that the next write opens it again and cuts off an incomplete record."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None


class MessageFile(logging.FileHandler):
    """Appends messages to a file. Messages that storage does not take are in the terminal only, which says so once."""

    def __init__(self, path: Path) -> None:
        self._is_failing = False
        super().__init__(path, encoding="utf-8", errors="backslashreplace", delay=True)
        with contextlib.suppress(OSError):
            self.stream = self._open()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Closes the file, so that the next message opens it again."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        stream, self.stream = self.stream, None
        with contextlib.suppress(OSError):
            if stream is not None:
                stream.close()
        if not self._is_failing:
            self._is_failing = True
            with contextlib.suppress(OSError):
                print(f"{self.baseFilename} cannot be written ({error.strerror or error})", file=sys.stderr)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


@contextlib.contextmanager
def said_if_it_fails(what: object) -> Iterator[None]:
    """Turns an error of storage in the block into a warning about `what`, a part of the log."""
    try:
        yield
    except OSError as error:
        logger.warning("%s cannot be written (%s): training goes on", what, error.strerror or error)


def write_text(path: Path, text: str, mount: Path | None = None) -> None:
    """Writes a small file of the log, complete or not at all. A failure is a warning.

    `mount` is the place where the disk of the log was mounted at the start.
    """
    with said_if_it_fails(path):
        if mount:
            check_mounted(mount)
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
