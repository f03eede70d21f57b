"""The bytes of images and metadata files, wherever they are: in a file, in a tar file, or in an object store.

Nothing stays open between two reads, so that any process and thread may read anything.
"""

import hashlib
import io
import os
from pathlib import Path
from typing import BinaryIO

from sdxl_finetune.data.images import ImageError
from sdxl_finetune.storage import Location, StorageError, read, read_versioned, stat

BLOCK = 1 << 16
"""Bytes of one request at least: about the headers of one image and what stands beside it in a tar file."""
LARGEST_BLOCK = 1 << 22
"""Bytes of one request at most, unless more are asked for. Reading on from block to block doubles the size up to it."""


class RangeFile(io.RawIOBase):
    """An object as a file to read, of which only the ranges that are asked for are fetched, in blocks."""

    def __init__(self, location: Location, size: int | None = None) -> None:
        self.location = location
        self.size = stat(location).size if size is None else size
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
        self._length = min(2 * self._length, LARGEST_BLOCK) if end <= start < end + BLOCK and end else BLOCK
        length = min(max(size, self._length), self.size - start)
        self._start, self._block = start, read(self.location, start, length)


def open_location(location: Location, size: int | None = None) -> BinaryIO:
    """Opens a file or an object for reading. The caller closes it. Raises OSError or StorageError.

    The size of an object in bytes is asked for if it is not given.
    """
    return location.open("rb") if isinstance(location, Path) else io.BufferedReader(RangeFile(location, size), BLOCK)


def read_image(
    path: Location, container: Location | None, offset: int, stat: tuple[int, int], *, unchanged: bool
) -> bytes:
    """The bytes of an image: of its own file, or of its tar file `container` at `offset`. Raises ImageError.

    `stat` is its size in bytes, and its modification time or version. Objects and tar files must still have this
    version. A file of its own must have it if `unchanged` is true.
    """
    place = container or path
    try:
        if isinstance(place, Path):
            with place.open("rb") as file:
                now = os.fstat(file.fileno())
                if container:
                    file.seek(offset)
                data = file.read(stat[0]) if container else file.read()
            found = now.st_size, now.st_mtime_ns
        else:
            data, now_stat = read_versioned(place, max(offset, 0), stat[0])
            found = now_stat.size, now_stat.version
    except OSError as error:
        raise ImageError(str(path), f"not readable ({error.strerror})") from None
    except StorageError as error:
        raise ImageError(str(path), str(error)) from None
    now_version = container_version(*found) if container else found[1]
    if (container or unchanged) and (len(data), now_version) != stat:
        what = f"{container.name} was changed" if container else "changed"
        raise ImageError(str(path), f"{what} since it was scanned: start again, without skip_cache_check")
    return data


def container_version(size: int, version: int) -> int:
    """A 63-bit number that changes if a tar file changes: the `mtime` of its members in the index."""
    digest = hashlib.blake2b(b"%d %d" % (size, version), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
