"""Files of scores beside images, such as `cat.score` beside `cat.png`: a number, or a JSON object that holds one.

The scores are kept in `cache_dir` with the size and modification time of each file. Only changed files are read again.
"""

import hashlib
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
from jaxtyping import Int64

from sdxl_finetune.data.joined import MISSING, Images, Numbers, absolute, read_numbers
from sdxl_finetune.data.tables import map_table, write_table
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.parsing import parse_json
from sdxl_finetune.progress import track

READ = pa.schema({"name": pa.large_binary(), "stat": pa.int64(), "score": pa.float32(), "kind": pa.uint8()})
"""Columns of the kept scores. `stat` is a number made of size and modification time of the file."""
NO_FILE, NOT_READ = -1, -2
"""`stat` of an image without such a file, and of one that was not looked at before."""
CHUNK = 1 << 14
"""Images between two lines of progress."""


def read_beside(images: Images, ending: str, key: str, kept: Path, *, skip_check: bool = False) -> Numbers:
    """The scores of images from the files of this ending. `key` is that of the score in a JSON object.

    The scores are kept in `kept`. With `skip_check`, images whose files were read before are not looked at.
    """
    for place in np.unique(images.folder).tolist():
        if not isinstance(folder := images.folders[place], Path):
            message = f"files beside images are not read from {folder}: name a file with all scores"
            raise UserError(Problem(message, key="quality_scores", value=ending))
    names = images.absolute
    question = repr((ending, key, [os.fsencode(absolute(folder)) for folder in images.folders]))
    path = kept / f"{hashlib.blake2b(question.encode(), digest_size=12).hexdigest()}.scores"
    last = _load(path)
    place = pa.compute.index_in(names, value_set=last["name"].combine_chunks()).fill_null(-1).to_numpy()
    is_known = place >= 0
    stat = np.full(len(names), NOT_READ, np.int64)
    score, kind = np.full(len(names), np.nan, np.float32), np.full(len(names), MISSING, np.uint8)
    for column, name in ((stat, "stat"), (score, "score"), (kind, "kind")):
        column[is_known] = last[name].to_numpy()[place[is_known]]
    asked = np.flatnonzero(~is_known) if skip_check else np.arange(len(names))
    changed = _look(names, ending, asked, stat)
    if len(changed):
        texts = [_read(_path(name, ending), key) for name in names.take(pa.array(changed)).to_pylist()]
        numbers = read_numbers(pa.chunked_array([pa.array(texts, pa.large_string())]))
        score[changed], kind[changed] = numbers.values, numbers.kind
    if len(changed) or len(names) != len(last):
        write_table(path, pa.table([names, stat, score, kind], READ))
    return Numbers(score, kind)


def _load(path: Path) -> pa.Table:
    """The kept scores; an empty table if there are none or the file is damaged."""
    try:
        table = map_table(path, mapped=False)
        if table.schema == READ:
            return table
    except (OSError, pa.ArrowException):
        pass
    return READ.empty_table()


def _look(
    names: pa.Array, ending: str, asked: Int64[np.ndarray, " k"], stat: Int64[np.ndarray, " n"]
) -> Int64[np.ndarray, " m"]:
    """Writes the current `stat` of the asked images into `stat`, and returns the images whose `stat` was another."""
    before = stat[asked].copy()
    with track("looking for files of scores", len(asked), "images") as progress:
        for start in range(0, len(asked), CHUNK):
            rows = asked[start : start + CHUNK]
            stat[rows] = [_stat(_path(name, ending)) for name in names.take(pa.array(rows)).to_pylist()]
            progress.update(len(rows))
    return asked[stat[asked] != before]


def _path(image: bytes, ending: str) -> bytes:
    return os.path.splitext(image)[0] + ending.encode()  # noqa: PTH122 (millions)


def _stat(path: bytes) -> int:
    try:
        stat = os.stat(path)  # noqa: PTH116
    except OSError:
        return NO_FILE
    return (stat.st_mtime_ns * 1_000_003 + stat.st_size) & (1 << 63) - 1


def _read(path: bytes, key: str) -> str | None:
    """The text of the score; None without a file. Text that cannot be read is no number."""
    try:
        text = Path(os.fsdecode(path)).read_text(encoding="utf-8-sig").strip()
        entry = parse_json(text) if text.startswith("{") else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return "?"
    if entry is None:
        return text
    value = entry.get(key)
    return None if value is None else str(value)
