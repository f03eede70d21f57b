"""Parts of objects and of listings: ranges of bytes with the object's version, and one page of names."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdxl_finetune.storage.address import Address, Found, Location, Stat
from sdxl_finetune.storage.objects import RANGE, _attempt, _store, _version, read, stat

BLOCK = 1 << 16
"""Bytes of one request at least: about the header of one image and what stands beside it in a tar file."""
LARGEST_BLOCK = 1 << 22
"""Bytes of one request at most, unless more are asked for. Reading on from block to block doubles the size up to it."""


def read_with_stat(address: Address, start: int, length: int) -> tuple[bytes, Stat]:
    """`length` bytes of an object from position `start`, or fewer at its end, with its size and version.

    Raises StorageError.
    """
    import obstore

    if length == 0:
        return b"", stat(address)
    first = min(length, RANGE)

    def request() -> tuple[bytes, Stat]:
        answer = obstore.get(_store(address.store), address.key, options={"range": (start, start + first)})
        return bytes(answer.bytes()), Stat(answer.meta["size"], _version(answer.meta))

    data, found = _attempt(address, "read", request)
    rest = min(start + length, found.size) - (start + first)
    return (data + read(address, start + first, rest) if rest > 0 else data), found


def list_page(folder: Address, after: str = "") -> list[Found]:
    """The first objects below a folder whose names come behind `after`, by one request. Raises StorageError."""
    import obstore

    prefix = f"{folder.key}/" if folder.key else ""

    def request() -> Sequence[Any] | None:
        offset = prefix + after
        return next(obstore.list(_store(folder.store), prefix or None, chunk_size=1000, offset=offset or None), None)

    page = _attempt(folder, "listed", request)
    found = (one for one in page or () if one["path"].startswith(prefix))
    return [Found(one["size"], _version(one), one["path"][len(prefix) :]) for one in found]


class RangeFile(io.RawIOBase):
    """An object as a file to read, of which only the ranges that are asked for are fetched, in blocks."""

    def __init__(self, address: Address, size: int | None = None) -> None:
        self.address = address
        self.size = stat(address).size if size is None else size
        self._position = 0
        self._start, self._block, self._length = 0, b"", BLOCK

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self.size - self._position)
        size = left if size is None or size < 0 else min(size, left)
        data = self._buffered(size)
        if len(data) < size:
            self._fetch(self._position + len(data), size - len(data))
            data += self._block[: size - len(data)]
        self._position += len(data)
        return data

    def _buffered(self, size: int) -> bytes:
        start = self._position - self._start
        return self._block[start : start + size] if 0 <= start < len(self._block) else b""

    def _fetch(self, start: int, size: int) -> None:
        """Fetches a block from `start`. The blocks become larger as long as little is left out between them."""
        end = self._start + len(self._block)
        self._length = min(2 * self._length, LARGEST_BLOCK) if 0 < end <= start < end + BLOCK else BLOCK
        length = min(max(size, self._length), self.size - start)
        self._start, self._block = start, read(self.address, start, length)


def open_location(location: Location, size: int | None = None) -> io.BufferedReader:
    """Opens a file or an object for reading. The caller closes it. Raises OSError or StorageError.

    The size of an object in bytes is asked for if it is not given.
    """
    return location.open("rb") if isinstance(location, Path) else io.BufferedReader(RangeFile(location, size), BLOCK)
