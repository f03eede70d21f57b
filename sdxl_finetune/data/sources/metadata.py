"""The metadata file of a subset, .json, .jsonl or Parquet, as a table of its images.

Wrong entries are problems, counted by kind. A file that cannot be read at all raises UserError.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
from jaxtyping import Bool

from sdxl_finetune.config.dataset import Subset
from sdxl_finetune.data.images import image_extensions
from sdxl_finetune.data.sources.chunks import ENTRIES, Chunk, fields_of
from sdxl_finetune.data.sources.entries import read_entries
from sdxl_finetune.data.sources.folders import list_folder
from sdxl_finetune.data.sources.listed import LISTED, Listing, listed_table
from sdxl_finetune.data.sources.names import first_of_each, with_endings
from sdxl_finetune.data.sources.parquet import read_rows
from sdxl_finetune.data.tables import one_chunk, with_slashes
from sdxl_finetune.errors import Problem, Tally, UserError
from sdxl_finetune.storage import Location


@dataclass(frozen=True)
class Entries:
    """The valid entries of a metadata file."""

    path: Location
    table: pa.Table
    """Columns of ENTRIES, each in one chunk, in the order of the file."""
    problems: Tally

    def add_problem(self, row: int, message: str, count: int = 1) -> None:
        """Adds a problem of an entry, or `count` problems of its kind."""
        ending = self.path.suffix.lower()
        number = self.table["number"][row].as_py()
        name = repr(os.fsdecode(self.table["name"][row].as_py()))
        place = name if ending == ".json" else f"line {number}" if ending == ".jsonl" else f"row {number}"
        self.problems.add(Problem(f"{place}: {message}", file=str(self.path)), count)

    def without(self, wrong: Bool[np.ndarray, " n"]) -> "Entries":
        """The entries without these rows."""
        return self if not wrong.any() else Entries(self.path, self.table.filter(pa.array(~wrong)), self.problems)


def read_metadata(subset: Subset, folder: Path) -> Listing:
    """Lists the images that the metadata file of a subset names, in or below its folder.

    Raises UserError for a file that cannot be read or used at all.
    """
    entries = load_entries(subset)
    names, mistakes = with_endings(folder, entries.table["name"].combine_chunks(), image_extensions())
    for row, message in mistakes.items():
        entries.add_problem(row, message)
    wrong = np.zeros(len(names), bool)
    wrong[list(mistakes)] = True
    table = entries.table.set_column(1, "name", names)
    entries = without_repeated(Entries(entries.path, table, entries.problems).without(wrong))
    table = listed_table({name: entries.table[name] for name in LISTED.names if name in ENTRIES.names})
    return Listing(table, problems=entries.problems)


def load_entries(subset: Subset, *, beside: bool = False) -> Entries:
    """Reads the metadata file of a subset. Raises UserError.

    With `beside`, entries without captions are allowed in JSON too: texts beside the images are their captions.
    """
    path = subset.metadata_file
    assert path is not None
    problems, tables = Tally(), [ENTRIES.empty_table()]
    for chunk in _chunks(subset, path, beside=beside):
        tables.append(chunk.table)
        for problem in chunk.problems:
            problems.add(problem, 1 + chunk.more.get(problem, 0))
    table = pa.concat_tables(tables).combine_chunks()
    if not table.num_rows and not problems:
        raise UserError(Problem("the file names no images: give one with entries", file=str(path)))
    names = with_slashes(one_chunk(table["name"]))
    return Entries(path, table.set_column(table.column_names.index("name"), "name", names), problems)


def _chunks(subset: Subset, path: Location, *, beside: bool) -> Iterator[Chunk]:
    fields = fields_of(subset, beside=beside)
    if path.suffix.lower() in (".json", ".jsonl"):
        return read_entries(subset, path, fields)
    return read_rows(subset, parquet_files(path), fields)


def parquet_files(path: Location) -> list[Location]:
    """The Parquet files of a folder in the order of their names, or the file itself. Raises UserError without any."""
    if path.suffix.lower() == ".parquet":
        return [path]
    found = sorted(path / one.name for one in list_folder(path) if one.name.lower().endswith(".parquet"))
    if not found:
        message = "is neither a .json, .jsonl or .parquet file nor a folder of .parquet files: give one of these"
        raise UserError(Problem(message, file=str(path)))
    return found


def without_repeated(entries: Entries) -> Entries:
    """The entries with one row for each name.

    An object of JSON holds each name once; of a name that comes again, the last entry counts, as in the reference. A
    row of a Parquet file that names an image again is a problem.
    """
    names = entries.table["name"].combine_chunks()
    if entries.path.suffix.lower() in (".json", ".jsonl"):
        last = first_of_each(names.take(pa.array(np.arange(len(names))[::-1])))[::-1]
        return entries.without(~last)
    repeated = ~first_of_each(names)
    if repeated.any():
        row = int(np.flatnonzero(repeated)[0])
        name = os.fsdecode(names[row].as_py())
        entries.add_problem(row, f"the image is named in an earlier row ({name})", int(repeated.sum()))
    return entries.without(repeated)
