"""Atomic writes: a file or folder exists under its final name only when it is complete. Sizes, times and hashes."""

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]


@contextlib.contextmanager
def atomic_path(final: Path) -> Iterator[Path]:
    """Yields a temporary path beside `final`, for a file or a folder, and renames it to `final` on success.

    Before the rename, everything is flushed to the disk. The rename replaces what was at `final`. After an exception
    the temporary path is removed. Its name ends in `.tmp`, so that no tool takes an incomplete file for a checkpoint.
    Machines that share a folder may have processes of the same number. Therefore the name also holds a random word.
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
            temporary.rename(final)
            _remove(replaced)
        else:
            _flush(temporary)
            temporary.replace(final)
        _flush(final.parent)
    finally:
        _remove(temporary)


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


def is_plain_name(name: object) -> bool:
    """True for the name of a file or folder that leads to no other folder, on any system, and can be printed.

    Names in files of others may be `../name` or `/name`.
    """
    return isinstance(name, str) and name.isprintable() and name not in ("", ".", "..") and not set(name) & set("/\\:")


def _flush(path: Path) -> None:
    """Writes a file or folder to the disk. Windows cannot do this for folders, and needs write access to files."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
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
    """Returns a number of bytes in the largest unit that fits: "1.5 GiB", "20.0 MiB", "3.0 KiB" or "12 bytes"."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"
