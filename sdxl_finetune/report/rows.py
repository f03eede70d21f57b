"""The captions of an index in columns, a chunk of images at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int64

from sdxl_finetune.config.dataset import Subset
from sdxl_finetune.data.captions import BREAK
from sdxl_finetune.data.index import Index
from sdxl_finetune.data.tables import map_table, one_chunk
from sdxl_finetune.report.tags import CHUNK, split_texts


@dataclass(frozen=True)
class Grammar:
    """How the captions of a subset are split into tags."""

    separators: tuple[str, ...]
    uses_all_lines: bool
    sources: tuple[int, ...]
    """Places of the caption sources that are lists of tags, the heaviest first."""

    @classmethod
    def of(cls, subset: Subset) -> "Grammar":
        """The grammar of a subset's options."""
        marks = (subset.caption_separator, subset.keep_tokens_separator, subset.secondary_separator)
        others = ("\n" if subset.enable_wildcard else "", BREAK if subset.caption_break else "")
        order = [0]
        if sources := subset.caption_sources:
            lists = [place for place, source in enumerate(sources) if not source.whole]
            order = sorted(lists, key=lambda place: -sources[place].weight)
        return cls(tuple(filter(None, (*marks, *others))), subset.enable_wildcard, tuple(order))


def first_texts(captions: pa.LargeListArray, places: Sequence[int] | None = None) -> pa.LargeStringArray:
    """The text of the first caption source that each image has, null for an image without any.

    `places` is the order in which the sources are tried, by default their own.
    """
    texts, offsets = captions.flatten(), captions.offsets.to_numpy()
    starts, counts = offsets[:-1] - offsets[0], np.diff(offsets)
    if places != () and (counts == 1).all():  # one source, as nearly always
        return texts
    first = pa.nulls(len(captions), pa.large_string())
    for place in range(counts.max(initial=0)) if places is None else places:
        first = pc.coalesce(first, texts.take(pa.array(starts + place, mask=counts <= place)))
    return first


class Rows:
    """Texts of the rows of an index."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.table = map_table(index.path, checked=False)
        """The table of the index."""

    def has(self, column: str) -> bool:
        """True if the index has this column."""
        return column in self.table.column_names

    def texts(self, start: int, end: int) -> pa.LargeStringArray:
        """The whole captions of the rows from `start` to `end`, null for an image without any."""
        return first_texts(self._captions(start, end))

    def _captions(self, start: int, end: int) -> pa.LargeListArray:
        return one_chunk(self.table["captions"].slice(start, end - start))

    def chunks(self) -> Iterator[tuple[int, pa.LargeStringArray]]:
        """The captions of all rows in chunks, each with the number of its first row."""
        for start in range(0, len(self.index), CHUNK):
            yield start, self.texts(start, start + CHUNK)

    def tags(self, rows: Int64[np.ndarray, " k"] | None = None) -> Iterator[pa.LargeListArray]:
        """The tags of all rows, or of these, in chunks of images with the same grammar."""
        total = len(self.index) if rows is None else len(rows)
        for start in range(0, total, CHUNK):
            chosen = slice(start, start + CHUNK) if rows is None else rows[start : start + CHUNK]
            if isinstance(chosen, slice):
                captions = self._captions(start, start + CHUNK)
            else:
                captions = one_chunk(self.table["captions"].take(chosen))
            grammar = self._grammar_of_subset[self.index.subset[chosen]]
            for number in np.unique(grammar).tolist():
                options = self._grammars[number]
                own = first_texts(captions.filter(pa.array(grammar == number)), options.sources)
                if not options.uses_all_lines:
                    own = pc.replace_substring_regex(own, r"(?s)\n.*", "")
                yield split_texts(own, options.separators)

    def separator(self, row: int) -> str:
        """The text between two tags of the row's caption."""
        return self.index.subsets[self.index.subset[row]].caption_separator

    @cached_property
    def _grammars(self) -> list[Grammar]:
        return sorted({Grammar.of(subset) for subset in self.index.subsets}, key=repr)

    @cached_property
    def _grammar_of_subset(self) -> np.ndarray:
        return np.array([self._grammars.index(Grammar.of(subset)) for subset in self.index.subsets])
