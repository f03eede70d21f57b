"""Requests to object stores through obstore, which keeps connections open and lets other threads run meanwhile.

A large object is read in ranges, so that each request has little to send before its timeout. Every request is retried
with growing pauses. Credentials come from the environment variables of each kind of store (`AWS_ACCESS_KEY_ID`,
`GOOGLE_SERVICE_ACCOUNT`, `AZURE_STORAGE_ACCOUNT_KEY`, ...). The library's error texts can hold parts of requests.
Therefore only known words are taken from them.

A process that was forked after its parent's first request cannot make requests. The data loader starts its workers
with spawn.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sdxl_finetune.files import atomic_path
from sdxl_finetune.storage.address import Address, Found, Stat, StorageError

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

T = TypeVar("T")

RANGE = 8 << 20
"""Bytes that one request reads or writes at most: 8 MiB."""
AT_ONCE = 4
"""Requests that run at the same time for one large object."""
TIMEOUT, CONNECT_TIMEOUT = 30.0, 10.0
"""Seconds for one request, and for its connection. 30 seconds for 8 MiB allow a link of 280 kB/s."""
REQUEST_RETRIES = 2
"""Repetitions of one request inside the library, which repeats a part of an upload alone."""
PAUSES = (1.0, 4.0, 10.0)
"""Seconds before an operation is tried again. These attempts cover what breaks in a body."""
MOST_PARTS = 5000
"""Parts of one upload. Stores allow 10,000."""
NO_BUCKET = "the bucket does not exist: check its name, and AWS_ENDPOINT_URL for a store that is not Amazon's"
NO_CREDENTIALS = (
    "no credentials: set them in the environment. S3 needs AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or"
    " AWS_SKIP_SIGNATURE=true for a public bucket. Azure needs AZURE_STORAGE_ACCOUNT_KEY"
)
REASONS = {
    "169.254.169.254": NO_CREDENTIALS,  # without credentials the library asks the cloud's machine for them
    "/latest/api/token": NO_CREDENTIALS,
    "account must be specified": "the environment names no account: set AZURE_STORAGE_ACCOUNT_NAME",
    "invalid access key": "AZURE_STORAGE_ACCOUNT_KEY in the environment is no valid key: correct it",
    "service account file": "the credentials that GOOGLE_SERVICE_ACCOUNT names cannot be read: correct it",
    "nosuchbucket": NO_BUCKET,
    "connection refused": "the connection is refused",
    "dns error": "the name of the host is not found",
    "timed out": "no answer in time",
    "connection reset": "the connection broke",
    "connection closed": "the connection broke",
    "end of file": "the connection broke",
    "error decoding response body": "the connection broke",
    "incomplete": "the connection broke",
    "slowdown": "the store asks for fewer requests",
    "error sending request": "no connection",
}
"""Reason to report for each word in the library's error text. The first word that is found counts."""
STATUS = re.compile(r"status(?: code)?:? (\d{3})", re.IGNORECASE)

IMPOSSIBLE = re.compile(r'path "(.*?)"(?: contained|:)', re.IGNORECASE | re.DOTALL)
"""The name in the library's text on a name of an object that it cannot use."""


def read(address: Address, start: int, length: int) -> bytes:
    """`length` bytes of an object from position `start`. Raises StorageError if the object is shorter."""
    import obstore

    store, key = _store(address.store), address.key

    def request() -> bytes:
        if length <= RANGE:
            data = bytes(obstore.get_range(store, key, start=start, length=length))
        else:
            data = b"".join(obstore.get_ranges(store, key, starts=starts, ends=ends, coalesce=0))
        if len(data) != length:
            raise StorageError(address, f"ends after {start + len(data)} bytes, of {start + length} expected")
        return data

    if length == 0:
        return b""
    starts = range(start, start + length, RANGE)
    ends = [min(one + RANGE, start + length) for one in starts]
    return _attempt(address, "read", request)


def read_all(address: Address) -> bytes:
    """All bytes of an object."""
    import obstore

    store, key = _store(address.store), address.key

    def request() -> bytes | int:
        answer = obstore.get(store, key)
        size = answer.meta["size"]
        return bytes(answer.bytes()) if size <= RANGE else size

    found = _attempt(address, "read", request)
    return read(address, 0, found) if isinstance(found, int) else found


def stat(address: Address) -> Stat:
    """Size and version of an object. A missing object is not asked for again."""
    import obstore

    found = _attempt(address, "read", lambda: obstore.head(_store(address.store), address.key), patient=False)
    return Stat(found["size"], _version(found))


def list_files(folder: Address) -> Iterator[Found]:
    """All objects below a folder, in the order of the store. One request finds 1,000 of them."""
    import obstore
    from obstore import exceptions

    prefix = f"{folder.key}/" if folder.key else ""
    store, last = _store(folder.store), ""

    def start() -> tuple[Iterator[Any], Any]:
        """The listing behind the last name, and its first chunk. A failed listing goes on where it ended."""
        listing = obstore.list(store, prefix or None, chunk_size=1000, offset=last or None)
        return listing, next(listing, None)

    listing, chunk = _attempt(folder, "listed", start)
    while chunk is not None:
        for found in chunk:
            last = found["path"]
            if last.startswith(prefix):
                yield Found(found["size"], _version(found), last[len(prefix) :], found["last_modified"].timestamp())
        try:
            chunk = next(listing, None)
        except (exceptions.BaseError, OSError):
            listing, chunk = _attempt(folder, "listed", start)


def download(address: Address, path: Path, size: int) -> None:
    """Reads an object of `size` bytes into a local file, which appears when it is complete.

    Raises StorageError, and OSError if the file cannot be written.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        for start in range(0, size, AT_ONCE * RANGE):
            file.write(read(address, start, min(AT_ONCE * RANGE, size - start)))


def write(address: Address, data: bytes | Path, check: Callable[[], None] | None = None) -> None:
    """Writes an object from memory or from a file. It appears when it is complete, and replaces an older one.

    `check` is called before each attempt, and before each part of a file. It ends the write by raising StorageError.
    The parts sent so far are then deleted.
    """
    import obstore

    size = data.stat().st_size if isinstance(data, Path) else len(data)
    part = max(RANGE, -(-size // MOST_PARTS))
    options: dict[str, Any] = {"chunk_size": part, "max_concurrency": AT_ONCE}

    def request() -> None:
        content: bytes | Path | Iterator[bytes] = data
        if check:
            check()
            content = _parts(data, part, check) if isinstance(data, Path) and size > part else data
        obstore.put(_store(address.store), address.key, content, **options)

    _attempt(address, "written", request)


def _parts(path: Path, size: int, check: Callable[[], None]) -> Iterator[bytes]:
    """Yields the bytes of a file in parts of `size`, and calls `check` before each."""
    with path.open("rb", buffering=0) as file:
        while data := file.read(size):
            check()
            yield data


def delete(address: Address) -> None:
    """Deletes an object. A missing object is no error."""
    import obstore

    try:
        _attempt(address, "deleted", lambda: obstore.delete(_store(address.store), address.key), patient=False)
    except StorageError as error:
        if not error.missing:
            raise


def _attempt(address: Address, done: str, request: Callable[[], T], *, patient: bool = True) -> T:
    """Returns what `request` returns, with retries. Raises StorageError; `done` says what could not be done.

    A missing object is asked for again only with `patient`: some stores show a new object after a moment.
    """
    from obstore import exceptions

    pauses = iter(PAUSES)
    while True:
        try:
            return request()
        except StorageError:
            raise
        except FileNotFoundError:
            message = f"cannot be written: {NO_BUCKET}" if done == "written" else "does not exist"
            error = StorageError(address, message, missing=True)
            if not patient:
                raise error from None
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError):
            message = "access is denied: check the credentials in the environment, and what they may do"
            raise StorageError(address, f"cannot be {done}; {message}") from None
        except exceptions.NotSupportedError:
            raise StorageError(address, f"cannot be {done}: the store does not offer this") from None
        except exceptions.InvalidPathError as failure:
            raise StorageError(address, f"cannot be {done}: {_impossible_name(failure)}") from None
        except (exceptions.BaseError, OSError, ValueError) as failure:
            if (reason := _reason(failure)) in (NO_BUCKET, NO_CREDENTIALS):
                raise StorageError(address, f"cannot be {done}: {reason}") from None
            error = StorageError(address, f"cannot be {done}, after {1 + len(PAUSES)} attempts: {reason}")
        if (pause := next(pauses, None)) is None:
            raise error from None
        time.sleep(pause)


def _reason(failure: Exception) -> str:
    text = str(failure).lower()
    for word, reason in REASONS.items():
        if word in text:
            return reason
    status = STATUS.search(text)
    return (
        f"the store answers with status {status[1]}" if status else f"an error of the store ({type(failure).__name__})"
    )


def _impossible_name(failure: Exception) -> str:
    """Names the object of which the library refuses the name. Only the name is taken from its text."""
    name = IMPOSSIBLE.search(str(failure))
    named = f" ({name[1]!a})" if name else ""
    return f"an object's name{named} has an empty part, a part . or .., or a control character: rename the object"


def _version(found: Any) -> int:
    text = found["e_tag"] or f"{found['last_modified']} {found['size']}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@lru_cache
def _store(root: str) -> "ObjectStore":
    """The client of a bucket. It may be used by all threads. Raises StorageError for impossible credentials."""
    from obstore.exceptions import BaseError
    from obstore.store import from_url

    endpoint = os.environ.get("AWS_ENDPOINT_URL", "") if root.startswith("s3") else root
    client: ClientConfig = {
        "timeout": timedelta(seconds=TIMEOUT),
        "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT),
    }
    if endpoint.startswith("http://"):
        client["allow_http"] = True
    backoff = {"init_backoff": timedelta(seconds=0.2), "max_backoff": timedelta(seconds=5), "base": 2}
    retry: Any = {"max_retries": REQUEST_RETRIES, "retry_timeout": timedelta(seconds=3 * TIMEOUT), "backoff": backoff}
    checked: RetryConfig = retry
    try:
        return from_url(root, client_options=client, retry_config=checked)
    except (BaseError, ValueError) as failure:
        raise StorageError(Address(root), f"cannot be used: {_reason(failure)}") from None


def forget_stores() -> None:
    """Forgets all clients, so that the next request reads the environment again."""
    _store.cache_clear()
