"""Scores of images: a column of the listing, a file of scores that is joined by path, or a file beside each image."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int64, UInt8

from sdxl_finetune.config.dataset import Subset
from sdxl_finetune.config.quality_options import is_ending
from sdxl_finetune.data.joined import (
    KINDS,
    MISSING,
    Images,
    Numbers,
    as_text,
    find_rows,
    images_of,
    pick,
    read_numbers,
    read_rows,
)
from sdxl_finetune.data.score_files import read_beside
from sdxl_finetune.data.tables import one_chunk
from sdxl_finetune.errors import SHOWN, Problem, UserError, listed


@dataclass(frozen=True)
class Scores:
    """Scores of all images, in columns."""

    values: Float32[np.ndarray, " n"]
    """NaN for an image without a finite score."""
    kind: UInt8[np.ndarray, " n"]
    """Position in KINDS of why an image has no score."""
    group: np.ndarray
    """Text by which a column of the file groups the images, of dtype object. Empty without such a column."""


Source = tuple[str | None, str, str | None]
"""Where scores come from: `quality_scores`, `quality_column`, and the column of groups."""


def no_scores(count: int) -> Scores:
    return Scores(np.full(count, np.nan, np.float32), np.full(count, MISSING, np.uint8), np.full(count, "", object))


def read_all_beside(
    table: pa.Table, subsets: Sequence[Subset], cache_dir: Path, *, skip_check: bool = False
) -> dict[Source, Numbers]:
    """Scores from the files beside images, by source, for the images whose subsets name the source.

    Files are read again if they have changed. With `skip_check` the scores of the last time are taken.
    """
    beside = {}
    for source, rows in _sources(table, subsets):
        if source[0] and is_ending(source[0]):
            images, kept = images_of(table, subsets, rows), cache_dir / "scores"
            beside[source] = read_beside(images, source[0], source[1], kept, skip_check=skip_check)
    return beside


def find_scores(
    table: pa.Table, subsets: Sequence[Subset], beside: Mapping[Source, Numbers]
) -> tuple[Scores, list[str]]:
    """The score of each image of a scan's table, from the source that its subset names, and remarks on the sources.

    `beside` is the result of `read_all_beside`. Images of subsets without quality tags have no score. Raises UserError
    for a file that cannot be read.
    """
    scores = no_scores(table.num_rows)
    remarks: list[str] = []
    for source, rows in _sources(table, subsets):
        name, column, group = source
        if source in beside:
            numbers = beside[source]
        elif name is None:
            numbers = read_numbers(table["score"].take(pa.array(rows)))
            is_nan = numbers.kind == KINDS.index("not a number (NaN)")  # a listing without scores has NaN
            numbers = Numbers(numbers.values, np.where(is_nan, MISSING, numbers.kind).astype(np.uint8))
        else:
            numbers, scores.group[rows] = _join_file(
                images_of(table, subsets, rows), Path(name), column, group, remarks
            )
        scores.values[rows], scores.kind[rows] = numbers.values, numbers.kind
    return scores, remarks


def _sources(table: pa.Table, subsets: Sequence[Subset]) -> Iterator[tuple[Source, Int64[np.ndarray, " k"]]]:
    """The sources of scores, each with the rows of the images whose subsets name it."""
    subset = one_chunk(table["subset"]).to_numpy()
    asked = [
        (one.quality_scores, one.quality_column, group_column(one)) if one.quality_tags else None for one in subsets
    ]
    for source in dict.fromkeys(asked):
        if source is not None:
            yield source, np.flatnonzero(np.array([one == source for one in asked])[subset])


def group_column(options: Subset) -> str | None:
    """The column that `quality_groups` names, if it names one."""
    groups = options.quality_groups or ""
    return groups.removeprefix("column:").strip() if groups.startswith("column:") else None


def _join_file(
    images: Images, path: Path, column: str, group: str | None, remarks: list[str]
) -> tuple[Numbers, np.ndarray]:
    """Scores and groups of the images from a file. Adds what it says twice or of no image to the remarks."""
    table, there = read_rows(path, [column, group] if group else [column], column)
    for name, key in ((column, "quality_column"), (group, "quality_groups")):
        if name and name not in table.column_names:
            message = f"{path} has no such column: name another of its columns, which are {listed(there, SHOWN)}"
            raise UserError(Problem(message, key=key, value=name if key == "quality_column" else f"column:{name}"))
    row = find_rows(images, path, table, remarks)
    numbers = read_numbers(table[column])
    names = np.full(len(row), "", object)
    if group:
        texts = as_text(table[group]).to_numpy()
        names[row >= 0] = texts[row[row >= 0]]
    return pick(numbers, row), names
