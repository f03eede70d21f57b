"""Files at a location: a local path, or an address in an object store such as `s3://bucket/folder/file`.

Every function takes both kinds of location. An object appears under its address only when it is complete, as a local
file does. Requests are retried; what then still fails is one StorageError, which names the location.

    address     what a location is, and how its text is read
    objects     requests to object stores, with retries
    access      the functions that take any location
    ranges      parts of objects and of listings
    copies      local copies of whole objects, within a size limit
    folders     downloads that are made once, and whole folders
"""

from sdxl_finetune.storage.access import delete, exists, list_files, read, stat, write
from sdxl_finetune.storage.address import Address, Found, Location, Stat, StorageError, naming, parse_location
from sdxl_finetune.storage.copies import LocalCopies
from sdxl_finetune.storage.ranges import list_page, open_location, read_with_stat

__all__ = [
    "Address",
    "Found",
    "LocalCopies",
    "Location",
    "Stat",
    "StorageError",
    "delete",
    "exists",
    "list_files",
    "list_page",
    "naming",
    "open_location",
    "parse_location",
    "read",
    "read_with_stat",
    "stat",
    "write",
]
