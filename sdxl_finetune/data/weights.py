"""Repeats and loss weights by rule: the file that `image_weights` names.

    [tags]
    "style_a" = { repeats = 3 }                       images with this tag are used three times as often
    "style_*" = { repeats = 2, loss_weight = 1.5 }
    [paths]
    "2024/*" = { loss_weight = 0.5 }                  a path is compared as folder/name

The last rule of the file that matches an image gives its repeats, and the last one with a loss weight its loss weight.
A CSV, JSON, JSON Lines or Parquet file gives both by image, in the columns `repeats` and `loss_weight`.

Repeats multiply `num_repeats`, and 0 leaves the image out. The loss of image i in a step of k images is

    L = 1 / k  sum_i  w_i l_i

with its loss weight w_i. It is not divided by the sum of the weights: weights of 2 on all images double the loss.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from jaxtyping import Float32, Float64, Int64

from sdxl_finetune.config.dataset import Subset
from sdxl_finetune.config.reading import parse_toml
from sdxl_finetune.data.joined import KINDS, Images, find_rows, images_of, pick, read_numbers, read_rows
from sdxl_finetune.data.tables import one_chunk
from sdxl_finetune.data.tag_columns import TagPatterns, find_tags, separators_of
from sdxl_finetune.errors import SHOWN, Problem, UserError, listed

VALUES = ("repeats", "loss_weight")
"""Values that a rule may set."""
WHOLE = 1e-3
"""Distance from a whole number up to which repeats are whole: thirds are written as 0.3333."""
TABLES = ("tags", "paths")
"""Tables of a rule file."""


@dataclass(frozen=True)
class Rule:
    """A pattern of tags or paths, and the values of the images that it matches; None for a value that it leaves."""

    table: str
    pattern: str
    repeats: float | None = None
    loss_weight: float | None = None


@dataclass(frozen=True)
class Weights:
    """Repeats and loss weights of all images, in columns."""

    repeats: Float64[np.ndarray, " n"]
    """Factors of `num_repeats`, 1 for an image without a rule."""
    loss_weight: Float32[np.ndarray, " n"]
    """Factors of the loss, 1 for an image without a rule."""


def find_weights(table: pa.Table, subsets: Sequence[Subset]) -> tuple[Weights, list[str]]:
    """The weights of each image of a scan's table, and remarks on rules and rows that match nothing.

    Raises UserError for a file that cannot be read or holds impossible values.
    """
    subset = one_chunk(table["subset"]).to_numpy()
    weights = Weights(np.ones(len(subset)), np.ones(len(subset), np.float32))
    remarks: list[str] = []
    asked = [one.image_weights for one in subsets]
    for path in dict.fromkeys(filter(None, asked)):
        rows = np.flatnonzero(np.array([one == path for one in asked])[subset])
        if path.suffix.lower() == ".toml":
            values = _by_rules(path, table, subsets, rows, remarks)
        else:
            values = _by_image(path, images_of(table, subsets, rows), remarks)
        for name, found in values.items():
            column = getattr(weights, name)
            column[rows] = np.where(np.isnan(found), 1, found)
        _check_repeats(path, np.array([one.num_repeats for one in subsets])[subset[rows]], weights.repeats[rows])
    return weights, remarks


def read_rules(path: Path) -> list[Rule]:
    """The rules of a TOML file, in order. Raises UserError with all mistakes in it."""
    content, _ = parse_toml(path)
    rules, problems = [], []
    for table, entries in content.items():
        if table not in TABLES or not isinstance(entries, dict):
            problems.append(Problem('must be a table of rules, [tags] or [paths]: write [tags] above "a tag"', table))
            continue
        for pattern, values in entries.items():
            if found := _mistake(values):
                problems.append(Problem(found, f"{table}.{pattern!r}", values))
            else:
                rules.append(Rule(table, pattern, **{name: float(value) for name, value in values.items()}))
    if not rules and not problems:
        problems.append(Problem('the file holds no rules: add one, as "a tag" = { repeats = 2 } below [tags]'))
    if problems:
        raise UserError([Problem(each.message, each.key, each.value, str(path)) for each in problems[:SHOWN]])
    return rules


def _mistake(values: Any) -> str | None:
    """Says what is wrong with the values of a rule."""
    if not isinstance(values, dict) or not values or not set(values) <= set(VALUES):
        return "must be a table of repeats and loss_weight, as { repeats = 2, loss_weight = 1.5 }"
    for name, value in values.items():
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not _is_possible(name, np.array([value]))[0]
        ):
            return _range(name)
    return None


def _is_possible(name: str, values: np.ndarray) -> np.ndarray:
    """True for values in the range of repeats or loss weights."""
    with np.errstate(over="ignore"):
        numbers = values.astype(np.float32)
    return np.isfinite(numbers) & ((numbers >= 0) if name == "repeats" else (numbers > 0))


def _range(name: str) -> str:
    if name == "repeats":
        return "repeats must be a number of at least 0, by which num_repeats is multiplied"
    return "loss_weight must be a number above 0: to leave images out, set their repeats to 0"


def _by_rules(
    path: Path, table: pa.Table, subsets: Sequence[Subset], rows: Int64[np.ndarray, " n"], remarks: list[str]
) -> Mapping[str, Float64[np.ndarray, " n"]]:
    """The values that the rules of a file give to these rows, NaN where no rule does."""
    rules = read_rules(path)
    sets = {name: np.array([getattr(rule, name) is not None for rule in rules]) for name in VALUES}
    last = {name: np.full(len(rows), -1) for name in VALUES}
    images = np.zeros(len(rules), np.int64)
    for places, numbers in _matches(rules, table, subsets, rows):
        images += np.bincount(numbers, minlength=len(rules))
        for name in VALUES:
            used = sets[name][numbers]
            np.maximum.at(last[name], places[used], numbers[used])
    if len(unmatched := np.flatnonzero(images == 0)):
        names = listed((f"{rules[number].table}.{rules[number].pattern!r}" for number in unmatched), SHOWN)
        remark = f"{path}: {len(unmatched)} of {len(rules)} rules match no image: {names}. Correct or remove them"
        if len(rows) and any(rules[number].table == "paths" for number in unmatched):
            name = os.fsdecode(images_of(table, subsets, rows[:1]).in_folder[0].as_py())
            remark += f". Paths are compared with names such as {name}"
        remarks.append(remark)
    values = {name: [getattr(rule, name) for rule in rules] for name in VALUES}
    return {name: np.array([*values[name], None], np.float64)[last[name]] for name in VALUES}


def _matches(
    rules: Sequence[Rule], table: pa.Table, subsets: Sequence[Subset], rows: Int64[np.ndarray, " n"]
) -> Iterator[tuple[Int64[np.ndarray, " k"], Int64[np.ndarray, " k"]]]:
    """Yields pairs of a place in `rows` and the number of a rule that matches it."""
    by_table = {
        name: np.array([at for at, rule in enumerate(rules) if rule.table == name], np.int64) for name in TABLES
    }
    if len(by_table["tags"]):
        patterns = TagPatterns([rules[number].pattern for number in by_table["tags"]])
        captions = one_chunk(table["captions"])
        separators = [separators_of(one) for one in subsets]
        own = one_chunk(table["subset"]).to_numpy()[rows]
        for these in dict.fromkeys(separators):
            places = np.flatnonzero(np.array([one == these for one in separators])[own])
            for found, numbers in find_tags(captions, rows[places], these, patterns):
                yield places[found], by_table["tags"][numbers]
    if len(by_table["paths"]):
        images = images_of(table, subsets, rows)
        for number in by_table["paths"].tolist():
            places = _match_path(images, rules[number].pattern)
            yield places, np.full(len(places), number)


def _match_path(images: Images, pattern: str) -> Int64[np.ndarray, " k"]:
    """Places of the images whose path matches a pattern.

    A pattern that begins with / is compared with the absolute path, another one with a / with `folder/name`, and one
    without with the name of the file.
    """
    names = images.absolute if pattern.startswith("/") else images.in_folder
    start = "^" if "/" in pattern else "(?:^|/)"
    found = pa.compute.match_substring_regex(names, start + glob_regex(pattern) + "$")
    return np.flatnonzero(found.to_numpy(zero_copy_only=False))


def glob_regex(pattern: str) -> str:
    """A regular expression for bytes of UTF-8: `*` and `?` do not match a /, `**` does."""
    parts = {
        "**/": "(?:.*/)?",
        "**": ".*",
        "*": "[^/]*",
        "?": r"(?:[^/\x80-\xff]|[\xc0-\xff][\x80-\xbf]+)",
    }
    return "".join(
        parts.get(part) or (part if part.startswith("[") and len(part) > 2 else re.escape(part))
        for part in re.findall(r"\*\*/|\*\*|\*|\?|\[[^\]]+\]|[^*?\[]+|\[", pattern)
    )


def _by_image(path: Path, images: Images, remarks: list[str]) -> Mapping[str, Float64[np.ndarray, " n"]]:
    """The values that the rows of a file give to images, NaN for images without a row or value."""
    table, columns = read_rows(path, VALUES, "repeats")
    there = [name for name in VALUES if name in table.column_names]
    if not there:
        message = f"the file has neither a column {' nor '.join(VALUES)}: rename or add one"
        raise UserError(Problem(f"{message}; the columns are {listed(columns, SHOWN)}", file=str(path)))
    row = find_rows(images, path, table, remarks)
    found: dict[str, Float64[np.ndarray, " n"]] = {}
    problems = []
    for name in there:
        numbers = read_numbers(table[name])
        bad = np.flatnonzero((numbers.kind > 0) & (numbers.kind != KINDS.index("missing")))
        bad = np.union1d(bad, np.flatnonzero((numbers.kind == 0) & ~_is_possible(name, numbers.values)))
        if len(bad):
            shown = ", ".join(repr(table[name][at].as_py()) for at in bad[:3].tolist())
            problems.append(Problem(f"{_range(name)}; {len(bad)} rows hold {shown}", name, file=str(path)))
        found[name] = pick(numbers, row).values.astype(np.float64)
    if problems:
        raise UserError(problems)
    return found


def _check_repeats(path: Path, num_repeats: Int64[np.ndarray, " n"], factors: Float64[np.ndarray, " n"]) -> None:
    """Raises UserError if an image would be used a fraction of a time.

    An epoch has the same images each time, so that its number of steps is known. Fractions would need another rule.
    """
    pairs = np.unique(np.stack([num_repeats, factors], axis=1), axis=0)
    if len(wrong := pairs[np.abs((product := pairs.prod(axis=1)) - product.round()) > WHOLE]):
        own, factor = wrong[0].tolist()
        message = f"{factor:g} times num_repeats, {own:g}, is no whole number: use whole repeats, or raise"
        message += " dataset_repeats (num_repeats in dataset_config) until all products are whole"
        raise UserError(Problem(message, "repeats", file=str(path)))
