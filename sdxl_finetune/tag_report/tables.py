"""The tags table as a CSV file for spreadsheets, and its rows as Python objects.

A spreadsheet computes a text that begins like a formula, and tags such as `=_=` and `-_-` do. In the CSV file an
apostrophe stands before such a tag, which spreadsheets take as text (OWASP, "CSV Injection"). The Parquet file holds
the tag itself.
"""

import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv

from sdxl_finetune.files import atomic_path
from sdxl_finetune.tag_report.schema import TAGS
from sdxl_finetune.tag_report.states import Figures

FORMULA = r"^[=+\-@＝＋－＠\t\r\n]"
"""First characters of a text that some spreadsheet takes for a formula, with their full-width forms."""
DIGITS = 5
"""Decimals of numbers in the CSV file: their standard errors are larger."""
FIRST = ("tag", "state")
"""Columns at the left of the CSV file."""


@dataclass(frozen=True, kw_only=True)
class TagRow(Figures):
    """A row of the tags table. Its fields are the columns of schema.TAGS."""

    tag: str
    held_out: int
    repeats: float | None
    gain_since_base: float | None
    gain_since_last: float | None
    accuracy_since_base: float | None
    accuracy_since_last: float | None
    state: str


def tag_rows(tags: pa.Table) -> list[TagRow]:
    """The rows of a tags table, in its order. NaN becomes None where a column allows missing values."""
    columns = {}
    for field in TAGS:
        values = tags[field.name]
        if field.nullable and pa.types.is_floating(field.type):
            values = pa.compute.if_else(pa.compute.is_nan(values), None, values)
        columns[field.name] = values.to_pylist()
    return [TagRow(**dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]


def median_exposures(rows: Sequence[TagRow]) -> float | None:
    """The median of the learned tags' exposures; None if no tag with known exposures is learned."""
    learned = [row.exposures for row in rows if row.state == "learned" and row.exposures is not None]
    return statistics.median(learned) if learned else None


def worst_tenth(values: Sequence[float]) -> float:
    """The value below which a tenth of the values lies."""
    return float(np.quantile(np.array(values), 0.1))


def write_csv(path: Path, tags: pa.Table) -> None:
    """Writes the tags table for spreadsheets: UTF-8 with a byte-order mark, which Excel needs, and texts in quotes."""
    names = [*FIRST, *(name for name in TAGS.names if name not in FIRST)]
    table = pa.table(dict(_columns(tags.select(names))))
    with atomic_path(path) as temporary, pa.OSFile(os.fspath(temporary), "wb") as file:
        file.write("\ufeff".encode())
        pa.csv.write_csv(table, file, pa.csv.WriteOptions(include_header=True, quoting_style="needed"))


def _columns(table: pa.Table) -> Iterator[tuple[str, pa.ChunkedArray]]:
    for name, column in zip(table.column_names, table.columns, strict=True):
        values = column
        if pa.types.is_string(values.type):
            values = pa.compute.replace_substring_regex(values, FORMULA, r"'\0")
        elif pa.types.is_floating(values.type):
            # As 64-bit floats the rounded decimals are written as they are: 0.1, not 0.10000000149.
            values = pa.compute.round(values.cast(pa.float64()), DIGITS)
            values = pa.compute.if_else(pa.compute.is_nan(values), None, values)
        yield name, values
