"""Read, write, list and delete at any location."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from sdxl_finetune.files import atomic_path, modified
from sdxl_finetune.storage import objects
from sdxl_finetune.storage.address import Address, Found, Location, Stat, StorageError


def read(location: Location, start: int = 0, length: int | None = None) -> bytes:
    """Bytes of a file from position `start`: `length` bytes, or all that follow.

    Raises StorageError, also if the file ends before.
    """
    if isinstance(location, Address):
        if length is None:
            length = objects.stat(location).size - start if start else None
        return objects.read_all(location) if length is None else objects.read(location, start, length)
    try:
        with location.open("rb", buffering=0) as file:
            file.seek(start)
            data = file.read(-1 if length is None else length)
    except OSError as error:
        raise _local_error(location, "read", error) from None
    if length is not None and len(data) != length:
        raise StorageError(location, f"ends after {start + len(data)} bytes, of {start + length} expected")
    return data


def stat(location: Location) -> Stat:
    """Size and version of a file. Raises StorageError, with `missing` set if there is none."""
    if isinstance(location, Address):
        return objects.stat(location)
    try:
        found = location.stat()
    except OSError as error:
        raise _local_error(location, "read", error) from None
    return Stat(found.st_size, modified(found))


def exists(location: Location) -> bool:
    """True if there is a file at this location. A folder of objects is no file."""
    if not isinstance(location, Address):
        return location.exists()
    try:
        objects.stat(location)
    except StorageError as error:
        if error.missing:
            return False
        raise
    return True


def list_files(folder: Location) -> Iterator[Found]:
    """Yields all files in a folder and in its subfolders, in any order. A missing folder holds no files.

    A file that goes away meanwhile is left out, as a temporary file that another process renames.
    """
    if isinstance(folder, Address):
        yield from objects.list_files(folder)
        return
    try:
        for found in _walk(folder):
            try:
                entry = found.stat()
            except FileNotFoundError:
                continue
            name = os.path.relpath(found.path, folder).replace(os.sep, "/")
            yield Found(entry.st_size, modified(entry), name, entry.st_mtime)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _local_error(folder, "listed", error) from None


def write(location: Location, data: bytes | Path, check: Callable[[], None] | None = None) -> None:
    """Writes a file from memory or from another file. It appears when it is complete, and replaces an older one.

    At an address, `check` is called before each part, and ends the write by raising StorageError.
    """
    if isinstance(location, Address):
        objects.write(location, data, check)
        return
    try:
        with atomic_path(location) as temporary:
            if isinstance(data, Path):
                shutil.copyfile(data, temporary)
            else:
                temporary.write_bytes(data)
    except OSError as error:
        raise _local_error(location, "written", error) from None


def delete(location: Location) -> None:
    """Deletes a file. A missing file is no error."""
    if isinstance(location, Address):
        objects.delete(location)
        return
    try:
        location.unlink(missing_ok=True)
    except OSError as error:
        raise _local_error(location, "deleted", error) from None


def _walk(folder: Path) -> Iterator["os.DirEntry[str]"]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                with contextlib.suppress(FileNotFoundError):
                    yield from _walk(Path(entry.path))
            else:
                yield entry


def _local_error(location: Path, done: str, error: OSError) -> StorageError:
    reason = error.strerror or type(error).__name__
    return StorageError(location, f"cannot be {done} ({reason})", missing=isinstance(error, FileNotFoundError))
