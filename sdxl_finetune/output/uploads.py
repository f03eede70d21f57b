"""Uploads of saved checkpoints and training states, beside the training: to the Hugging Face hub, and to `output_dir`
if it is an address in an object store.

One thread takes the waiting uploads in turn. A failed upload is tried again after a while and at the next save, and
never stops the training. The waiting uploads are kept in a file, so that the next run goes on with them. A file that a
run wants to delete before its upload is complete is deleted after it, unless the disk gets full.
"""

import json
import logging
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sdxl_finetune.config import HubOptions
from sdxl_finetune.errors import counted
from sdxl_finetune.files import atomic_path, free_bytes, is_plain_name
from sdxl_finetune.output.hub import HubCall, HubError, target
from sdxl_finetune.output.store_call import StoreCall
from sdxl_finetune.parsing import parse_json
from sdxl_finetune.runtime.signals import Interrupt, StopRequest
from sdxl_finetune.storage import Address, StorageError

logger = logging.getLogger(__name__)

SUFFIX = "-uploads.json"
"""Ending of the file of waiting uploads, after the name of the final checkpoint."""
RETRY_AFTER = (15.0, 60.0, 300.0, 900.0)
"""Seconds until the next attempt, after one, two, three and more failures in a row."""
HANGING, CRAWLING = 3600.0, 1 << 18
"""Seconds after which an attempt is given up, and one second more for each so many bytes. Connections can hang."""
LAST_RETRY_AFTER = 3.0
"""Seconds between the attempts at the end of a run."""
LAST_ATTEMPTS = 2
"""Attempts for each upload at the end of a run. A hub that does not answer then holds up the end for seconds only."""
LAST_WAIT, SLOWEST = 600.0, 2 << 20
"""Seconds that the end of a run waits for uploads, and one second more for each so many bytes."""
STOPPED_WAIT = 20.0
"""Seconds that a stopped run waits for uploads to the hub. Nothing but a resume from the hub needs them sooner."""
CLOSE_WAIT = 3.0
"""Seconds in which the current upload can delete the parts that it has sent. It ends with the process in any case."""
SAVE_WAIT = 120.0
"""Seconds that a save waits with `async_upload = false`. Other ranks wait too, and give up after minutes."""


@dataclass(kw_only=True, eq=False)
class Upload:
    """A file or folder that waits for its upload to the hub, or to an address."""

    name: str
    """Name in the local folder of saved files."""
    repo_id: str = ""
    repo_type: str = "model"
    private: bool = True
    path_in_repo: str = ""
    address: str = ""
    """Place in an object store; empty for an upload to the hub."""
    remove: bool = False
    """True if the run has replaced the file, so that it is deleted after the upload."""
    gone: bool = False
    """True to remove what was uploaded to the address. This waits until all uploads are complete."""
    failures: int = 0
    """Failed attempts of this run."""

    def command(self, path: Path) -> str:
        """The command that uploads the file by hand."""
        if self.address:
            sync = ["aws", "s3", "cp", str(path), self.address, *(["--recursive"] if path.is_dir() else [])]
            return shlex.join(sync)
        words = ["hf", "upload", self.repo_id, str(path), self.path_in_repo]
        words += ["--repo-type", self.repo_type] if self.repo_type != "model" else []
        words += ["--private"] if self.private else []
        return shlex.join(words)

    @property
    def place(self) -> str:
        """The place that the file is uploaded to, for messages."""
        return self.address or f"{self.repo_id}/{self.path_in_repo}"


class Uploads:
    """The uploads of one run. Without a place to upload to, files are deleted at once."""

    def __init__(
        self,
        options: HubOptions,
        directory: Path,
        name: str,
        delete: Callable[[Path], None],
        *,
        rank: int = 0,
        address: Address | None = None,
    ) -> None:
        """`directory` holds the saved files, `name` is the name of the final checkpoint. `delete` deletes a path.

        `address` is the place in an object store to which everything saved is uploaded. Only the first rank uploads.
        """
        self._options, self._directory, self._delete, self._address = options, directory, delete, address
        self._list = directory / f"{name}{SUFFIX}"
        self._has_place = options.huggingface_repo_id is not None or address is not None
        self._active = self._has_place and rank == 0
        self._changed = threading.Condition()
        self._waiting: list[Upload] = self._load() if self._active else []
        self._call: HubCall | StoreCall | None = None
        self._current: Upload | None = None
        self._retry_at = 0.0
        self._failures = 0
        self._warned = ""
        self._ending = self._stopped = self._closed = False
        self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)

    def give_up_replaced(self, saved_at: Mapping[str, float]) -> None:
        """Gives up what an earlier run left to do at an address, if another machine has saved the same name since.

        `saved_at` is the time of each save in the object store. Call this before `start`.
        """
        for upload in [upload for upload in self._waiting if upload.address]:
            path = self._list if upload.gone else self._directory / upload.name
            if path.exists() and saved_at.get(upload.name, 0.0) > path.stat().st_mtime:
                logger.info("%s was saved later by another machine and is left as it is", upload.address)
                self._waiting.remove(upload)
                self._write()

    def start(self) -> None:
        """Starts uploading, beginning with the uploads that an earlier run left."""
        if self._active:
            self._thread.start()

    def add(self, path: Path, *, to_hub: bool = True) -> None:
        """Uploads a saved file or folder as soon as possible. Earlier failures are tried again."""
        new = []
        if self._active and self._address:
            new.append(Upload(name=path.name, address=str(self._address / path.name)))
        if self._active and to_hub and self._options.huggingface_repo_id:
            folder = (self._options.huggingface_path_in_repo or "").strip("/")
            new.append(
                Upload(name=path.name, path_in_repo=f"{folder}/{path.name}".lstrip("/"), **target(self._options))
            )
        if not new:
            return
        with self._changed:
            self._waiting = [*(other for other in self._waiting if other.name != path.name), *new]
            self._retry_at = 0.0
            self._write()
            self._changed.notify_all()
            if self._options.async_upload is False:
                arrived = lambda: all(upload not in self._waiting or upload.failures > 0 for upload in new)  # noqa: E731
                self._changed.wait_for(arrived, SAVE_WAIT)

    def remove(self, path: Path) -> None:
        """Deletes a file or folder, or if it waits for its upload, has it deleted after the upload."""
        with self._changed:
            if waiting := [upload for upload in self._waiting if upload.name == path.name]:
                for upload in waiting:
                    upload.remove = True
                self._write()
                self._make_room(path)
            else:
                self._remove(path.name)

    def finish(self, stop: StopRequest | None, *, complete: bool) -> None:
        """Waits for the waiting uploads for a limited time, and says which ones are missing and how to upload them.

        `complete` is False for a run that was stopped. Its newest save is then uploaded first. A stop request ends the
        wait. The other ranks on the machine of the first rank wait too, because a launcher kills all processes on a
        machine as soon as one of them has failed.
        """
        if not complete and self._has_place and not self._active:
            self._wait_for_first_rank(stop)
        if not self._active:
            return
        with self._changed:
            for upload in self._waiting:
                upload.failures = 0
            self._ending, self._stopped, self._retry_at = True, not complete, 0.0
            self._changed.notify_all()
            seconds, size = self._patience(self._waiting, stop, complete=complete)
            if self._waiting:
                message = "waiting at most %d seconds for %s (%.1f GB); Ctrl-C ends the wait"
                logger.info(message, seconds, counted(len(self._waiting), "upload"), size / 1e9)
            before, deadline = stop.number if stop else None, time.monotonic() + seconds
            while self._is_hopeful() and time.monotonic() < deadline and (stop.number if stop else None) == before:
                self._changed.wait(0.2)

    def _patience(self, waiting: list[Upload], stop: StopRequest | None, *, complete: bool) -> tuple[float, int]:
        """Seconds that the end of a run waits for these uploads, and their bytes.

        A stopped run waits as long for an object store as a complete one, because another machine may resume from
        there. The launcher may allow less.
        """
        size = sum(_size(self._directory / upload.name) for upload in waiting)
        seconds = LAST_WAIT + size / SLOWEST
        if not complete:
            seconds = seconds if self._address else STOPPED_WAIT
            seconds = min(seconds, stop.seconds_left() if stop else seconds)
        return seconds, size

    def _wait_for_first_rank(self, stop: StopRequest | None) -> None:
        """Waits until the first rank has made its uploads. The first rank keeps their list in the shared folder."""
        seconds, _ = self._patience(self._load(), stop, complete=False)
        deadline = time.monotonic() + seconds + CLOSE_WAIT
        while self._list.exists() and time.monotonic() < deadline:
            time.sleep(0.2)

    def close(self) -> None:
        """Ends the current upload, and logs what is missing on the hub."""
        if not self._active:
            return
        with self._changed:
            self._closed = True
            if self._call:
                self._call.stop()
            self._changed.notify_all()
        self._thread.join(CLOSE_WAIT)
        if missing := [upload for upload in self._waiting if not upload.gone]:
            commands = "\n".join(f"  {upload.command(self._directory / upload.name)}" for upload in missing)
            message = "not uploaded: %s. The next run with this config uploads them; by hand:\n%s"
            logger.warning(message, ", ".join(upload.name for upload in missing), commands)

    def _is_hopeful(self) -> bool:
        return any(upload.failures < LAST_ATTEMPTS for upload in self._waiting)

    def _work(self) -> None:
        while upload := self._next():
            path = self._directory / upload.name
            before, error = _identity(path), None
            try:
                self._call = self._start(upload, path)
                if self._closed:
                    self._call.stop()
                self._call.result(HANGING + _size(path) / CRAWLING)
            except (HubError, StorageError, OSError) as failure:
                error = failure
            with self._changed:
                self._call = self._current = None
                if upload in self._waiting and not (error and self._closed):
                    self._note(upload, error, is_unchanged=_identity(path) == before)
                self._changed.notify_all()

    def _start(self, upload: Upload, path: Path) -> "HubCall | StoreCall":
        if upload.address:
            return StoreCall(Address(upload.address), None if upload.gone else path)
        return HubCall("upload", self._options.huggingface_token, path=str(path.absolute()), **_request(upload))

    def _remove(self, name: str) -> None:
        """Deletes a saved file that nothing waits for, here and in the object store."""
        self._delete(self._directory / name)
        if self._active and self._address:
            self._waiting.append(Upload(name=name, address=str(self._address / name), gone=True))
            self._write()
            self._changed.notify_all()

    def _next(self) -> Upload | None:
        """Waits for the next upload that is due, and returns it; None when the uploads are closed."""
        with self._changed:
            while not self._closed:
                for upload in [
                    upload
                    for upload in self._waiting
                    if not upload.gone and _identity(self._directory / upload.name) is None
                ]:
                    logger.warning("%s cannot be uploaded, because it does not exist any more", upload.name)
                    self._waiting.remove(upload)
                    self._write()
                pause = self._retry_at - time.monotonic()
                if self._waiting and pause <= 0 and (self._is_hopeful() or not self._ending):
                    in_order = self._waiting[::-1] if self._stopped else self._waiting
                    self._current = min(in_order, key=lambda upload: (upload.gone, upload.failures))
                    return self._current
                self._changed.wait(pause if self._waiting and pause > 0 else None)
            return None

    def _note(self, upload: Upload, error: Exception | None, *, is_unchanged: bool) -> None:
        """Notes the outcome of an attempt. A file that was saved again during its upload is uploaded again."""
        if error is None:
            self._failures, self._warned = 0, ""
            if is_unchanged:
                self._waiting.remove(upload)
                self._write()
                if not upload.gone:
                    logger.info("uploaded %s to %s", upload.name, upload.place)
                if upload.remove and all(other.name != upload.name for other in self._waiting):
                    self._remove(upload.name)
            return
        upload.failures += 1
        self._failures += 1
        delay = RETRY_AFTER[min(self._failures, len(RETRY_AFTER)) - 1]
        self._retry_at = time.monotonic() + (LAST_RETRY_AFTER if self._ending else delay)
        kind = error.kind if isinstance(error, HubError) else getattr(error, "reason", str(error))
        if kind != self._warned:
            self._warned = kind
            place = upload.address or upload.repo_id
            logger.warning("%s was not uploaded to %s: %s. It is tried again", upload.name, place, error)

    def _make_room(self, path: Path) -> None:
        """Gives up the oldest replaced uploads if the disk has no room for two more files of this size."""
        needed = 2 * _size(path)
        for upload in [upload for upload in self._waiting if upload.remove]:
            if free_bytes(self._directory) >= needed:
                return
            logger.warning("%s is deleted before its upload, because the disk is nearly full", upload.name)
            self._waiting.remove(upload)
            self._write()
            if self._call and self._current is upload:
                self._call.stop()
            if all(other.name != upload.name for other in self._waiting):
                self._remove(upload.name)

    def _load(self) -> list[Upload]:
        try:
            uploads = [Upload(**values) for values in parse_json(self._list.read_text(encoding="utf-8"))]
            if wrong := [upload.name for upload in uploads if not is_plain_name(upload.name)]:
                raise ValueError(f"{wrong[0]!r} is no name of a saved file")
            return uploads
        except FileNotFoundError:
            return []
        except (OSError, ValueError, TypeError) as error:
            logger.warning("%s cannot be read (%s): uploads that an earlier run left are not made", self._list, error)
            return []

    def _write(self) -> None:
        try:
            if self._waiting:
                values = [asdict(replace(upload, failures=0)) for upload in self._waiting]
                with atomic_path(self._list) as temporary:
                    temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
            else:
                self._list.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s cannot be written: %s", self._list, error.strerror)


@contextmanager
def open_uploads(uploads: Uploads, stop: StopRequest | None) -> Iterator[Uploads]:
    """Within the context the uploads run. At its end the run waits for them, for a shorter time if it was stopped.

    A run that failed does not wait. The next run goes on with its uploads.
    """
    uploads.start()
    try:
        yield uploads
    except Interrupt:
        uploads.finish(stop, complete=False)
        raise
    else:
        uploads.finish(stop, complete=True)
    finally:
        uploads.close()


def _request(upload: Upload) -> dict[str, Any]:
    names = ("repo_id", "repo_type", "private", "path_in_repo")
    return {name: getattr(upload, name) for name in names}


def _files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


def _size(path: Path) -> int:
    """Bytes of a file, or of all files of a folder; 0 if it does not exist or cannot be looked at."""
    try:
        return sum(file.stat().st_size for file in _files(path) if file.exists())
    except OSError:
        return 0


def _identity(path: Path) -> tuple[int, int] | None:
    """Number and time of a file or folder, which change when it is saved again; None if it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns
