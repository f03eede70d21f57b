"""Records: reading parts of shards, on the disk or in an object store, with their checksums.

Open files are kept, because opening one costs as much as reading a latent. A shard in an object store is read from its
local copy; without one, the record alone is read from the store.
"""

import contextlib
import logging
import time
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from io import FileIO
from pathlib import Path

import numpy as np

from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.files import read_patiently
from sdxl_finetune.latents.catalogue import set_aside
from sdxl_finetune.storage import Address, LocalCopies, Location, StorageError, read
from sdxl_finetune.storage.copies import TOUCH_EVERY, touch

logger = logging.getLogger(__name__)

OPEN_FILES = 128
"""Files that a process keeps open. Systems allow about 1,000, and a run needs others."""
READ_PAUSES = (0.5, 2.0, 8.0, 30.0)
"""Seconds before further attempts to read a record while a network mount is away. A run cannot do without it."""
RETRY_COPY = 60.0
"""Seconds until a shard without a local copy is tried again, after there was no room for it."""


class Records:
    """The records of some files, by number of the file. Other processes receive the names alone, and open the files."""

    def __init__(self, files: tuple[Location, ...], copies: LocalCopies | None) -> None:
        self.files, self._copies = files, copies
        self._open: OrderedDict[int, FileIO] = OrderedDict()
        self._touched: dict[int, float] = {}
        self._without_copy: dict[int, float] = {}

    def __reduce__(self) -> tuple:
        return Records, (self.files, self._copies)

    @cached_property
    def _closer(self) -> weakref.finalize:
        return weakref.finalize(self, _close_all, self._open)

    def read(self, number: int, start: int, crc: int, record: np.ndarray, what: Callable[[], str]) -> None:
        """Fills the contiguous array `record` from position `start` of a file.

        Raises UserError if the record cannot be read or its checksum is not `crc`. `what` describes it for the message.
        """
        data = record.reshape(-1).view(np.uint8).data
        path = self.files[number]
        try:
            file, length = read_patiently(lambda: self._read_file(number, start, data), path, READ_PAUSES)
            if length == len(data) and zlib.crc32(data) == crc:
                return
            if isinstance(path, Address):
                self._read_object(number, path, start, data, was_copy=file is not None)
                if zlib.crc32(data) == crc:
                    return
        except (OSError, StorageError) as error:
            reason = error.reason if isinstance(error, StorageError) else error.strerror
            message = f"{what()} cannot be read ({reason}): start the run again"
            raise UserError(Problem(message, file=str(path))) from None
        self._close(number)
        message = f"{what()} is damaged; {set_aside(path)}: start the run again, which encodes it again"
        raise UserError(Problem(message, file=str(path)))

    def _read_file(self, number: int, start: int, data: memoryview) -> tuple[FileIO | None, int]:
        """Reads a record from a file. Returns the file and the number of bytes; None and 0 without a local copy.

        Raises OSError. The file is then closed, because a network mount that comes back wants it opened again.
        """
        file = self._file(number)
        if file is None:
            return None, 0
        try:
            file.seek(start)
            return file, file.readinto(data) or 0
        except OSError:
            with contextlib.suppress(OSError):
                self._close(number)
            raise

    def _read_object(self, number: int, path: Address, start: int, data: memoryview, *, was_copy: bool) -> None:
        """Reads a record from the store. A copy that was damaged is removed, so that the next read sends for it."""
        if was_copy and self._copies:
            logger.warning("%s: the local copy is damaged and is fetched again", path)
            self._close(number)
            self._copies.drop(path)
        data[:] = read(path, start, len(data))

    def _file(self, number: int) -> FileIO | None:
        """The open file, or None for an object without a local copy."""
        path = self.files[number]
        file = self._open.get(number)
        if file is not None:
            if isinstance(path, Address) and time.monotonic() > self._touched[number] + TOUCH_EVERY:
                self._touch(number, path)
            self._open.move_to_end(number)
            return file
        if isinstance(path, Address):
            local = self._find_copy(number, path)
            if local is None:
                return None
            path = local
        self._closer  # noqa: B018  (closes the files with the last reference to this object)
        while len(self._open) >= OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        self._open[number] = file = FileIO(path, "rb")
        self._touched[number] = time.monotonic()
        return file

    def _close(self, number: int) -> None:
        if file := self._open.pop(number, None):
            file.close()

    def _find_copy(self, number: int, path: Address) -> Path | None:
        if self._copies is None or time.monotonic() < self._without_copy.get(number, 0.0):
            return None
        local = self._copies.find(path)
        if local is None:
            self._without_copy[number] = time.monotonic() + RETRY_COPY
        return local

    def _touch(self, number: int, path: Address) -> None:
        self._touched[number] = time.monotonic()
        if self._copies:
            touch(self._copies.path(path))


def _close_all(files: OrderedDict[int, FileIO]) -> None:
    for file in files.values():
        file.close()
