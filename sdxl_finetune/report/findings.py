"""Things about a dataset that a person should look at, by kind, with a few examples of each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int64

from sdxl_finetune.data.index import Index
from sdxl_finetune.report.captions import Lengths
from sdxl_finetune.report.rows import Rows
from sdxl_finetune.report.sizes import MOST_ENLARGED, MUCH_CUT, Sizes

EXAMPLES = 6
"""Images that are shown of each kind."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """An image, or a file that is not in the index."""

    name: str
    note: str = ""
    row: int | None = None


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Images of one kind, or files that cannot be used."""

    title: str
    """Words that stand after the number of images or files."""
    remedy: str
    """Says what follows and what can be done."""
    count: int
    total: int
    """Images of which `count` were found. It is smaller than the dataset where only a sample was looked at."""
    examples: Sequence[Example] = ()
    is_problem: bool = False
    """True for files that cannot be used at all."""

    @property
    def share(self) -> float:
        return self.count / self.total


def find_in_sizes(index: Index, sizes: Sizes) -> list[Finding]:
    """Images that are enlarged much, and images of which much is cut off. The examples are the worst ones."""
    enlarged = Finding(
        title=f"enlarged to more than {MOST_ENLARGED:g} times their size",
        remedy="They look blurred, and the model learns that. Remove them, or set bucket_no_upscale = true.",
        **_worst(index, sizes.scale, MOST_ENLARGED, lambda row: f"enlarged {sizes.scale[row]:.2f} times"),
    )
    cut = Finding(
        title=f"of which the crop removes more than {MUCH_CUT * 100:.0f} %",
        remedy="Parts of these images are never seen. More buckets fit them better: lower bucket_reso_steps,"
        " or widen min_bucket_reso and max_bucket_reso.",
        **_worst(index, sizes.cut, MUCH_CUT, lambda row: f"{sizes.cut[row] * 100:.0f} % cut off"),
    )
    return [finding for finding in (enlarged, cut) if finding.count]


def _worst(index: Index, values: np.ndarray, limit: float, note: Callable[[int], str]) -> dict:
    rows = np.flatnonzero(values > limit)
    # Sorting only the largest values would not help: this is a sort of the rows above the limit.
    chosen = rows[np.argsort(-values[rows], kind="stable")[:EXAMPLES]].tolist()
    examples = [Example(name=str(index[row].path), note=f"{_size(index, row)}, {note(row)}", row=row) for row in chosen]
    return {"count": len(rows), "total": len(index), "examples": examples}


def _size(index: Index, row: int) -> str:
    width, height = index[row].size
    return f"{width}×{height}"


class CaptionFindings:
    """Counts images without a caption and captions that are used in part, one chunk after the other."""

    def __init__(self, index: Index) -> None:
        self._index = index
        # The words of a folder's name take the place of all texts that an image lacks.
        self._is_named = np.array([subset.class_tokens is not None for subset in index.subsets])
        self._uses_first = ~np.array([subset.enable_wildcard for subset in index.subsets])
        self._empty, self._lines = _First(), _First()

    def add(self, start: int, texts: pa.LargeStringArray) -> None:
        """Adds the captions of the rows from `start`."""
        subset = self._index.subset[start : start + len(texts)]
        is_empty = pc.equal(pc.fill_null(texts, ""), "").to_numpy(zero_copy_only=False)
        is_null = texts.is_null().to_numpy(zero_copy_only=False)
        self._empty.add(start, is_empty & ~(is_null & self._is_named[subset]))
        has_lines = pc.fill_null(pc.match_substring(texts, "\n"), False).to_numpy(zero_copy_only=False)
        self._lines.add(start, has_lines & self._uses_first[subset])

    def result(self) -> list[Finding]:
        """The findings about the captions that were added."""
        empty = self._finding(
            self._empty,
            "without a caption",
            "They are trained with an empty text. Add captions, check caption_extension, or remove the images.",
        )
        lines = self._finding(
            self._lines,
            "with a caption of several lines, of which only the first is used",
            "Set enable_wildcard = true to draw one of the lines each time, or join the lines.",
        )
        return [finding for finding in (empty, lines) if finding.count]

    def _finding(self, found: "_First", title: str, remedy: str) -> Finding:
        examples = [
            Example(name=str(self._index[row].path), note=_size(self._index, row), row=row) for row in found.rows
        ]
        return Finding(title=title, remedy=remedy, count=found.count, total=len(self._index), examples=examples)


class _First:
    """Counts rows and keeps the first."""

    def __init__(self) -> None:
        self.count = 0
        self.rows: list[int] = []

    def add(self, start: int, found: Bool[np.ndarray, " k"]) -> None:
        places: Int64[np.ndarray, " j"] = np.flatnonzero(found)
        self.count += len(places)
        self.rows += (start + places[: EXAMPLES - len(self.rows)]).tolist()


def find_cut_captions(rows: Rows, lengths: Lengths) -> list[Finding]:
    """Captions that are longer than max_token_length. The examples are the longest ones."""
    limit = lengths.configured
    if not limit.cut:
        return []
    longest = np.argsort(-lengths.lost, kind="stable")[: min(EXAMPLES, limit.cut)].tolist()
    examples = [
        Example(
            name=str(rows.index[row := int(lengths.rows[place])].path),
            note=f"{lengths.lengths[place]} tokens, {lengths.lost[place]} are cut off",
            row=row,
        )
        for place in longest
    ]
    fitting = next((one for one in lengths.limits if one.tokens > limit.tokens and one.cut < limit.cut / 2), None)
    share = f"{fitting.cut / len(lengths.rows) * 100:.1f} %" if fitting else ""
    remedy = f"max_token_length = {fitting.tokens} would cut {share} of the captions." if fitting else "Shorten them."
    return [
        Finding(
            title=f"with a caption of more than {limit.tokens} tokens",
            remedy=f"The model does not see the rest. {remedy}",
            count=limit.cut,
            total=len(lengths.rows),
            examples=examples,
        )
    ]
