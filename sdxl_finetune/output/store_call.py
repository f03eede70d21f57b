"""Uploads to an object store: each in a thread that ends with the run, with the interface of a call of the hub."""

import threading
from pathlib import Path

from sdxl_finetune.storage import Address, StorageError
from sdxl_finetune.storage.folders import remove, upload


class StoreCall:
    """A running upload of a file or folder; without a path, the removal of what stands at the address."""

    def __init__(self, address: Address, path: Path | None) -> None:
        self._address, self._path = address, path
        self._error: Exception | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="upload to a store", daemon=True).start()

    def result(self, seconds: float | None = None) -> None:
        """Waits for the end, at most `seconds`. Raises StorageError or OSError."""
        if not self._ended.wait(seconds):
            self._error = StorageError(self._address, f"not complete within {seconds:g} seconds")
        if self._error:
            raise self._error

    def stop(self) -> None:
        """Ends the wait. `result` then raises StorageError. The thread ends with the process."""
        self._error = StorageError(self._address, "stopped")
        self._ended.set()

    def _run(self) -> None:
        try:
            if self._path:
                upload(self._path, self._address)
            else:
                remove(self._address)
        except (StorageError, OSError) as error:
            self._error = self._error or error
        finally:
            self._ended.set()
