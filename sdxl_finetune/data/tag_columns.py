"""Finds tags in a column of captions: each different tag is compared once, however many captions hold it.

Tags are compared in the form of `tags.comparable`. In a pattern `*` stands for any text, `?` for one character and
`[ab]` for one of these.
"""

import fnmatch
import re
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute
from jaxtyping import Int64

from sdxl_finetune.config.dataset import Subset
from sdxl_finetune.data.tags import BREAK, comparable
from sdxl_finetune.progress import track

ROWS = 1 << 16
"""Images whose tags are in memory at once."""


class TagPatterns:
    """Patterns of tags, by number. If `exact`, they are tags, in which the characters of patterns mean themselves."""

    def __init__(self, patterns: Sequence[str], *, exact: bool = False) -> None:
        self._count = len(patterns)
        self._exact: dict[str, list[int]] = {}
        self._globs: list[tuple[int, re.Pattern[str]]] = []
        self._known: dict[str, tuple[int, ...]] = {}
        for number, pattern in enumerate(map(comparable, patterns)):
            if set(pattern) & set("*?[") and not exact:
                self._globs.append((number, re.compile(fnmatch.translate(pattern))))
            else:
                self._exact.setdefault(pattern, []).append(number)
        self._any_glob = re.compile("|".join(f"(?:{glob.pattern})" for _, glob in self._globs) or r"(?!)")

    def __len__(self) -> int:
        return self._count

    def match(self, tag: str) -> tuple[int, ...]:
        """Numbers of the patterns that match a tag. The empty text is no tag."""
        if (found := self._known.get(tag)) is None:
            text = comparable(tag)
            numbers = list(self._exact.get(text, ()))
            if text and self._any_glob.match(text):
                numbers += [number for number, glob in self._globs if glob.match(text)]
            found = self._known[tag] = tuple(numbers)
        return found


def separators_of(options: Subset) -> tuple[str, ...]:
    """The texts between two tags of a caption; `caption_separator` is the first."""
    own = options.keep_tokens_separator, options.secondary_separator or ""
    others = {*own, "\n", BREAK if options.caption_break else ""}
    return (options.caption_separator, *sorted(filter(None, others), key=len, reverse=True))


def find_tags(
    captions: pa.Array, rows: Int64[np.ndarray, " n"], separators: Sequence[str], patterns: TagPatterns
) -> Iterator[tuple[Int64[np.ndarray, " k"], Int64[np.ndarray, " k"]]]:
    """Yields places in `rows` and numbers of patterns: each pair of which the pattern matches a tag of the row, once.

    A row of `captions` is a list of texts, of which some may be null.
    """
    for start in _tracked(len(rows)):
        places, tags = _split(captions.take(pa.array(rows[start : start + ROWS])), separators)
        found = [patterns.match(tag) for tag in tags.dictionary.to_pylist()]
        counts = np.array([len(numbers) for numbers in found], np.int64)
        if not counts.any():
            continue
        flat = np.array([number for numbers in found for number in numbers], np.int64)
        starts = np.cumsum(counts) - counts
        code = tags.indices.to_numpy()
        hits = np.flatnonzero(counts[code])
        code, places = code[hits], places[hits]
        within = np.arange(counts[code].sum()) - np.repeat(np.cumsum(counts[code]) - counts[code], counts[code])
        numbers = flat[np.repeat(starts[code], counts[code]) + within]
        pairs = np.unique(np.repeat(places, counts[code]) * len(patterns) + numbers)
        yield start + pairs // len(patterns), pairs % len(patterns)


def _tracked(rows: int) -> Iterator[int]:
    """Yields the first row of each part, and shows the progress."""
    with track("comparing tags", rows, "captions") as progress:
        for start in range(0, rows, ROWS):
            yield start
            progress.update(min(ROWS, rows - start))


def _split(captions: pa.Array, separators: Sequence[str]) -> tuple[Int64[np.ndarray, " t"], pa.DictionaryArray]:
    """The row of each tag, and the tags."""
    texts, owner = captions.flatten(), _owners(captions)
    texts = with_one_separator(texts, separators).fill_null("")
    tags = pa.compute.split_pattern(texts, separators[0])
    return owner[_owners(tags)], pa.compute.utf8_trim_whitespace(tags.flatten()).dictionary_encode()


def with_one_separator(texts: pa.Array, separators: Sequence[str]) -> pa.Array:
    """The texts with the first separator in place of the others. BREAK separates only as a word of its own."""
    for other in separators[1:]:
        if other == BREAK:
            replacement = separators[0].replace("\\", "\\\\")
            texts = pa.compute.replace_substring_regex(texts, rf"\b{BREAK}\b", replacement)
        else:
            texts = pa.compute.replace_substring(texts, other, separators[0])
    return texts


def _owners(lists: pa.Array) -> Int64[np.ndarray, " n"]:
    """The row of each value of a column of lists."""
    lengths = pa.compute.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
    return np.repeat(np.arange(len(lists)), lengths)
