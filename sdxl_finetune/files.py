"""Files that exist under their name only when they are whole."""

import contextlib
import os
import shutil
from collections.abc import Iterator
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
    try:
        yield temporary
        if temporary.is_dir():
            for path in temporary.rglob("*"):
                if path.is_file():
                    _flush(path)
            replaced = final.with_name(f".{final.name}.{os.getpid()}.old.tmp")
            if final.exists():
                final.rename(replaced)
            temporary.rename(final)
            if replaced.is_dir():
                shutil.rmtree(replaced)
        else:
            _flush(temporary)
            temporary.replace(final)
        _flush(final.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
