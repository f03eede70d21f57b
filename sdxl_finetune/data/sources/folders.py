"""The files directly in a folder, or directly below an address."""

import os
from collections.abc import Iterator

from sdxl_finetune.files import modified
from sdxl_finetune.storage import Address, Found, Location, list_files


def list_folder(folder: Location) -> Iterator[Found]:
    """Yields the files directly in a folder, without those whose names begin with a dot. A missing folder has none.

    Raises StorageError for an address that cannot be listed.
    """
    if isinstance(folder, Address):
        yield from (found for found in list_files(folder) if "/" not in found.name and found.name[0] != ".")
        return
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name[0] != "." and entry.is_file():
                    stat = entry.stat()
                    yield Found(stat.st_size, modified(stat), entry.name)
    except OSError:
        return
