"""Locks that keep two runs apart. Each names the run that holds it, and the system frees it when that run ends.

A lock is a small file which its holder has locked with `flock`. The kernel frees it however the process ends, and Linux
passes it on to other machines of a network disk. A file that is left over is therefore no lock.
"""

import json
import logging
import os
import socket
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from sdxl_finetune.parsing import parse_json

logger = logging.getLogger(__name__)

MOST_BYTES = 10_000
"""Letters of a lock that are read at most. The file may be anything that somebody has put there."""


class Locked(Exception):
    """Another process holds the lock. The text names its host, its number and the time since which it holds it."""


class Lock:
    """A lock of this process, from `acquire` to `release`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[Any] | None = None

    def acquire(self) -> None:
        """Takes the lock. Raises Locked if another process holds it.

        Without such locks, as on Windows and on some network disks, a warning says that nothing keeps two runs apart.
        """
        try:
            import fcntl
        except ImportError:  # Windows
            return
        while True:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                file = self.path.open("a+", encoding="utf-8")
            except OSError as error:
                self._warn(error)
                return
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with file:
                    raise Locked(_describe(file)) from None
            except OSError as error:
                file.close()
                self._warn(error)
                return
            if self._stands_at_path(file):
                break
            file.close()  # its holder has removed the file since it was opened here
        self._file = file
        with suppress(OSError):  # a full disk: other runs then learn less of this one
            file.truncate(0)
            file.write(json.dumps(_about()))
            file.flush()

    def release(self) -> None:
        """Frees the lock and removes its file. A file that another run has made there since stays."""
        if self._file is None:
            return
        with suppress(OSError):
            if self._stands_at_path(self._file):
                self.path.unlink()
        self._file.close()
        self._file = None

    def _stands_at_path(self, file: IO[Any]) -> bool:
        """True if this file is the one at the lock's path: not removed, and its folder not replaced since."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), self.path.stat())
        except OSError:
            return False

    def _warn(self, error: OSError) -> None:
        logger.warning("%s cannot be locked (%s): make sure that no other run uses it", self.path, error.strerror)


def holder(path: Path) -> str:
    """Names the process that holds the lock at this path; empty if none does."""
    lock = Lock(path)
    try:
        if path.exists():
            lock.acquire()
    except Locked as other:
        return str(other)
    lock.release()
    return ""


def _about() -> dict[str, Any]:
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return {"host": socket.gethostname(), "process": os.getpid(), "since": since}


def _describe(file: IO[Any]) -> str:
    try:
        file.seek(0)
        about = parse_json(file.read(MOST_BYTES))
        return "another run (process {process} on {host}, since {since})".format(**about)
    except (OSError, ValueError, LookupError, TypeError):
        return "another run"
