"""Files of values by image, such as scores: read as columns, and joined to the images by path.

A row names its image by the name below the image folder, by `folder/name`, or by the absolute path, with or without the
ending of the image file. An image in a tar file may also be named without the tar file's name. CSV, TSV, Parquet, JSON
and JSON Lines files are read. A JSON file is an object of values by name, or of objects by name, or a list of objects.
If several rows name one image, the last row counts.
"""

import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path, PurePath
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet
from jaxtyping import Bool, Float32, Int, Int64, UInt8

from sdxl_finetune.config.dataset import Subset
from sdxl_finetune.data.tables import one_chunk, with_slashes
from sdxl_finetune.errors import SHOWN, Problem, UserError, listed
from sdxl_finetune.parsing import parse_json
from sdxl_finetune.storage import Location, read

PATH_COLUMNS = ("path", "image_path", "file_name", "filename", "file", "image", "name", "key", "id")
"""Columns that may hold the path of the image, in the order in which they are looked for."""
ROWS = 1 << 16
"""Rows of a JSON file that are Python objects at once."""
KINDS = ("", "missing", "no numbers", "not a number (NaN)", "infinite")
"""Kinds of values in a column of numbers; the first is a finite number."""
MISSING = KINDS.index("missing")
FIRST_ROWS = 100
"""Rows of a JSON file whose keys a message lists."""
EXAMPLES = 3
"""Rows of a file that a remark names."""
NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
Opened = Callable[[], IO[bytes]]
"""Opens a file of rows, on the disk or in memory."""
SPECIAL = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE)


@dataclass(frozen=True)
class Numbers:
    """A column of numbers."""

    values: Float32[np.ndarray, " n"]
    """NaN where there is no finite number."""
    kind: UInt8[np.ndarray, " n"]
    """Position in KINDS of each value's kind."""


@dataclass(frozen=True)
class Images:
    """The images of some subsets, to be joined with rows."""

    names: pa.Array
    """Names below the image folders, large_binary."""
    folder: Int[np.ndarray, " n"]
    """Position of each image's folder in `folders`."""
    folders: Sequence[PurePath]
    """Local folders, or addresses of folders in an object store."""

    @cached_property
    def in_folder(self) -> pa.Array:
        """`folder/name` of each image."""
        return self._below([os.fsencode(folder.name) for folder in self.folders])

    @cached_property
    def absolute(self) -> pa.Array:
        """The absolute path or the address of each image."""
        return self._below([os.fsencode(absolute(folder)) for folder in self.folders])

    @cached_property
    def in_tar(self) -> pa.Array:
        """The name of each image inside its tar file; the whole name of an image that is in none."""
        return pa.compute.replace_substring_regex(self.names, r"(?i)^[^/]*\.tar/", "")

    def _below(self, folders: Sequence[bytes]) -> pa.Array:
        each = pa.array(folders, pa.large_binary()).take(pa.array(self.folder))
        return with_slashes(pa.compute.binary_join_element_wise(each, self.names, pa.scalar(b"/", pa.large_binary())))


@dataclass(frozen=True)
class Join:
    """The row of each image in a file."""

    row: Int64[np.ndarray, " n"]
    """The row of each image, -1 for an image that has none."""
    unused: Int64[np.ndarray, " u"]
    """Rows that name no image."""
    shared: Int64[np.ndarray, " s"]
    """Rows that name several images."""
    repeated: Int64[np.ndarray, " r"]
    """Rows that a later row replaces, because it names the same image."""


def read_rows(path: Location, wanted: Sequence[str], default: str) -> tuple[pa.Table, Sequence[str]]:
    """Returns the column `path` (large_binary) of a file with those of the wanted columns that it has, and all columns.

    All columns are their names, for a message; of a JSON file the keys of its first rows. Whole numbers are paths too:
    the image of 12345 is `12345.jpg`. A JSON object of plain values by name gives the column `default`. An object in a
    store is read into memory. Raises UserError for a file that cannot be read or has no column of paths.
    """
    data = b"" if isinstance(path, Path) else read(path)
    opened: Opened = lambda: path.open("rb") if isinstance(path, Path) else io.BytesIO(data)  # noqa: E731
    try:
        match path.suffix.lower():
            case ".parquet":
                table, there = _read_parquet(path, opened, wanted)
            case ".csv" | ".tsv":
                table, there = _read_csv(path, opened, wanted)
            case ".json" | ".jsonl":
                table, there = _read_json(path, opened, wanted, default)
            case _:
                raise UserError(Problem("must end in .csv, .tsv, .json, .jsonl or .parquet: rename it", file=str(path)))
    except OSError as error:
        raise UserError(Problem(f"the file cannot be read: {error.strerror or error}", file=str(path))) from None
    except (pa.ArrowException, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(Problem(f"not a valid {path.suffix} file ({reason}): correct it", file=str(path))) from None
    if not table.num_rows:
        raise UserError(Problem("the file has no rows: add a row for each image", file=str(path)))
    paths = one_chunk(pa.compute.cast(table["path"], pa.large_string()).fill_null("")).cast(pa.large_binary())
    paths = pa.compute.replace_substring_regex(with_slashes(paths), rb"^(\./)+", b"")
    return table.set_column(table.column_names.index("path"), "path", paths).combine_chunks(), there


def _columns(path: Location, there: Sequence[str], wanted: Sequence[str]) -> tuple[str, list[str]]:
    """The column of paths, and the wanted columns that are there. Raises UserError without a column of paths."""
    name = next((name for name in PATH_COLUMNS if name in there and name not in wanted), None)
    if name is None:
        message = "no column names the images: rename the one with their paths to path; the columns are"
        message += f" {listed(there, SHOWN)}"
        raise UserError(Problem(message, file=str(path)))
    columns = [column for column in wanted if column in there]
    for column in (name, *columns):
        if there.count(column) > 1:
            raise UserError(Problem(f"several columns are named {column}: rename all but one", file=str(path)))
    return name, columns


def _read_parquet(path: Location, opened: Opened, wanted: Sequence[str]) -> tuple[pa.Table, list[str]]:
    with opened() as source, pa.parquet.ParquetFile(source) as file:
        there = file.schema_arrow.names
        name, columns = _columns(path, there, wanted)
        table = file.read(columns=[name, *columns]).select([name, *columns])
    kind = table[name].type
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        message = f"the column {name} is {kind}, and must be text or whole numbers: write the names of the images"
        raise UserError(Problem(message, file=str(path)))
    return table.rename_columns(["path", *columns]), there


def _read_csv(path: Location, opened: Opened, wanted: Sequence[str]) -> tuple[pa.Table, list[str]]:
    """Values stay text, because one value that is no number must not make the file unreadable."""
    parse = pa.csv.ParseOptions(delimiter="\t" if path.suffix.lower() == ".tsv" else ",", newlines_in_values=True)
    with opened() as file, pa.csv.open_csv(file, parse_options=parse) as reader:
        there = reader.schema.names
        name, columns = _columns(path, there, wanted)
    convert = pa.csv.ConvertOptions(
        column_types=dict.fromkeys([name, *columns], pa.large_string()),
        include_columns=[name, *columns],
        strings_can_be_null=False,
    )
    with opened() as file:
        table = pa.csv.read_csv(file, parse_options=parse, convert_options=convert)
    return table.rename_columns(["path", *columns]), there


def _read_json(path: Location, opened: Opened, wanted: Sequence[str], default: str) -> tuple[pa.Table, list[str]]:
    """A JSON file or lines of JSON. The values become text, so that a column may hold numbers and text."""
    columns: set[str] = set()
    there: list[str] = []
    batches = []
    schema = pa.schema({"path": pa.large_string(), **dict.fromkeys(wanted, pa.large_string())})
    read_json = _json_lines if path.suffix.lower() == ".jsonl" else partial(_json_objects, default=default)
    rows = read_json(path, opened)
    while chunk := list(islice(rows, ROWS)):
        columns.update(name for name in wanted if any(name in values for _, values in chunk))
        there = there or list(dict.fromkeys(key for _, values in chunk[:FIRST_ROWS] for key in values))
        texts: dict[str, list[str | None]] = {"path": [name for name, _ in chunk]}
        texts |= {name: [_text(values.get(name)) for _, values in chunk] for name in wanted}
        batches.append(pa.RecordBatch.from_pydict(texts, schema))
    found = [name for name in wanted if name in columns]
    return pa.Table.from_batches(batches, schema).select(["path", *found]), there


def _text(value: Any) -> str | None:
    return None if value is None else value if isinstance(value, str) else json.dumps(value)


def _json_lines(path: Location, opened: Opened) -> Iterator[tuple[str, dict[str, Any]]]:
    with io.TextIOWrapper(opened(), "utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _named(path, f"line {number}", parse_json(line))


def _json_objects(path: Location, opened: Opened, default: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with io.TextIOWrapper(opened(), "utf-8-sig") as file:
        content = parse_json(file.read())
    if isinstance(content, list):
        yield from (_named(path, f"entry {number}", entry) for number, entry in enumerate(content, start=1))
    elif isinstance(content, dict):
        yield from ((name, value if isinstance(value, dict) else {default: value}) for name, value in content.items())
    else:
        raise ValueError("the top level must be an object or a list")


def _named(path: Location, place: str, entry: Any) -> tuple[str, dict[str, Any]]:
    there = list(entry) if isinstance(entry, dict) else []
    name = next((entry[key] for key in PATH_COLUMNS if key in there and type(entry[key]) in (str, int)), None)
    if name is None:
        message = f"{place}: must be an object with the path of an image, under one of {', '.join(PATH_COLUMNS)}"
        raise UserError(Problem(f"{message}; its keys are {listed(there, SHOWN) or 'none'}", file=str(path)))
    return str(name), entry


def read_numbers(column: pa.ChunkedArray) -> Numbers:
    """The values of a column as float32 numbers, and what is no finite number by its kind."""
    length = len(column)
    kind = np.zeros(length, np.uint8)
    is_null = column.is_null().to_numpy()
    if pa.types.is_boolean(column.type) or not (
        pa.types.is_floating(column.type) or pa.types.is_integer(column.type) or pa.types.is_decimal(column.type)
    ):
        texts = as_text(column)
        is_number = pa.compute.match_substring_regex(texts, NUMBER)
        is_special = pa.compute.match_substring_regex(texts, rf"^(?i:{SPECIAL.pattern})$")
        kind[~(is_number.to_numpy() | is_special.to_numpy())] = KINDS.index("no numbers")
        kind[pa.compute.equal(texts, "").to_numpy()] = KINDS.index("missing")
        usable = pa.compute.or_(is_number, is_special)
        column = pa.compute.if_else(usable, texts, pa.scalar("nan", pa.large_string()))
    numbers = pa.compute.cast(column, pa.float64()).to_numpy().astype(np.float64)
    with np.errstate(over="ignore"):
        values = numbers.astype(np.float32)
    kind[(kind == 0) & np.isnan(values)] = KINDS.index("not a number (NaN)")
    kind[np.isinf(values)] = KINDS.index("infinite")
    kind[is_null] = KINDS.index("missing")
    values[kind > 0] = np.nan
    return Numbers(values, kind)


def as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column as trimmed text; a value of another kind, such as a list, becomes text that is no number."""
    if pa.types.is_boolean(column.type) or not (
        pa.types.is_string(column.type) or pa.types.is_large_string(column.type) or pa.types.is_null(column.type)
    ):
        return pa.chunked_array([pa.array(["?"] * len(column), pa.large_string())])
    return pa.compute.utf8_trim_whitespace(column.cast(pa.large_string()).fill_null(""))


def absolute(folder: PurePath) -> str:
    """The absolute path of a local folder; the address of another one."""
    return str(folder.absolute() if isinstance(folder, Path) else folder)


def pick(numbers: Numbers, row: Int64[np.ndarray, " n"]) -> Numbers:
    """The numbers of these rows; a missing value for row -1."""
    values, kind = np.append(numbers.values, np.float32(np.nan)), np.append(numbers.kind, np.uint8(MISSING))
    return Numbers(values[row], kind[row])


def images_of(table: pa.Table, subsets: Sequence[Subset], rows: Int64[np.ndarray, " k"]) -> Images:
    """The images in these rows of a scan's table, to be joined."""
    folder = one_chunk(table["subset"]).to_numpy()[rows]
    return Images(one_chunk(table["name"].take(pa.array(rows))), folder, [one.image_dir for one in subsets])


def find_rows(images: Images, path: Location, table: pa.Table, remarks: list[str]) -> Int64[np.ndarray, " n"]:
    """The row of the file for each image, -1 without one. Adds a remark for each kind of row that is not used well."""
    paths = one_chunk(table["path"])
    found = join(images, paths)
    kinds = {
        "name no image": found.unused,
        "name several images, which all get the same values": found.shared,
        "are not used, because a later row names the same image": found.repeated,
    }
    for what, rows in kinds.items():
        if len(rows):
            names = [os.fsdecode(name) for name in paths.take(pa.array(rows[:EXAMPLES])).to_pylist()]
            remarks.append(f"{path}: {len(rows):,} of {len(paths):,} rows {what}, for example {', '.join(names)}")
    return found.row


def join(images: Images, paths: pa.Array) -> Join:
    """Finds the row of each image among the paths, which are large_binary.

    The most exact name wins: `folder/name`, then the name below the folder, then the absolute path, then the name in
    the tar file; then these without the image's ending.
    """
    count = len(paths)
    backwards = paths[::-1]  # index_in finds the first of equal paths, and the last row counts
    row = np.full(len(images.names), -1, np.int64)
    for without_ending in (False, True):
        for names in (images.in_folder, images.names, images.absolute, images.in_tar):
            left = np.flatnonzero(row < 0)
            if not len(left):
                break
            wanted = names.take(pa.array(left))
            if without_ending:
                wanted = _without_ending(wanted)
            found = pa.compute.index_in(wanted, value_set=backwards).fill_null(count).to_numpy()
            row[left] = count - 1 - found
    uses = np.bincount(row[row >= 0], minlength=count)
    last = pa.compute.index_in(paths, value_set=backwards).to_numpy()
    is_repeated: Bool[np.ndarray, " rows"] = count - 1 - last != np.arange(count)
    return Join(
        row,
        unused=np.flatnonzero((uses == 0) & ~is_repeated),
        shared=np.flatnonzero(uses > 1),
        repeated=np.flatnonzero(is_repeated),
    )


def _without_ending(names: pa.Array) -> pa.Array:
    return pa.compute.replace_substring_regex(names, rb"\.[^./]*$".decode(), "")
