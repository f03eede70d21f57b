"""Marks of images: what their scores and the user's rules make of them, in columns beside those of a scan.

    quality        place of the quality tag in the subset's quality_tags, -1 for none
    repeats        factor of num_repeats, 0 for an image that is left out
    loss_weight    factor of the loss

Marks are a function of the scan's table, the options and the files that these name. They are kept in `cache_dir`,
because comparing the tags of millions of captions takes a minute.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from sdxl_finetune.config.dataset import Subset
from sdxl_finetune.config.quality_options import ImageWeightOptions, QualityOptions, is_ending
from sdxl_finetune.data.contents import absolute
from sdxl_finetune.data.joined import EXAMPLES, KINDS, Numbers
from sdxl_finetune.data.quality import NO_TAG, Groups, assign_tags, share_bounds, with_missing
from sdxl_finetune.data.scan import digest_of
from sdxl_finetune.data.scores import Scores, Source, find_scores, group_column, read_all_beside
from sdxl_finetune.data.tables import map_table, one_chunk, write_table
from sdxl_finetune.data.tag_columns import TagPatterns, find_tags, separators_of
from sdxl_finetune.data.weights import find_weights
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.parsing import parse_json
from sdxl_finetune.storage import naming, parse_location, stat

logger = logging.getLogger(__name__)

MARKS = pa.schema({"quality": pa.int16(), "repeats": pa.float32(), "loss_weight": pa.float32()})
"""Columns of marks."""
FORMAT = 2
"""Version of the way from files to marks. Marks of another version are not found."""
DECIDING = (
    *QualityOptions.model_fields,
    *ImageWeightOptions.model_fields,
    *("caption_separator", "keep_tokens_separator", "secondary_separator", "caption_break"),
    *("num_repeats", "image_dir"),
)
"""Options of a subset on which its marks depend."""
MOST_GROUPS = 20
"""Groups whose lowest scores are logged."""


def find_marks(
    table: pa.Table, subsets: Sequence[Subset], cache_dir: Path, *, skip_check: bool = False
) -> pa.Table | None:
    """The marks of the images of a scan's table, as a MARKS table; None if no subset asks for any.

    Logs what was counted. Raises UserError for files that cannot be read, for impossible values, and for images without
    a score if `quality_missing` is "stop".
    """
    if not any(one.quality_tags or one.image_weights for one in subsets):
        return None
    beside = read_all_beside(table, subsets, cache_dir, skip_check=skip_check)
    path = cache_dir / "marks" / f"{_question(table, subsets, beside)}.marks"
    marks = _load(path)
    if marks is None:
        marks = _mark(table, subsets, beside)
        write_table(path, marks.replace_schema_metadata(marks.schema.metadata | {b"digest": digest_of(marks).encode()}))
    for level, remark in _remarks(marks):
        logger.log(level, "%s", remark)
    return marks


def _question(table: pa.Table, subsets: Sequence[Subset], beside: Mapping[Source, Numbers]) -> str:
    """A hash of everything on which marks depend. Files are known by path, size and modification time."""
    options = [[str(getattr(one, name)) for name in DECIDING] for one in subsets]
    files = {("image_weights", one.image_weights) for one in subsets if one.image_weights} | {
        ("quality_scores", parse_location(one.quality_scores))
        for one in subsets
        if one.quality_scores and not is_ending(one.quality_scores)
    }
    digest = hashlib.blake2b(repr((FORMAT, table.schema.metadata[b"digest"], options)).encode(), digest_size=12)
    for option, file in sorted(files, key=lambda one: str(one[1])):
        with naming(option):
            if not isinstance(file, Path) or file.is_file():  # another one is a mistake, which `_mark` reports
                found = stat(file)
                digest.update(repr((os.fsencode(str(absolute(file))), found.size, found.version)).encode())
    for numbers in beside.values():
        digest.update(numbers.values.tobytes() + numbers.kind.tobytes())
    return digest.hexdigest()


def _load(path: Path) -> pa.Table | None:
    """The marks of an earlier start; None if there are none or the file is damaged."""
    try:
        marks = map_table(path, mapped=False)
        metadata = marks.schema.metadata or {}
        if marks.schema == MARKS and metadata.get(b"digest") == digest_of(marks).encode():
            _remarks(marks)
            return marks
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        pass
    return None


def _remarks(marks: pa.Table) -> list[tuple[int, str]]:
    """Levels and texts of what has to be logged. Raises KeyError, TypeError or ValueError if they are damaged."""
    return [(int(level), str(remark)) for level, remark in parse_json(marks.schema.metadata[b"remarks"])]


def _mark(table: pa.Table, subsets: Sequence[Subset], beside: Mapping[Source, Numbers]) -> pa.Table:
    """The marks, with what has to be logged in the metadata of the table."""
    scores, remarks = find_scores(table, subsets, beside)
    weights, more = find_weights(table, subsets)
    logged = [(logging.WARNING, remark) for remark in [*remarks, *more]]
    quality = np.full(table.num_rows, NO_TAG, np.int16)
    for options, rows in _pools(table, subsets):
        groups = _groups(table, subsets, options, scores, rows)
        assert options.quality_tags
        quality[rows] = assign_tags(scores.values[rows], options.quality_tags, groups)
        logged += [(logging.INFO, line) for line in _describe_shares(scores.values[rows], options, groups)]
    left_out = _apply_missing(table, subsets, scores, quality, logged)
    repeats = np.where(left_out, 0, weights.repeats).astype(np.float32)
    marks = pa.table([quality, repeats, weights.loss_weight], MARKS)
    return marks.replace_schema_metadata({b"remarks": json.dumps(logged).encode()})


def _pools(table: pa.Table, subsets: Sequence[Subset]) -> Iterator[tuple[Subset, Int64[np.ndarray, " k"]]]:
    """The images whose shares are counted together: those of subsets with equal tags and groups."""
    subset = one_chunk(table["subset"]).to_numpy()
    asked = [(one.quality_tags, one.quality_groups) for one in subsets]
    for pool in dict.fromkeys(asked):
        if pool[0]:
            yield subsets[asked.index(pool)], np.flatnonzero(np.array([one == pool for one in asked])[subset])


def _groups(
    table: pa.Table, subsets: Sequence[Subset], options: Subset, scores: Scores, rows: Int64[np.ndarray, " n"]
) -> Groups | None:
    """The groups of a pool's images. An image belongs to the first of the tags that its caption holds."""
    if not options.quality_groups:
        return None
    if group_column(options):
        names, numbers = np.unique(scores.group[rows], return_inverse=True)
        return Groups([name or "(none)" for name in names.tolist()], numbers)
    tags = [tag.strip() for tag in options.quality_groups.split(",") if tag.strip()]
    number = np.full(len(rows), len(tags))
    separators = [separators_of(one) for one in subsets]
    own = one_chunk(table["subset"]).to_numpy()[rows]
    for these in dict.fromkeys(separators):
        places = np.flatnonzero(np.array([one == these for one in separators])[own])
        for found, numbers in find_tags(one_chunk(table["captions"]), rows[places], these, TagPatterns(tags)):
            np.minimum.at(number, places[found], numbers)
    return Groups([*tags, "(none of these)"], number)


def _describe_shares(values: np.ndarray, options: Subset, groups: Groups | None) -> Iterator[str]:
    """Yields the number of images of each group, and the lowest scores of tags that are given by shares."""
    tags = options.quality_tags or ()
    names = ["all images"] if groups is None else [f"group {name}" for name in groups.names]
    number = np.zeros(len(values), np.int64) if groups is None else groups.number
    lowest = share_bounds(values, tags, number, len(names))
    sizes = np.bincount(number, minlength=len(names)).tolist()
    for group, name in enumerate(names[:MOST_GROUPS]):
        if lowest and sizes[group]:
            bounds = (f"{tags[place]} = score >= {bound[group]:.6g}" for place, bound in lowest.items())
            yield f"quality_tags: {name} (images: {sizes[group]:,}): {', '.join(bounds)}"


def _apply_missing(
    table: pa.Table, subsets: Sequence[Subset], scores: Scores, quality: np.ndarray, logged: list[tuple[int, str]]
) -> np.ndarray:
    """Gives images without a score the tag that `quality_missing` names; returns True for those that are left out.

    Raises UserError if there are such images and the rule is "stop".
    """
    subset = one_chunk(table["subset"]).to_numpy()
    left_out, rules = (
        np.zeros(len(subset), bool),
        [one.quality_missing if one.quality_tags else None for one in subsets],
    )
    for rule in dict.fromkeys(filter(None, rules)):
        has_rule = np.array([one == rule for one in rules])[subset]
        unscored = has_rule & (scores.kind > 0)
        what = {"none": "they get no quality tag", "skip": "they are left out"}.get(rule, f"they get the tag {rule}")
        for kind, text in enumerate(KINDS):
            rows = np.flatnonzero(unscored & (scores.kind == kind))
            if not len(rows):
                continue
            examples = ", ".join(_name(table, subsets, row) for row in rows[:EXAMPLES].tolist())
            state = "have no score" if text == "missing" else f"have scores that are {text}"
            message = f"{len(rows):,} of {has_rule.sum():,} images {state}, for example {examples}"
            if rule == "stop":
                remedy = "add their scores, or set none (no tag), skip, or a tag for them"
                raise UserError(Problem(f"{message}: {remedy}", key="quality_missing", value=rule))
            if len(rows) == has_rule.sum():
                what += ". Set quality_scores, or compare its paths and quality_column with the images"
            logged.append((logging.WARNING, f"quality_missing = {rule!r}: {message}: {what}"))
        left_out |= unscored & (rule == "skip")
        for number, one in enumerate(subsets):
            if rules[number] == rule and one.quality_tags:
                rows = np.flatnonzero(subset == number)
                quality[rows] = with_missing(quality[rows], scores.kind[rows] == 0, rule, one.quality_tags)
    return left_out


def _name(table: pa.Table, subsets: Sequence[Subset], row: int) -> str:
    """Folder and name of an image, for messages."""
    folder = subsets[table["subset"][row].as_py()].image_dir
    return f"{folder.name}/{os.fsdecode(table['name'][row].as_py())}"
