"""Locations: local paths and addresses of objects, what is known about a file there, and the error of a failed access.

An address never holds credentials. They come from the environment, and error messages are built from known parts only.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NoReturn, TypeAlias

from sdxl_finetune.errors import Problem, UserError

SCHEMES = {"s3": "s3", "s3a": "s3", "gs": "gs", "az": "az", "abfs": "az", "http": "http", "https": "https"}
"""Schemes of addresses, each with the scheme that it is read as."""
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)


class Address(PurePosixPath):
    """The address of an object, or of a folder of objects: `s3://bucket/key`.

    `/`, `.name`, `.suffix`, `.parent` and `.with_name` work as for a path. Functions for local files refuse it.
    """

    __slots__ = ()

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)

    def __fspath__(self) -> NoReturn:
        raise TypeError(f"{self} is no local file")

    @property
    def store(self) -> str:
        """Scheme and bucket, as `s3://bucket`. For http, scheme and host."""
        return "://".join([self.parts[0][:-1], self.parts[1]])

    @property
    def key(self) -> str:
        """The name in the bucket, without a slash at its start."""
        return "/".join(self.parts[2:])


Location: TypeAlias = Path | Address


@dataclass(frozen=True, slots=True)
class Stat:
    """Size and version of a file."""

    size: int
    """Bytes."""
    version: int
    """Another number for other contents, below 2**63: modification time in ns, or for an object a hash of its ETag."""


@dataclass(frozen=True, slots=True)
class Found(Stat):
    """A file that a listing found."""

    name: str
    """Path relative to the listed folder, with `/` between parts."""
    time: float = field(default=0.0, compare=False)
    """Modification time in seconds since 1970."""


class StorageError(UserError):
    """A file at a location cannot be read or written, after all retries."""

    def __init__(self, location: Location, reason: str, *, missing: bool = False) -> None:
        super().__init__(Problem(reason, file=str(location)))
        self.location, self.reason = location, reason
        self.missing = missing
        """True if there is no such object."""

    def __reduce__(self) -> tuple:
        return _storage_error, (self.location, self.reason, self.missing)


@contextlib.contextmanager
def naming(option: str) -> Iterator[None]:
    """Gives the name of an option to a StorageError on the file that the option names: `option = address: reason`."""
    try:
        yield
    except StorageError as error:
        raise UserError(Problem(error.reason, key=option, value=str(error.location))) from None


def _storage_error(location: Location, reason: str, missing: bool) -> StorageError:
    return StorageError(location, reason, missing=missing)


def parse_location(text: str) -> Location:
    """Returns the Address of a text such as `s3://bucket/folder`, and the Path of any other text.

    Raises ValueError with what is wrong, without the text itself, which may hold a password.
    """
    found = SCHEME.fullmatch(text)
    if not found:
        return Path(text)
    scheme, rest = SCHEMES.get(found[1].lower()), found[2]
    if scheme is None:
        raise ValueError(f"addresses start with {', '.join(f'{name}://' for name in dict.fromkeys(SCHEMES.values()))}")
    bucket = rest.partition("/")[0]
    if not bucket or {".", ".."} & set(rest.split("/")):
        raise ValueError(f"an address is {scheme}://bucket/folder, without . and ..")
    if "@" in bucket or (scheme in ("http", "https") and "?" in rest):
        raise ValueError("an address holds no user name, password or query: give credentials in the environment")
    return Address(f"{scheme}://{rest}")
