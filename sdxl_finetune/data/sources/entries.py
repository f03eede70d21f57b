"""Reads .json and .jsonl metadata files, in the format of the reference's `in_json`.

    {"cat.jpg": {"caption": "a cat", "tags": "1cat, sitting"}, ...}                     .json
    {"image_path": "cat.jpg", "caption": "a cat", "tags": "1cat, sitting"}              .jsonl, a line each

An entry may hold two sizes, each [width, height] in pixels. `image_size` is the size of the image, which then need not
be opened to place it in a bucket. `train_resolution` is the size of its bucket, which is used if `resolution` is not
set. `score` is a number. Any other text is a caption source.

The entries are Python objects only until CHUNK of them are columns. Python's parser reads them, because pyarrow's ends
the process at a line that is `null`.
"""

import io
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import pyarrow as pa

from sdxl_finetune.config.dataset import Subset
from sdxl_finetune.data.sources.chunks import ENTRIES, Chunk, Fields, joined_caption
from sdxl_finetune.errors import SHOWN, Problem, UserError, listed
from sdxl_finetune.parsing import TOO_DEEP, parse_json
from sdxl_finetune.storage import Location, open_location

CHUNK = 1 << 14
"""Entries that are Python objects at once."""
SPACE = re.compile(r"[ \t\n\r]*")
"""White space of JSON."""

Named = tuple[int, Any, Any]
"""Number of the line or entry, name of the image, and the entry."""


def read_entries(subset: Subset, path: Location, fields: Fields) -> Iterator[Chunk]:
    """Yields the entries of a .json or .jsonl file in chunks. Raises UserError for a file that cannot be read."""
    is_lines = path.suffix.lower() == ".jsonl"
    keys: dict[str, None] = {}
    try:
        with open_location(path) as binary, io.TextIOWrapper(binary, encoding="utf-8-sig") as file:
            named = _lines(file, fields) if is_lines else _members(file.read(), path)
            while chunk := list(islice(named, CHUNK)):
                keys |= dict.fromkeys(key for _, _, entry in chunk if isinstance(entry, dict) for key in entry)
                yield _chunk(subset, path, fields, chunk, is_lines=is_lines)
    except UnicodeDecodeError as error:
        message = f"not a UTF-8 text file (byte {error.start}): save it as UTF-8"
        raise UserError(Problem(message, file=str(path))) from None
    except ValueError as error:
        raise UserError(Problem(f"not valid JSON ({error}): correct the file", file=str(path))) from None
    except OSError as error:
        raise UserError(Problem(f"the file cannot be read: {error.strerror}", file=str(path))) from None
    if keys and not fields.beside:  # beside images in tar files there may be .json files with these keys
        _check_keys(fields, keys, path, is_lines=is_lines)


def _check_keys(fields: Fields, keys: Iterable[str], path: Location, *, is_lines: bool) -> None:
    """Raises UserError for keys that the user has named and that no entry has."""
    there = listed(keys, SHOWN)
    wrong = [
        Problem(f"no entry has the key {name}; the keys are {there}", "metadata_columns", f"{what}={name}", str(path))
        for what, name in fields.given.items()
        if name not in keys and (is_lines or what != "path")  # .json has the names of images as keys
    ]
    if wrong:
        raise UserError(wrong)


def _lines(file: Iterable[str], fields: Fields) -> Iterator[Named]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            entry = parse_json(line)
            name = entry.get(fields.one("path")) if isinstance(entry, dict) else None
            yield number, str(name) if type(name) is int else name, entry


def _members(text: str, path: Location) -> Iterator[Named]:
    """The members of a JSON object, one at a time. A name that comes again replaces the earlier entry later on."""
    decode = json.JSONDecoder().raw_decode
    place = _after_space(text, 0)
    if text[place : place + 1] != "{":
        parse_json(text)
        message = "the top level must be an object of images by name; a list of lines needs the ending .jsonl"
        raise UserError(Problem(message, file=str(path)))
    place = _after_space(text, place + 1)
    number = 0
    while text[place : place + 1] != "}" or number:
        if text[place : place + 1] != '"':
            raise json.JSONDecodeError("Expecting property name enclosed in double quotes", text, place)
        name, place = _decoded(decode, text, place)
        place = _after_space(text, place)
        if text[place : place + 1] != ":":
            raise json.JSONDecodeError("Expecting ':' delimiter", text, place)
        entry, place = _decoded(decode, text, _after_space(text, place + 1))
        number += 1
        yield number, name, entry
        place = _after_space(text, place)
        if text[place : place + 1] == "}":
            break
        if text[place : place + 1] != ",":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
        place = _after_space(text, place + 1)
    if (rest := _after_space(text, place + 1)) != len(text):
        raise json.JSONDecodeError("Extra data", text, rest)


def _decoded(decode: Callable[[str, int], tuple[Any, int]], text: str, place: int) -> tuple[Any, int]:
    """The JSON value that begins at a place, and the place behind it. Raises ValueError."""
    try:
        return decode(text, place)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None


def _after_space(text: str, place: int) -> int:
    match = SPACE.match(text, place)
    assert match is not None
    return match.end()


def _chunk(subset: Subset, path: Location, fields: Fields, named: Iterable[Named], *, is_lines: bool) -> Chunk:
    rows: list[tuple] = []
    problems = []
    for number, name, entry in named:
        try:
            rows.append((number, *_row(subset, fields, name, entry)))
        except ValueError as error:  # noqa: PERF203 (all mistakes are reported together)
            place = f"line {number}" if is_lines else repr(name)
            problems.append(Problem(f"{place}: {error}", file=str(path)))
    columns = list(zip(*rows, strict=True)) or [()] * len(ENTRIES)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, ENTRIES, strict=True)]
    return Chunk(pa.table(arrays, schema=ENTRIES), problems)


def _row(subset: Subset, fields: Fields, name: Any, entry: Any) -> tuple:
    """The values of ENTRIES after the number. Raises ValueError for an entry that is malformed."""
    if not isinstance(name, str) or not name:
        keys = listed(entry, SHOWN) if isinstance(entry, dict) else "none"
        raise ValueError(
            f'the entry has no {fields.one("path")} (its keys are {keys}): set metadata_columns = "path=KEY"'
        )
    try:
        file_name = os.fsencode(name)
    except UnicodeEncodeError:
        raise ValueError("the name cannot be a file name, because it is no valid Unicode") from None
    if b"\0" in file_name:
        raise ValueError("a file name cannot hold a null character")
    if not isinstance(entry, dict):
        raise ValueError("the entry must be an object with caption or tags")
    sides = [*_sides(entry, fields.one("image_size")), *_sides(entry, fields.one("train_resolution"))]
    return file_name, _captions(subset, fields, entry), *sides, score_of(entry, fields.one("score"))


def _captions(subset: Subset, fields: Fields, entry: dict[str, Any]) -> list[str | None] | None:
    """The texts of an entry. None: it is without any, and the texts beside the image count, if there may be any."""
    if fields.ignores_captions:
        return None
    if fields.sources:
        texts = [(_text(entry, name) or None) if name else None for name in fields.sources]
    else:
        if fields.beside and not any(fields.one(key) in entry for key in ("caption", "tags")):
            return None
        caption, tags = (_as_text(entry.get(fields.one(key))) or "" for key in ("caption", "tags"))
        if not isinstance(caption, str) or not isinstance(tags, str):
            raise ValueError("caption and tags must be texts")
        texts = [joined_caption(subset, caption, tags)]
    try:
        "".join(text or "" for text in texts).encode()
    except UnicodeEncodeError:
        raise ValueError("caption or tags are no valid Unicode: they hold half of a surrogate pair") from None
    return texts


def _as_text(value: Any) -> Any:
    """Joins a list of tags."""
    is_tags = isinstance(value, list) and all(isinstance(part, str) for part in value)
    return ", ".join(value) if is_tags else value


def _text(entry: dict[str, Any], key: str) -> str | None:
    text = _as_text(entry.get(key))
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{key} must be a text")
    return text


def _sides(entry: dict[str, Any], key: str) -> tuple[int, int] | tuple[None, None]:
    sides = entry.get(key)
    if sides is None:
        return None, None
    if not isinstance(sides, list) or len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError(f"{key} must be [width, height] in pixels")
    if max(sides) > 2**31 - 1:
        raise ValueError(f"{key} is larger than any image")
    return sides[0], sides[1]


def score_of(entry: dict[str, Any], key: str) -> float | None:
    """The score of an entry, None if it has none. Raises ValueError for a value that is no finite number."""
    score = entry.get(key)
    if score is None or (type(score) is float and math.isnan(score)):
        return None
    if type(score) not in (int, float) or not math.isfinite(score):
        raise ValueError(f"{key} must be a number")
    return float(score)
