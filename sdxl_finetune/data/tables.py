"""Arrow tables and arrays in files: written as a whole, and read through the page cache that all processes share.

Paths are passed to Arrow as bytes, because it refuses text that is not UTF-8.
"""

import contextlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.ipc
from jaxtyping import UInt8

from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.files import atomic_path
from sdxl_finetune.storage.copies import touch

MARK = b"crc32 1 "
"""Begins the last bytes of a file, behind the table."""
TAIL = len(MARK) + 4
"""Bytes behind the table: the mark, and the CRC-32 of all bytes before the mark."""


@contextlib.contextmanager
def kept_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path, and renames the file there to `path` at the end, as `atomic_path` does.

    Raises UserError if the file cannot be written, for example into a folder that another user has made.
    """
    try:
        with atomic_path(path) as temporary:
            yield temporary
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        message = f"the file cannot be written ({reason}): free disk space, correct the permissions of its folder,"
        raise UserError(Problem(f"{message} or name another folder as cache_dir", file=str(path))) from None


def write_table(path: Path, table: pa.Table) -> None:
    """Writes a table to a file that appears under its name when it is complete. Raises UserError."""
    with kept_file(path) as temporary:
        with pa.OSFile(os.fsencode(temporary), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        with pa.memory_map(os.fsencode(temporary)) as content:
            checksum = zlib.crc32(content.read_buffer())
        with temporary.open("ab") as file:
            file.write(MARK + checksum.to_bytes(4, "little"))


def map_table(path: Path, *, mapped: bool = True, checked: bool = True) -> pa.Table:
    """Returns the table of a file, memory-mapped or read into memory. Raises OSError or ArrowException if damaged.

    A table whose bytes have changed is damaged: it could make Arrow read outside of the file. `checked` is False for a
    file that this or another process of the run has checked. The modification time of the file becomes the time of this
    use.
    """
    touch(path)
    content = (pa.memory_map(os.fsencode(path)) if mapped else pa.OSFile(os.fsencode(path))).read_buffer()
    size, has_checksum = len(content) - TAIL, has_mark(content)
    if has_checksum and checked and zlib.crc32(content[:size]) != int.from_bytes(content[-4:].to_pybytes(), "little"):
        raise pa.ArrowInvalid("the file differs from its checksum")
    table = pa.ipc.open_file(content[:size] if has_checksum else content).read_all()
    if not has_checksum:
        table.validate(full=True)
    return table


def map_array(path: Path) -> np.ndarray | None:
    """Maps a file that `np.save` wrote; None if it does not exist or is damaged.

    numpy parses the header of such a file as Python. Damage to it raises errors of many classes.
    """
    try:
        return np.load(path, mmap_mode="r").view(np.ndarray)
    except Exception:
        return None


def has_mark(content: pa.Buffer) -> bool:
    """True if the bytes of a file end in a checksum. Older versions of this program wrote none."""
    return len(content) > TAIL and content[-TAIL:-4].to_pybytes() == MARK


def is_sound(path: Path) -> bool:
    """True if a file of `write_table` has the content that was written."""
    try:
        with pa.memory_map(os.fsencode(path)) as file:
            content = file.read_buffer()
            return has_mark(content) and map_table(path) is not None
    except (OSError, pa.ArrowException):
        return False


def one_chunk(column: pa.ChunkedArray) -> pa.Array:
    """The column as one array. A column of one chunk is not copied."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def with_slashes(paths: pa.Array) -> pa.Array:
    """Paths (large_binary) with / between folders. Programs on Windows write a backslash there.

    On other systems a backslash may be part of a name.
    """
    return paths if os.sep == "/" else pa.compute.replace_substring(paths, os.sep.encode(), b"/")


def fixed_binary(column: pa.FixedSizeBinaryArray) -> UInt8[np.ndarray, "n size"]:
    """Values of one size in bytes as rows of an array, which shares the column's memory."""
    size = column.type.byte_width
    values = np.frombuffer(column.buffers()[1] or b"", np.uint8).reshape(-1, size)
    return values[column.offset : column.offset + len(column)]
