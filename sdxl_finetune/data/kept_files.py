"""Removes what the index keeps in `cache_dir` and no run has used for long: indexes, scans, marks and the like.

A file's modification time is the time of its last use (tables.map_table). All of these files can be made again, and a
process that has mapped a file goes on with it. Latents and text encoder outputs are never removed.
"""

import contextlib
import logging
import time
from pathlib import Path

from sdxl_finetune.storage import Address, StorageError, delete, list_files, write

logger = logging.getLogger(__name__)

UNUSED = 90 * 86400.0
"""Seconds without use after which a file is removed: 90 days, longer than a run maps a file without a new process."""
REFRESH = 30 * 86400.0
"""Age in seconds at which an index in a store is written again: 30 days. A store does not note when it is read."""
EVERY = 86400.0
"""Seconds between two searches for such files: one day. A folder may hold 100,000 of them."""
KEPT = (
    *("*.index", "scans/*.scan", "marks/*.marks", "held_out/*.npy", "scores/*.scores", "objects/*.objects"),
    *("mask_files/*.masks", "mask_files/*.objects", "tars/*/*.members", "caption_keys/*.keys.npy"),
    *("scans/*.unusable", "objects/*.unusable", "mask_files/*.unusable"),
)
"""Patterns of the files in `cache_dir` that this program keeps and can make again."""
UNFINISHED = tuple(f"{pattern}.*.tmp" for pattern in KEPT)
"""Patterns of what killed processes leave of such files. The files of five million images have gigabytes."""
STAMP = ".unused_files_removed"
"""File whose modification time is the time of the last search."""


def remove_unused(cache_dir: Path) -> None:
    """Removes the files that were not used for UNUSED seconds, at most once a day, and logs what it removed.

    Ages are differences between times of the file system. The clock of this machine may be wrong, or differ from that
    of the file server.
    """
    stamp = cache_dir / STAMP
    with contextlib.suppress(OSError):
        if abs(time.time() - stamp.stat().st_mtime) < EVERY:  # a stamp of the future is from a wrong clock
            return
    try:
        stamp.touch()
        now = stamp.stat().st_mtime
    except OSError:  # nothing can be removed from this folder
        return
    count, size, kinds = 0, 0, set[str]()
    for pattern in (*KEPT, *UNFINISHED):
        for path in cache_dir.glob(pattern):
            with contextlib.suppress(OSError):  # removed by another process, or mapped on Windows
                status = path.stat()
                if status.st_mtime < now - UNUSED:
                    path.unlink()
                    count, size, kinds = count + 1, size + status.st_size, kinds | {pattern}
    for folder in cache_dir.glob("tars/*"):
        with contextlib.suppress(OSError):
            folder.rmdir()  # removes an empty folder only
    if count:
        message = "%s: removed %d files (%.1f MB) of earlier runs, not used for %d days: %s"
        logger.info(message, cache_dir, count, size / 1e6, UNUSED // 86400, ", ".join(sorted(kinds)))


def publish_index(path: Path, folder: Address) -> None:
    """Writes an index to a folder in an object store, unless it is there, and removes those that no run has used.

    An index there that is older than REFRESH is written again. Raises StorageError if the index cannot be written.
    """
    now = time.time()
    others = {found.name: found.time for found in list_files(folder) if found.name.endswith(".index")}
    if others.pop(path.name, 0.0) < now - REFRESH:
        write(folder / path.name, path)
    old = sorted(name for name, written in others.items() if written < now - UNUSED)
    with contextlib.suppress(StorageError):  # a run may be allowed to write but not to delete
        for name in old:
            delete(folder / name)
        if old:
            logger.info("%s: removed %d indexes that were not used for %d days", folder, len(old), UNUSED // 86400)
