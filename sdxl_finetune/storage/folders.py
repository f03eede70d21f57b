"""Whole files and folders: downloads that are made once, and uploads that count only when they are complete."""

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from sdxl_finetune.files import atomic_path, size_text
from sdxl_finetune.storage.access import delete, list_files, stat, write
from sdxl_finetune.storage.address import Address, Found, StorageError
from sdxl_finetune.storage.copies import locked
from sdxl_finetune.storage.objects import download

logger = logging.getLogger(__name__)

LAST = ("manifest.json", "model_index.json")
"""Names of the files without which a training state or a diffusers folder is incomplete. They are written last."""


def fetch(address: Address, folder: Path) -> Path:
    """Downloads a file, or all files of a folder, into a folder for its version, and returns the path there.

    The next call finds the same version on the disk. Processes that ask for the same address wait for one another.
    Raises StorageError.
    """
    files = files_at(address)
    version = hashlib.blake2b(
        f"{address} {[(one.name, one.size, one.version) for one in files]}".encode(), digest_size=8
    ).hexdigest()
    path = folder / version / address.name
    fetch_to(address, path, files)
    return path


def fetch_to(address: Address, path: Path, files: Sequence[Found] | None = None) -> None:
    """Downloads a file, or all files of a folder, to `path`, unless it exists. Raises StorageError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f".{path.name}.lock")):
            if path.exists():
                return
            files = files_at(address) if files is None else files
            if wrong := [found.name for found in files if not _stays_below(found.name)]:
                raise StorageError(address, f"holds an object whose name leads out of a folder: {wrong[0]!a}")
            size = sum(found.size for found in files)
            logger.info("downloading %s (%s) to %s", address, size_text(size), path)
            with atomic_path(path) as temporary:
                for found in files:
                    download(address / found.name, temporary / found.name if found.name else temporary, found.size)
    except OSError as error:
        raise StorageError(address, f"cannot be downloaded to {path} ({error.strerror})") from None


def _stays_below(name: str) -> bool:
    """True if a file of this name is in the folder to which the name is relative. On Windows, `\\` and `:` lead out."""
    parts = name.split("/")
    return name == "" or not ({"", ".."} & set(parts) or (os.name == "nt" and set(name) & set("\\:")))


def files_at(address: Address) -> list[Found]:
    """The files of a folder by name, or the object itself with an empty name. Raises StorageError if there is none.

    Consoles of stores make a folder as an empty object of its name. Such an object is not a file of the folder above.
    """
    with contextlib.suppress(StorageError):
        found = stat(address)
        return [Found(found.size, found.version, "")]
    files = sorted(list_files(address), key=lambda found: found.name)
    folders = {str(parent) for found in files for parent in PurePosixPath(found.name).parents}
    files = [found for found in files if found.size or found.name not in folders]
    if not files:
        raise StorageError(address, "does not exist", missing=True)
    return files


def upload(path: Path, address: Address, check: Callable[[], None] | None = None) -> None:
    """Writes a file or folder to an address. Of a folder, the file that makes it complete comes last.

    A folder that stands there already is incomplete meanwhile. `check` is called between requests, and ends the upload
    by raising StorageError. Raises StorageError.
    """
    if not path.is_dir():
        write(address, path, check)
        return
    files = sorted(_files(path), key=lambda name: (name in LAST, name))
    for old in list_files(address):
        if old.name in LAST or old.name not in files:
            _delete(address / old.name, check)
    for name in files:
        write(address / name, path / name, check)


def remove(address: Address, check: Callable[[], None] | None = None) -> None:
    """Deletes a file or a folder, and in a folder first what makes it complete. A missing one is no error.

    `check` is called between requests, and ends the removal by raising StorageError. Raises StorageError.
    """
    try:
        files = files_at(address)
    except StorageError as error:
        if error.missing:
            return
        raise
    for found in sorted(files, key=lambda found: (found.name not in LAST, found.name)):
        _delete(address / found.name if found.name else address, check)
    logger.info("removed %s", address)


def _delete(address: Address, check: Callable[[], None] | None) -> None:
    if check:
        check()
    delete(address)


def _files(folder: Path) -> Iterator[str]:
    return (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
