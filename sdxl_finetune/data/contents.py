"""The bytes of images, wherever they are: in a file, in a tar file, or in an object store.

Nothing stays open between two reads, so that any process and thread may read any image.
"""

import hashlib
import os
from pathlib import Path

from sdxl_finetune.data.images import ImageError
from sdxl_finetune.files import modified, read_patiently
from sdxl_finetune.storage import Location, StorageError, read_with_stat

READ_PAUSES = (0.5, 2.0, 5.0)
"""Seconds before further attempts to read an image while a network mount is away."""


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
            start, length = (offset, stat[0]) if container else (0, -1)
            data, found = read_patiently(lambda: _read_part(place, start, length), place, READ_PAUSES)
        else:
            data, now_stat = read_with_stat(place, max(offset, 0), stat[0])
            found = now_stat.size, now_stat.version
    except OSError as error:
        raise ImageError(str(path), f"not readable ({error.strerror})") from None
    except StorageError as error:
        raise ImageError(str(path), error.reason) from None
    now_version = container_version(*found) if container else found[1]
    if (container or unchanged) and (len(data), now_version) != stat:
        what = f"{container.name} was changed" if container else "changed"
        raise ImageError(str(path), f"{what} since it was scanned: start again, without skip_cache_check")
    return data


def _read_part(path: Path, start: int, length: int) -> tuple[bytes, tuple[int, int]]:
    """Returns bytes of a file, to its end if `length` is -1, and the size and modification time of the file."""
    with path.open("rb") as file:
        now = os.fstat(file.fileno())
        if start:
            file.seek(start)
        return file.read(length), (now.st_size, modified(now))


def container_version(size: int, version: int) -> int:
    """A 63-bit number that changes if a tar file changes: the `mtime` of its members in the index."""
    digest = hashlib.blake2b(b"%d %d" % (size, version), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def absolute(location: Location) -> Location:
    """A path from the root of the file system. An address is one already."""
    return location.absolute() if isinstance(location, Path) else location
