"""Finds the image files of names in metadata files, in columns.

A name is absolute or below the subset's folder. Its ending may be left out, as sd-scripts writes names.
"""

import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
from jaxtyping import Bool

from sdxl_finetune.config.dataset import is_picture
from sdxl_finetune.errors import Problem, UserError

CHUNK = 1 << 16
"""Names that are Python objects at once."""
MISSING_REMEDY = "correct the name or remove the entry"
SHOWN = 5
"""Images of the same name without ending that a message lists."""


def ending_pattern(endings: tuple[str, ...]) -> str:
    """A regular expression for names with one of these endings."""
    return f"(?i)(?:{'|'.join(map(re.escape, endings))})$"


def has_ending(names: pa.Array, endings: tuple[str, ...]) -> Bool[np.ndarray, " n"]:
    """True for names that end in one of these endings, in any case of letters."""
    return pa.compute.match_substring_regex(names, ending_pattern(endings)).to_numpy(zero_copy_only=False)


def stems(names: pa.Array) -> pa.Array:
    """The names without their endings."""
    return pa.compute.replace_substring_regex(names, rb"\.[^./]*$", b"")


def with_endings(folder: Path, names: pa.Array, endings: tuple[str, ...]) -> tuple[pa.Array, dict[int, str]]:
    """Adds the endings of the files in and below `folder` to names without ending.

    Returns the names, and what is wrong with names that fit no file or several, by row.
    """
    is_short = ~has_ending(names, endings)
    rows = np.flatnonzero(is_short)
    if not len(rows):
        return names, {}
    short = names.take(pa.array(rows))
    parents = pa.compute.replace_substring_regex(short, rb"[^/]*$", b"").dictionary_encode()
    own_parent = parents.indices.to_numpy()
    found, order, mistakes = [], [], {}
    for number, parent in enumerate(parents.dictionary.to_pylist()):
        own = np.flatnonzero(own_parent == number)
        wanted = pa.compute.replace_substring_regex(short.take(pa.array(own)), rb"^.*/", b"")
        files, wrong = find_images(_images_in(folder / os.fsdecode(parent), endings), wanted)
        found.append(prefixed(os.fsencode(Path(os.fsdecode(parent)) / "x")[:-1], files))
        order.append(own)
        for place, images in wrong.items():
            full = folder / os.fsdecode(short[int(own[place])].as_py())
            listed = ", ".join(os.fsdecode(image) for image in images[:SHOWN])
            several = f"several images have this name ({full}.*: {listed}): add the ending"
            mistakes[int(rows[own[place]])] = (
                several if images else f"no image has this name ({full}.*): {MISSING_REMEDY}"
            )
    ordered = pa.concat_arrays(found).take(pa.array(np.argsort(np.concatenate(order))))
    return pa.compute.replace_with_mask(names, pa.array(is_short), ordered), mistakes


def find_images(images: pa.Array, wanted: pa.Array) -> tuple[pa.Array, dict[int, list[bytes]]]:
    """The only image of each wanted name without ending, and the images of wanted names that fit none or several."""
    of_image = stems(images).dictionary_encode()
    counts = np.bincount(of_image.indices.to_numpy(), minlength=len(of_image.dictionary))
    by_stem, starts = np.argsort(of_image.indices.to_numpy(), kind="stable"), np.cumsum(counts) - counts
    stem = pa.compute.index_in(wanted, value_set=of_image.dictionary).fill_null(-1).to_numpy()
    wrong = {}
    for place in np.flatnonzero((stem < 0) | (counts[stem] != 1) if len(counts) else stem < 0).tolist():
        start = starts[stem[place]] if stem[place] >= 0 else 0
        count = counts[stem[place]] if stem[place] >= 0 else 0
        wrong[place] = images.take(pa.array(by_stem[start : start + min(count, SHOWN)])).to_pylist()
    if not len(images):
        return pa.array([b""] * len(wanted), pa.large_binary()), wrong
    return images.take(pa.array(by_stem[starts[np.maximum(stem, 0)]])), wrong


def _images_in(folder: Path, endings: tuple[str, ...]) -> pa.LargeBinaryArray:
    return search_folder(folder, endings)[0] if folder.is_dir() else pa.array([], pa.large_binary())


def search_folder(folder: Path, endings: tuple[str, ...]) -> tuple[pa.LargeBinaryArray, Counter[str]]:
    """The names of the images directly in a folder, and the number of its other files by ending. Raises UserError."""
    chunks: list[pa.Array] = []
    names: list[str] = []
    others: Counter[str] = Counter()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_picture(entry, endings):
                    names.append(entry.name)
                    if len(names) == CHUNK:
                        chunks.append(encoded(names))
                        names = []
                elif entry.name[0] != ".":
                    others[entry.name[entry.name.rfind(".") :].lower()] += 1
    except OSError as error:
        raise UserError(Problem(f"the folder cannot be listed: {error.strerror}", file=str(folder))) from None
    return pa.concat_arrays([*chunks, encoded(names)]), others


def encoded(names: list[str]) -> pa.LargeBinaryArray:
    """The names as bytes. Arrow encodes them faster than Python, but refuses those that are not UTF-8."""
    try:
        return pa.array(names, pa.large_string()).cast(pa.large_binary())
    except UnicodeEncodeError:
        return pa.array(map(os.fsencode, names), pa.large_binary())


def prefixed(prefix: bytes, names: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """The names with `prefix` before each of them."""
    before, between = (pa.scalar(text, pa.large_binary()) for text in (prefix, b""))
    return pa.compute.binary_join_element_wise(before, names, between)


def first_of_each(names: pa.Array) -> Bool[np.ndarray, " n"]:
    """False for names that stand in an earlier row."""
    codes = names.dictionary_encode().indices.to_numpy()
    is_first = np.zeros(len(names), bool)
    is_first[np.unique(codes, return_index=True)[1]] = True
    return is_first
