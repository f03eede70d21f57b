"""Files that exist under their name only when they are whole."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_path(final: Path) -> Iterator[Path]:
    """Yields a temporary path beside `final` (for a file or a directory); on success it is flushed to the disk
    and renamed to `final`, replacing what stood there; on an exception it is removed. Its name ends in `.tmp`,
    so that nothing takes an unfinished file for a checkpoint.
    """
    final = Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    _remove(temporary)
    try:
        yield temporary
        if temporary.is_dir():
            for path in temporary.rglob("*"):
                if path.is_file():
                    _flush(path)
            replaced = final.with_name(f".{final.name}.{os.getpid()}.old.tmp")
            _remove(replaced)
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


def remove_leftovers(folder: Path, is_ours: Callable[[str], bool]) -> list[Path]:
    """Removes what processes that were killed left of files and folders whose names `is_ours`; returns it. What a
    process that still runs is writing stays, and a folder that was just being replaced comes back.
    """
    removed = []
    for path in list(folder.glob(".*.tmp")):
        final, _, process = path.name[1:].removesuffix(".tmp").removesuffix(".old").rpartition(".")
        # Process numbers come again, in containers at once: what bears our own was not made by us.
        if process.isdecimal() and is_ours(final) and (int(process) == os.getpid() or not _runs(int(process))):
            if path.name.endswith(".old.tmp") and not (folder / final).exists():
                path.rename(folder / final)
                continue
            _remove(path)
            removed.append(path)
    return removed


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
