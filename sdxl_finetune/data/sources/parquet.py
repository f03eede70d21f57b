"""Reads Parquet metadata files: a row for each image, in columns from the file to the table, without Python objects.

    image_path   caption   tags   score   image_size or width and height   train_resolution

Without caption and tags, the texts beside the images are read. A column may have another usual name (USUAL), or the one
that `metadata_columns` gives. Only these columns are read, one row group at a time. A folder of Parquet files is read
in the order of the files' names.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet
from jaxtyping import Bool

from sdxl_finetune.config.dataset import Subset
from sdxl_finetune.data.sources.chunks import ENTRIES, Chunk, Fields, as_lists, joined_captions, without_empty
from sdxl_finetune.errors import SHOWN, Problem, UserError, listed
from sdxl_finetune.storage import Location, open_location, stat

CHUNK = 1 << 16
"""Rows that are checked at once: a few megabytes of captions."""
USUAL = {
    "path": ("image_path", "file_name", "filename", "path", "key", "id"),
    "caption": ("caption", "text"),
    "tags": ("tags",),
    "score": ("score",),
    "image_size": ("image_size",),
    "width": ("width", "image_width"),
    "height": ("height", "image_height"),
    "train_resolution": ("train_resolution",),
}
"""Names under which a column is looked for, in this order."""
KIND = {"tags": "caption", "height": "width", "train_resolution": "image_size"}
"""Columns that have the type of another one."""
LONGEST_SIDE = 2**31 - 1
"""Pixels: larger numbers are no sizes of images, and do not fit the index."""

Mistakes = list[tuple[Bool[np.ndarray, " n"], str]]
"""Pairs: rows that are wrong, and what is wrong with them."""


@dataclass(frozen=True)
class Columns:
    """The columns to read of one file."""

    names: dict[str, str]
    """By what they hold."""
    sources: tuple[str | None, ...]
    """Those of a caption set, None for a file beside the image. Empty: caption and tags are joined."""


def read_rows(subset: Subset, paths: Sequence[Location], fields: Fields) -> Iterator[Chunk]:
    """Yields the rows of Parquet files in chunks. Raises UserError for a file or a column that cannot be used."""
    for path in paths:
        try:
            before = stat(path)
            with open_location(path) as binary, pa.parquet.ParquetFile(pa.PythonFile(binary)) as file:
                columns = find_columns(file.schema_arrow, fields, path)
                wanted = [*columns.names.values(), *filter(None, columns.sources)]
                first = 1
                for batch in file.iter_batches(CHUNK, columns=list(dict.fromkeys(wanted)), use_threads=False):
                    yield _chunk(subset, path, columns, batch, first)
                    first += batch.num_rows
            if stat(path) != before:
                raise UserError(Problem("was changed while it was read: start again", file=str(path)))
        except FileNotFoundError:  # noqa: PERF203 (one file each)
            raise UserError(Problem("no such file", file=str(path))) from None
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            message = f"not readable as a Parquet file ({reason}): it is truncated or damaged, so write it again"
            raise UserError(Problem(message, file=str(path))) from None


def find_columns(schema: pa.Schema, fields: Fields, path: Location) -> Columns:
    """The columns to read of a file. Raises UserError with all that are missing or of a wrong type."""
    there = listed(schema.names, SHOWN)
    problems, names = [], {}
    for what, usual in USUAL.items():
        given = fields.given.get(what)
        found = next((name for name in ([given] if given else usual) if name in schema.names), None)
        if found:
            names[what] = found
        elif given:
            message = f"there is no column {given}; the columns are {there}"
            problems.append(Problem(message, "metadata_columns", f"{what}={given}", str(path)))
    if "path" not in names and "path" not in fields.given:
        message = f"no column names the images ({', '.join(USUAL['path'])}); the columns are {there}"
        problems.append(Problem(f'{message}: set metadata_columns = "path=NAME"', file=str(path)))
    sources = [name for name in fields.sources if name]
    problems += [
        Problem(f"there is no column {name}; the columns are {there}", "caption_sources", file=str(path))
        for name in sources
        if name not in schema.names
    ]
    for name in dict.fromkeys([*names.values(), *sources]):
        if schema.names.count(name) > 1:
            problems.append(Problem(f"several columns are named {name}: rename all but one", file=str(path)))
    if problems:
        raise UserError(problems)
    if sources or fields.ignores_captions:
        names = {what: name for what, name in names.items() if what not in ("caption", "tags")}
    for what, name in [*names.items(), *(("caption", name) for name in sources if name in schema.names)]:
        kind = schema.field(name).type
        if expected := _misfit(what, kind):
            option = "caption_sources" if name in sources else "metadata_columns"
            message = f"the column {name} is {kind}, and must be {expected}: write it so, or name another with {option}"
            problems.append(Problem(message, file=str(path)))
    if problems:
        raise UserError(problems)
    return Columns(names, tuple(fields.sources))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_list(kind: pa.DataType, fits: Callable[[pa.DataType], bool]) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return is_list and fits(kind.value_type)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)


def _misfit(what: str, kind: pa.DataType) -> str | None:
    """The type that a column should have; None if it has it, or if it has no values at all."""
    fits, expected = {
        "path": (
            _is_text(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_integer(kind),
            "text or whole numbers",
        ),
        "caption": (_is_text(kind) or _is_list(kind, _is_text), "text, or lists of texts"),
        "score": (_is_number(kind) or _is_text(kind), "numbers"),
        "width": (_is_number(kind), "numbers"),
        "image_size": (_is_list(kind, pa.types.is_integer), "lists of two whole numbers"),
    }[KIND.get(what, what)]
    return None if fits or pa.types.is_null(kind) else expected


def _chunk(subset: Subset, path: Location, columns: Columns, batch: pa.RecordBatch, first: int) -> Chunk:
    """The rows of a batch in the columns of ENTRIES. `first` is the number of its first row."""
    wrong: Mistakes = []
    names = columns.names
    size = batch.num_rows
    arrays = {
        "number": pa.array(np.arange(first, first + size)),
        "name": _names(batch[names["path"]], names["path"], wrong),
        "captions": _captions(subset, columns, batch, wrong),
    }
    if "score" in names:
        arrays["score"] = _score(batch[names["score"]], names["score"], wrong)
    for what, (width, height) in {
        "image_size": ("width", "height"),
        "train_resolution": ("train_width", "train_height"),
    }.items():
        if what in names:
            arrays[width], arrays[height] = _pairs(batch[names[what]], names[what], wrong)
    if "image_size" not in names and {"width", "height"} <= names.keys():
        sides = [_sides(batch[names[side]], names[side], wrong) for side in ("width", "height")]
        both = pa.compute.and_(*(side.is_valid() for side in sides))
        arrays["width"], arrays["height"] = (pa.compute.if_else(both, side, None) for side in sides)
    table = pa.table(
        [
            pa.nulls(size, field.type) if (array := arrays.get(field.name)) is None else array.cast(field.type)
            for field in ENTRIES
        ],
        schema=ENTRIES,
    )
    kept, problems, more = np.ones(size, bool), [], {}
    for rows, message in wrong:
        if count := int((rows & kept).sum()):
            number = first + int(np.flatnonzero(rows & kept)[0])
            problems.append(Problem(f"row {number}: {message}", file=str(path)))
            more[problems[-1]] = count - 1
            kept &= ~rows
    return Chunk(table if kept.all() else table.filter(pa.array(kept)), problems, more)


def _names(column: pa.Array, name: str, wrong: Mistakes) -> pa.Array:
    names = _plain(column)
    if pa.types.is_integer(names.type):  # the id of an image, whose file is 12345.jpg
        names = names.cast(pa.large_string())
    names = names.cast(pa.large_binary())
    wrong.append((_true(pa.compute.equal(pa.compute.binary_length(names).fill_null(0), 0)), f"{name} is missing"))
    wrong.append((_true(pa.compute.match_substring(names, b"\0")), f"{name} holds a null character"))
    return names


def _captions(subset: Subset, columns: Columns, batch: pa.RecordBatch, wrong: Mistakes) -> pa.Array:
    """The texts of each row, as lists."""
    names = columns.names
    empty = pa.nulls(batch.num_rows, pa.large_string())
    if not columns.sources and not names.keys() & {"caption", "tags"}:
        return pa.nulls(batch.num_rows, ENTRIES.field("captions").type)
    if columns.sources:
        texts = [without_empty(_texts(batch[name], name, wrong)) if name else empty for name in columns.sources]
    else:
        both = [_texts(batch[names[key]], names[key], wrong) if key in names else empty for key in ("caption", "tags")]
        texts = [joined_captions(subset, *both)]
    return as_lists(texts)


def _texts(column: pa.Array, name: str, wrong: Mistakes) -> pa.Array:
    """A column of text. Lists of tags are joined with ", "."""
    column = _plain(column)
    if _is_list(column.type, lambda _: True):
        lists = column.cast(pa.large_list(pa.large_string()))
        column = pa.compute.binary_join(lists, pa.scalar(", ", pa.large_string()))
    texts = column.cast(pa.large_string())
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:
        raw = texts.cast(pa.large_binary()).to_pylist()
        bad = np.array([text is not None and not _is_utf8(text) for text in raw])
        wrong.append((bad, f"{name} is not UTF-8"))
        return pa.array([None if is_bad else text for text, is_bad in zip(raw, bad, strict=True)], pa.large_string())
    return texts


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _score(column: pa.Array, name: str, wrong: Mistakes) -> pa.Array:
    """Scores as numbers. NaN means that there is none, as pandas writes it."""
    column = _plain(column)
    if _is_text(column.type):
        number = r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$"
        is_number = pa.compute.match_substring_regex(column, number)
        is_empty = _true(pa.compute.equal(column, ""))
        wrong.append((~_true(is_number) & ~is_empty & column.is_valid().to_numpy(False), f"{name} is no number"))
        column = pa.compute.utf8_trim_whitespace(pa.compute.if_else(is_number, column, None))
    values = column.cast(pa.float64())
    wrong.append((_true(pa.compute.is_inf(values)), f"{name} is infinite"))
    return pa.compute.if_else(pa.compute.is_nan(values), None, values).cast(pa.float32())


def _sides(column: pa.Array, name: str, wrong: Mistakes) -> pa.Array:
    """Widths or heights in pixels, as whole numbers. pandas writes whole numbers with gaps as floats with NaN."""
    values = _plain(column).cast(pa.float64())
    sides = pa.compute.if_else(pa.compute.is_nan(values), None, values).to_numpy(zero_copy_only=False)
    known = ~np.isnan(sides)
    fits = known & (sides >= 1) & (sides <= LONGEST_SIDE) & (np.floor(sides) == sides)
    wrong.append((known & ~fits, f"{name} is no number of pixels"))
    return pa.array(np.where(fits, sides, 1).astype(np.int32), mask=~fits)


def _pairs(column: pa.Array, name: str, wrong: Mistakes) -> tuple[pa.Array, pa.Array]:
    """The two columns of lists [width, height]."""
    message = f"{name} must be [width, height] in pixels"
    if pa.types.is_null(column.type):
        return (pa.nulls(len(column), pa.int32()),) * 2
    column = column.cast(pa.large_list(pa.int64()))
    known = column.is_valid().to_numpy(zero_copy_only=False)
    lengths = pa.compute.list_value_length(column).fill_null(0).to_numpy()
    starts = np.cumsum(lengths) - lengths
    flat = pa.compute.list_flatten(column)
    values = flat.fill_null(0).to_numpy()
    fits = known & (lengths == 2)
    rows = np.flatnonzero(fits)
    pairs = np.ones((len(column), 2), np.int64)
    pairs[rows] = values[starts[rows, None] + np.arange(2)] if len(rows) else pairs[rows]
    fits &= ((pairs >= 1) & (pairs <= LONGEST_SIDE)).all(axis=1)
    wrong.append((known & ~fits, message))
    pairs[~fits] = 1
    return pa.array(pairs[:, 0].astype(np.int32), mask=~fits), pa.array(pairs[:, 1].astype(np.int32), mask=~fits)


def _plain(column: pa.Array) -> pa.Array:
    """The column without a dictionary of its values."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _true(mask: pa.Array) -> Bool[np.ndarray, " n"]:
    """True where the mask is true, False where it is false or null."""
    return pa.compute.fill_null(mask, fill_value=False).to_numpy(zero_copy_only=False)
