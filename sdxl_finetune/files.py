"""Atomic writes: a file or folder exists under its final name only when it is complete. Sizes, times and hashes.

Storage may fail at any call: a full disk, a quota, a network mount that is gone. A write that fails leaves what was
there before, and removes its own temporary file as far as the storage still allows it.
"""

import contextlib
import errno
import hashlib
import logging
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import psutil  # type: ignore[import-untyped]

logger = logging.getLogger(__name__)

T = TypeVar("T")

NO_FOLDER_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}
"""Errors of file systems, mostly network mounts, that write no folder to the disk on request."""
STORAGE_FAILURES = {
    getattr(errno, name)
    for name in (
        *("ENOSPC", "EDQUOT", "EROFS", "EIO", "ESTALE", "ENODEV", "ENXIO", "ENOTCONN", "ETIMEDOUT", "EHOSTDOWN"),
        *("EREMOTEIO", "ENOMEDIUM", "EFBIG", "EACCES", "EPERM", "ENFILE", "EMFILE", "ENAMETOOLONG"),
    )
    if hasattr(errno, name)
}
"""Numbers of errors that storage causes, and no mistake in this program."""

PASSING_FAILURES = {
    getattr(errno, name)
    for name in ("EIO", "ESTALE", "ENODEV", "ENXIO", "ENOTCONN", "ETIMEDOUT", "EHOSTDOWN", "EREMOTEIO")
    if hasattr(errno, name)
}
"""Numbers of errors that a network mount gives while it is away."""


@contextlib.contextmanager
def atomic_path(final: Path) -> Iterator[Path]:
    """Yields a temporary path beside `final`, for a file or a folder, and renames it to `final` on success.

    Before the rename, everything is flushed to the disk. The rename replaces what was at `final`. After an exception
    the temporary path is removed, and what was at `final` before is there. The temporary name ends in `.tmp`, so that
    no tool takes an incomplete file for a checkpoint. Machines that share a folder may have processes of the same
    number. Therefore the name also holds a random word.
    """
    final = Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    owner = f"{os.getpid()}-{secrets.token_hex(4)}"
    temporary = final.with_name(f".{final.name}.{owner}.tmp")
    try:
        yield temporary
        if temporary.is_dir():
            for path in temporary.rglob("*"):
                if path.is_file():
                    _flush(path)
            replaced = final.with_name(f".{final.name}.{owner}.old.tmp")
            if final.exists():
                final.rename(replaced)
            try:
                temporary.rename(final)
            except OSError:
                with contextlib.suppress(OSError):  # nothing was replaced, or remove_leftovers gives it back
                    replaced.rename(final)
                raise
            _remove(replaced)
        else:
            _flush(temporary)
            temporary.replace(final)
        _flush_folder(final.parent)
    finally:
        _remove(temporary)


def storage_failure(error: BaseException) -> str | None:
    """Returns in words why storage failed, if storage caused this error, and None for any other error."""
    if not isinstance(error, OSError) or error.errno is None or error.errno not in STORAGE_FAILURES:
        return None
    return error.strerror or os.strerror(error.errno)


def read_patiently(read: Callable[[], T], what: object, pauses: Sequence[float]) -> T:
    """Returns the result of `read`, which is called again after each pause if storage fails in a way that may pass.

    `pauses` are in seconds. `what` names the file for a warning. Raises the OSError of the last attempt, and any other
    error at once.
    """
    for pause in pauses:
        try:
            return read()
        except OSError as error:
            if error.errno not in PASSING_FAILURES:
                raise
            logger.warning("%s cannot be read (%s) and is read again in %g seconds", what, error.strerror, pause)
        time.sleep(pause)
    return read()


def free_bytes(folder: Path) -> float:
    """Returns the bytes that the disk of this folder has free for this user.

    The folder need not exist yet. The number is infinite if the file system does not tell it, as some network mounts.
    """
    try:
        usage = shutil.disk_usage(existing_folder(folder))
    except OSError:
        return math.inf
    return usage.free if usage.total else math.inf


def existing_folder(folder: Path) -> Path:
    """Returns the folder itself if it exists, and else the nearest folder above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def mount_of(folder: Path) -> Path:
    """Returns the place where the file system of this folder is mounted. The folder need not exist yet."""
    resolved = Path(os.path.realpath(folder))
    return next((path for path in (resolved, *resolved.parents) if os.path.ismount(path)), Path(resolved.anchor))


def check_mounted(mount: Path) -> None:
    """Raises OSError if nothing is mounted any more at a place that `mount_of` returned.

    The empty folder that is then left takes files, on a disk where nobody looks for them.
    """
    if not os.path.ismount(mount):
        raise OSError(errno.ENODEV, f"nothing is mounted at {mount} any more")


def is_same_folder(one: Path, other: Path) -> bool:
    """True if two paths are one folder by different spellings, as through `..` or a symbolic link."""
    try:
        return os.path.realpath(one) == os.path.realpath(other) or one.samefile(other)
    except (OSError, ValueError):  # one of them does not exist yet, or is no path
        return False


def auto_v2(path: Path) -> str:
    """Returns the short hash that model sites use: the first ten hex digits of the SHA-256 hash, in upper case."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()[:10].upper()


def remove_leftovers(folder: Path, is_ours: Callable[[str], bool]) -> list[Path]:
    """Removes what killed processes left of files and folders in `folder` whose final names are ours, and returns it.

    Paths that a running process is writing stay. A folder that was being replaced gets its final name back.
    """
    removed = []
    for path in list(folder.glob(".*.tmp")):
        final, _, owner = path.name[1:].removesuffix(".tmp").removesuffix(".old").rpartition(".")
        process = owner.partition("-")[0]
        # Process numbers repeat, in containers almost at once. A path with our own number is not from this process.
        if process.isdecimal() and is_ours(final) and (int(process) == os.getpid() or not _is_running(int(process))):
            if path.name.endswith(".old.tmp") and not (folder / final).exists():
                path.rename(folder / final)
                continue
            _remove(path)
            removed.append(path)
    return removed


def _flush_folder(folder: Path) -> None:
    """Writes the names in a folder to the disk. Windows and some network mounts cannot do this."""
    try:
        if os.name != "nt":
            _flush(folder)
    except OSError as error:
        if error.errno not in NO_FOLDER_FLUSH:
            raise


def is_plain_name(name: object) -> bool:
    """True for the name of a file or folder that leads to no other folder, on any system, and can be printed.

    Names in files of others may be `../name` or `/name`.
    """
    return isinstance(name, str) and name.isprintable() and name not in ("", ".", "..") and not set(name) & set("/\\:")


def _flush(path: Path) -> None:
    """Writes a file or folder to the disk. Windows needs write access to files for this."""
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Removes a file or folder. A failure changes nothing, because the error that came before says more."""
    with contextlib.suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    return psutil.pid_exists(process)  # on Windows, os.kill(process, 0) would be Ctrl-C


def modified(status: os.stat_result) -> int:
    """The modification time in nanoseconds since 1970. A time beyond the year 2262 is that of the largest int64.

    File systems hold later times, which wrong clocks and damaged copies leave. Columns of int64 do not.
    """
    return max(-(1 << 63), min(status.st_mtime_ns, (1 << 63) - 1))


def size_text(count: float) -> str:
    """Returns a number of bytes in the largest unit that fits: "1.5 GiB", "20.0 MiB", "3.0 KiB" or "12 bytes".

    An infinite number, which stands for a size that a file system does not tell, is "unknown".
    """
    if count == math.inf:
        return "unknown"
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"
