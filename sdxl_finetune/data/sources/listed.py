"""The columns in which every source gives its images."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute

from sdxl_finetune.errors import Tally

LISTED = pa.schema(
    {
        "name": pa.large_binary(),
        "captions": pa.large_list(pa.large_string()),
        "width": pa.int32(),
        "height": pa.int32(),
        "train_width": pa.int32(),
        "train_height": pa.int32(),
        "score": pa.float32(),
        "offset": pa.int64(),
        "bytes": pa.int64(),
        "mtime": pa.int64(),
    }
)
"""Columns of a listing. Null means that the source does not say.

`name` is relative to the subset's folder, and need not be text. `captions` has one text for each caption source; null
means that caption files beside the image are read. `width` and `height` are the image's size in pixels, and
`train_width` and `train_height` the size of its bucket. `offset` is the position of the image in its tar file, null
for a file of its own. `bytes` and `mtime` (nanoseconds) are size and modification time of the image's file. The `mtime`
of an object and of a tar file's member is a number that changes with the object or the tar file."""


@dataclass(frozen=True)
class Listing:
    """The images of one subset."""

    table: pa.Table
    """The images, with the columns of LISTED, sorted by name. Each column has one chunk."""
    others: Counter[str] = field(default_factory=Counter)
    """Number of the other files in the folder by ending, in lower case."""
    problems: Tally = field(default_factory=Tally)
    """Images and entries that cannot be used."""


def listed_table(columns: Mapping[str, pa.Array | pa.ChunkedArray]) -> pa.Table:
    """Returns a table with the columns of LISTED, sorted by name. Columns that are not given are null."""
    size = len(columns["name"])
    arrays = [columns.get(field.name, pa.nulls(size, field.type)).cast(field.type) for field in LISTED]
    return sorted_by_name(pa.table(arrays, schema=LISTED))


def sorted_by_name(table: pa.Table) -> pa.Table:
    """Returns the table sorted by name, with one chunk in each column."""
    order = pa.compute.sort_indices(table["name"]).to_numpy()
    return table.combine_chunks() if (order == np.arange(len(order))).all() else table.take(order).combine_chunks()
