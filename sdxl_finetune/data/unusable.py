"""Images whose content cannot be used, kept in `cache_dir` with the reason, so that they are not read at each start.

An image is read again when its file changes, or when another version of the image library or another image format is
installed. Failures that may pass, such as a refused permission or a broken connection, are not kept.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.compute
from jaxtyping import Int64
from PIL import Image

from sdxl_finetune.data.images import image_extensions
from sdxl_finetune.data.tables import fixed_binary, map_table, one_chunk, write_table
from sdxl_finetune.errors import Problem
from sdxl_finetune.parsing import parse_json

NUMBERS = ("bytes", "mtime", "text_stat")
"""Numbers by which a changed image, or a changed text beside it, is known."""
FILES = pa.schema(
    {
        "subset": pa.int32(),
        "name": pa.large_binary(),
        **dict.fromkeys(NUMBERS, pa.int64()),
        "problems": pa.large_string(),
    }
)
"""Columns of images that the scan could not use. `problems` is a JSON list of message and file."""
CONTENTS = pa.schema({"stat_hash": pa.binary(16), "message": pa.large_string()})
"""Columns of images that could not be decoded. `stat_hash` is that of the index."""
MOST_KEPT = 1 << 20
"""Images that could not be decoded and are kept at most. The oldest are forgotten first, and read again."""
FOLDER = "unusable"
"""Folder in `cache_dir` for the images that could not be decoded."""


def _reader() -> bytes:
    """The library and the settings on which it depends, besides the file, whether an image can be read."""
    return repr((PIL.__version__, Image.MAX_IMAGE_PIXELS, image_extensions())).encode()


def _load(path: Path, schema: pa.Schema) -> pa.Table:
    """The kept images; an empty table if there are none, or if they were read by another library."""
    try:
        table = map_table(path, mapped=False).combine_chunks()
        if table.schema.equals(schema) and (table.schema.metadata or {}).get(b"reader") == _reader():
            return table
    except (OSError, pa.ArrowException):
        pass
    return schema.empty_table()


@dataclass
class Unusable:
    """The images that the last scan could not use, and those that this one cannot use."""

    path: Path
    last: pa.Table
    rows: list[tuple] = field(default_factory=list)
    """The images of this scan, in columns of FILES."""

    @classmethod
    def load(cls, path: Path) -> "Unusable":
        """Reads what the last scan has kept in a file, if anything."""
        return cls(path, _load(path, FILES))

    def places(self, subset: int, names: pa.Array) -> Int64[np.ndarray, " n"]:
        """The row of each image of a subset in `last`, -1 for an image that could be used or is new."""
        start, end = np.searchsorted(one_chunk(self.last["subset"]).to_numpy(), [subset, subset + 1]).tolist()
        own = one_chunk(self.last["name"].slice(start, end - start))
        place = pa.compute.index_in(names, value_set=own).fill_null(-1).to_numpy().astype(np.int64)
        return np.where(place >= 0, place + start, -1)

    def find(self, row: Int64[np.ndarray, " n"], numbers: Mapping[str, np.ndarray]) -> dict[int, tuple[Problem, ...]]:
        """The problems of images that are unchanged since the last scan, by place in `row`.

        `row` is a part of the result of `places`. `numbers` has an array of int64 for each of NUMBERS.
        """
        if not (row >= 0).any():
            return {}
        is_same = row >= 0
        for name in NUMBERS:
            is_same &= one_chunk(self.last[name]).to_numpy()[row] == numbers[name]
        places = np.flatnonzero(is_same)
        texts = self.last["problems"].take(pa.array(row[places])).to_pylist()
        found = {place: _read_problems(text) for place, text in zip(places.tolist(), texts, strict=True)}
        return {place: problems for place, problems in found.items() if problems}

    def add(self, subset: int, name: bytes, numbers: Sequence[int], problems: Sequence[Problem]) -> None:
        """Notes an image that cannot be used, with its numbers in the order of NUMBERS."""
        text = json.dumps([[problem.message, problem.file] for problem in problems])
        self.rows.append((subset, name, *numbers, text))

    def save(self) -> None:
        """Writes the images of this scan, if they differ from those of the last one."""
        columns = list(zip(*self.rows, strict=True)) or [()] * len(FILES)
        arrays = [pa.array(column, one.type) for column, one in zip(columns, FILES, strict=True)]
        table = pa.table(arrays, schema=FILES)
        if not table.equals(self.last):
            write_table(self.path, table.replace_schema_metadata({"reader": _reader()}))


def _read_problems(text: str | None) -> tuple[Problem, ...]:
    """The kept problems of an image; none if they cannot be read. The image is then read again."""
    try:
        return tuple(
            Problem(str(message), file=None if file is None else str(file)) for message, file in parse_json(text or "")
        )
    except (ValueError, TypeError):
        return ()


def load_undecodable(cache_dir: Path, stat_hashes: np.ndarray) -> dict[int, str]:
    """The messages of images that earlier runs could not decode, by row of `stat_hashes`."""
    known = _load(cache_dir / FOLDER / "contents", CONTENTS)
    if not known.num_rows:
        return {}
    place = _places(stat_hashes, known)
    rows: Int64[np.ndarray, " k"] = np.flatnonzero(place >= 0)
    return dict(zip(rows.tolist(), known["message"].take(pa.array(place[rows])).to_pylist(), strict=True))


def save_undecodable(cache_dir: Path, stat_hashes: np.ndarray, messages: Sequence[str]) -> None:
    """Adds images that could not be decoded to those of earlier runs."""
    path = cache_dir / FOLDER / "contents"
    known = _load(path, CONTENTS)
    fresh = np.flatnonzero(_places(stat_hashes, known) < 0)
    if len(fresh):
        new = [_hashes(stat_hashes[fresh]), pa.array([messages[row] for row in fresh.tolist()], pa.large_string())]
        table = pa.concat_tables([known.replace_schema_metadata(None), pa.table(new, schema=CONTENTS)])
        table = table.slice(max(0, table.num_rows - MOST_KEPT)).combine_chunks()
        write_table(path, table.replace_schema_metadata({"reader": _reader()}))


def _places(stat_hashes: np.ndarray, known: pa.Table) -> Int64[np.ndarray, " n"]:
    values = _hashes(fixed_binary(one_chunk(known["stat_hash"])))
    return pa.compute.index_in(_hashes(stat_hashes), value_set=values).fill_null(-1).to_numpy().astype(np.int64)


def _hashes(values: np.ndarray) -> pa.Array:
    data = pa.py_buffer(np.ascontiguousarray(values).tobytes())
    return pa.Array.from_buffers(pa.binary(16), len(values), [None, data])
