"""Arrow tables in files: written as a whole, and read through the page cache that all processes share.

Paths are passed to Arrow as bytes, because it refuses text that is not UTF-8.
"""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc

from sdxl_finetune.files import atomic_path


def write_table(path: Path, table: pa.Table) -> None:
    """Writes a table to a file that appears under its name when it is complete."""
    with (
        atomic_path(path) as temporary,
        pa.OSFile(os.fsencode(temporary), "wb") as file,
        pa.ipc.new_file(file, table.schema) as writer,
    ):
        writer.write_table(table)


def map_table(path: Path, *, mapped: bool = True) -> pa.Table:
    """Returns the table of a file, memory-mapped or read into memory. Raises OSError or ArrowException if damaged."""
    return pa.ipc.open_file(pa.memory_map(os.fsencode(path)) if mapped else path.read_bytes()).read_all()
