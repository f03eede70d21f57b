"""The images of one tar file, found by reading the headers of its members alone.

Python's `tarfile` reads the headers, with the long names of GNU and POSIX archives. It reads and seeks in the file, so
that the data of images is skipped, in an object store as well. An image's size is read from its first kilobytes, which
mostly arrive with its header.
"""

import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from typing import Any

import pyarrow as pa

from sdxl_finetune.data.caption_sources import LARGEST_TEXT
from sdxl_finetune.data.faces import FACE_NAME
from sdxl_finetune.data.images import ImageError, image_extensions, image_size, size_of_start
from sdxl_finetune.data.sources.beside import Texts, Wanted, read_text
from sdxl_finetune.errors import Problem, Tally
from sdxl_finetune.storage import Location, open_location

HEAD = 1 << 15
"""Bytes of an image that are read for its size. The whole image is read if they are not enough."""
BLOCK = tarfile.BLOCKSIZE


@dataclass
class _Found:
    """Images and texts that were found in a tar file."""

    images: dict[bytes, tuple[int, int, tuple[int, int] | None]] = field(default_factory=dict)
    """Position, number of bytes and size in pixels of each image by name."""
    beside: dict[bytes, Texts] = field(default_factory=dict)
    """Texts by name without ending."""
    bad: set[bytes] = field(default_factory=set)
    """Names without ending of images whose texts cannot be used."""
    others: Counter[str] = field(default_factory=Counter)
    """Number of other members by ending."""


@dataclass(frozen=True)
class Members:
    """The images of a tar file."""

    table: pa.Table
    """Columns of `schema`, in the order of the file."""
    problems: Tally
    others: Counter[str]


def schema(wanted: Wanted) -> pa.Schema:
    """Columns of the images of a tar file: name in the file, position, number of bytes, size in pixels, and texts."""
    numbers = {"offset": pa.int64(), "bytes": pa.int64(), "width": pa.int32(), "height": pa.int32()}
    texts = dict.fromkeys(wanted.texts, pa.large_string())
    return pa.schema({"name": pa.large_binary(), **numbers, "score": pa.float32(), **texts})


def read_members(location: Location, size: int, wanted: Wanted) -> Members:
    """Finds the images of a tar file of this size in bytes, and reads what stands beside them.

    Raises OSError or StorageError.
    """
    found, problems = _Found(), Tally()
    with open_location(location, size) as file:
        if file.read(2) == b"\x1f\x8b":
            message = "is compressed, so that no image in it can be read by itself: unpack it with gunzip"
            problems.add(Problem(message, file=str(location)))
        else:
            _read_members(file, size, location, wanted, found, problems)
    rows = []
    for name, (offset, size, sides) in found.images.items():
        stem = name[: name.rfind(b".")]
        beside = _beside(found, stem)
        if beside is None:
            continue
        width, height = sides or beside.size or (None, None)
        rows.append((name, offset, size, width, height, beside.score, *map(beside.texts.get, wanted.texts)))
    fields = schema(wanted)
    columns = list(zip(*rows, strict=True)) or [()] * len(fields)
    arrays = [pa.array(column, one.type) for column, one in zip(columns, fields, strict=True)]
    return Members(pa.table(arrays, schema=fields), problems, found.others)


def _beside(found: _Found, stem: bytes) -> Texts | None:
    """The texts of an image by its name without ending; None if they cannot be used.

    A face cutout that lacks a text has that of the original image, as in a folder.
    """
    if stem in found.bad:
        return None
    own = found.beside.get(stem, Texts())
    face = FACE_NAME.fullmatch(stem.decode("utf-8", "surrogateescape"))
    if face is None:
        return own
    original = face[1].encode("utf-8", "surrogateescape")
    if original in found.bad and not own.texts:
        return None
    return Texts(found.beside.get(original, Texts()).texts | own.texts, own.score, own.size)


def _read_members(
    file: BufferedReader, size: int, location: Location, wanted: Wanted, found: _Found, problems: Tally
) -> None:
    endings, text_endings = image_extensions(), wanted.endings
    for member in _headers(file, size, location, problems):
        name = member.name.encode("utf-8", "surrogateescape")
        while name.startswith((b"./", b"/")):
            name = name[name.index(b"/") + 1 :]
        stem, _, last = name.rpartition(b".")
        ending = "." + last.decode("utf-8", "replace").lower()
        place = f"{location}/{member.name}"
        if member.isdir() or name.rpartition(b"/")[2].startswith(b".") or not stem:
            continue
        if ending not in text_endings and ending not in endings:
            found.others[ending] += 1
        elif not member.isreg() or member.issparse():
            problems.add(Problem("the member is a link or sparse, and has no data of its own: pack files", file=place))
        elif ending in text_endings:
            try:
                file.seek(member.offset_data)
                data = file.read(min(member.size, LARGEST_TEXT + 1))
                read_text(ending, data, wanted, found.beside.setdefault(stem, Texts()))
            except ValueError as error:
                problems.add(Problem(str(error), file=place))
                found.bad.add(stem)
        elif name in found.images:
            problems.add(Problem("the tar file holds this name twice: the first one is used", file=place))
        else:
            try:
                found.images[name] = member.offset_data, member.size, member_size(file, member, location)
            except ImageError as error:
                problems.add(Problem(error.reason, file=place))


class _Headers:
    """A tar file as `tarfile` reads it: headers alone. It seeks behind the data of members, and never reads them."""

    def __init__(self, file: BufferedReader) -> None:
        self.seek, self.tell, self._file = file.seek, file.tell, file

    def read(self, size: int) -> bytes:
        """Reads a header. Raises ReadError for a long name that claims to have more than LARGEST_TEXT bytes.

        Python takes the memory for all of these bytes before it reads any.
        """
        if not 0 <= size <= LARGEST_TEXT:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


def _headers(file: BufferedReader, size: int, location: Location, problems: Tally) -> Iterator[tarfile.TarInfo]:
    """The members of a tar file in order. A damaged file ends early, with a problem."""
    file.seek(0)
    remedy = "pack or copy it again"
    try:
        headers: Any = _Headers(file)
        tar = tarfile.open(fileobj=headers, mode="r:", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
        count = 0
        for member in iter(tar.next, None):
            if member.size < 0:
                raise tarfile.ReadError("a member has a negative size")
            if member.offset_data + member.size > size:
                message = f"the tar file ends within a member, after {count} whole ones: {remedy}"
                problems.add(Problem(message, file=str(location)))
                return
            count += 1
            yield member
            tar.members.clear()  # type: ignore[attr-defined]  # it would hold millions
        end = tar.offset
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        problems.add(Problem(f"not readable as a tar file ({error}): {remedy}", file=str(location)))
        return
    file.seek(end)
    if file.read(BLOCK).strip(b"\0"):
        message = f"the tar file is damaged at byte {end}, after {count} members: {remedy}"
        problems.add(Problem(message, file=str(location)))


def member_size(file: BufferedReader, member: tarfile.TarInfo, location: Location) -> tuple[int, int]:
    """(width, height) of an image in a tar file. Raises ImageError."""
    file.seek(member.offset_data)
    head = file.read(min(HEAD, member.size))
    if len(head) < member.size:
        if size := size_of_start(location, head):
            return size
        head += file.read(member.size - len(head))
    return image_size(location, head)
