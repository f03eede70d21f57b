"""Uploads to an object store: each in a thread of its own, with the interface of a call of the hub."""

import threading
from pathlib import Path

from sdxl_finetune.storage import Address, StorageError
from sdxl_finetune.storage.folders import remove, upload


class StoreCall:
    """A running upload of a file or folder; without a path, the removal of what stands at the address.

    No request is made once `result` has returned or raised. The next call may therefore write the same objects.
    """

    def __init__(self, address: Address, path: Path | None) -> None:
        self._address, self._path = address, path
        self._stopped = ""
        self._error: Exception | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="upload to a store", daemon=True).start()

    def result(self, seconds: float | None = None) -> None:
        """Waits for the end. Raises StorageError or OSError.

        After `seconds` the call is stopped. `result` then also waits for the end of the last request, which has a
        timeout of its own.
        """
        if not self._ended.wait(seconds):
            self.stop(f"not complete within {seconds:g} seconds")
            self._ended.wait()
        if self._error:
            raise self._error

    def stop(self, reason: str = "stopped") -> None:
        """Ends the call before its next request. `result` then raises StorageError with the reason."""
        self._stopped = self._stopped or reason

    def _run(self) -> None:
        try:
            if self._path:
                upload(self._path, self._address, self._check)
            else:
                remove(self._address, self._check)
        except (StorageError, OSError) as error:
            self._error = error
        finally:
            self._ended.set()

    def _check(self) -> None:
        if self._stopped:
            raise StorageError(self._address, self._stopped)
