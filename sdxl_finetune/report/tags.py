"""Statistics of tags: how many images have each tag, and which tags occur together.

Captions are split in columns, a chunk of images at a time. A tag counts once for each image. Counts are exact up to
MOST_TAGS different tags. Captions in whole sentences may have more. Then the rarest ones are dropped while counting, so
that memory is bounded. Pairs of tags are counted in a sample.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float64, Int64
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.sparse import csr_matrix

from sdxl_finetune.data.tag_columns import with_one_separator

CHUNK = 1 << 16
"""Images whose captions are split at once."""
MOST_TAGS = 2_000_000
"""Different tags that are kept while counting."""
SAMPLE = 200_000
"""Images in which pairs of tags are counted; all images if there are fewer."""
PAIRED = 1000
"""Most frequent tags among which pairs are looked for."""
SHOWN_PAIRS, SHOWN_TAGS = 20, 30
"""Pairs in the table, and tags on the map."""
ERRORS = 2
"""Standard errors of a count that are subtracted before pairs are ordered: else chance would put rare pairs first."""


@dataclass(frozen=True)
class Tags:
    """Tags of all captions."""

    names: Sequence[str]
    """The most frequent tag first; tags in equally many images are ordered by name."""
    images: Int64[np.ndarray, " tags"]
    """Number of images that have each tag."""
    per_image: Int64[np.ndarray, " k"]
    """Number of images that have 0, 1, 2, ... tags."""
    dropped: int
    """Number of rare tags that were dropped while counting."""


@dataclass(frozen=True)
class Pair:
    """Two tags that occur together more often than by chance."""

    first: str
    second: str
    images: int
    """Images of the sample that have both tags."""
    lift: float
    """How many times more often they occur together than if they were independent: P(a and b) / (P(a) P(b))."""
    of_first: float
    """Share of the images with the first tag that have the second one too."""
    of_second: float


@dataclass(frozen=True)
class Together:
    """Tags that occur together, in a sample of the images."""

    sample: int
    """Images of the sample."""
    names: Sequence[str]
    """The most frequent tags, ordered so that tags that occur together are neighbours."""
    counts: Int64[np.ndarray, "tags tags"]
    """Images that have both tags; on the diagonal, images that have the tag."""
    pairs: Sequence[Pair]
    """The pairs with the highest lift, the highest first. Rare pairs stand lower, because their lift is less sure."""
    least: int
    """Images that a pair must occur in to be considered."""


class TagCounter:
    """Counts the images of each tag, one chunk of captions after the other."""

    def __init__(self, most: int = MOST_TAGS) -> None:
        self._most = most
        self._counts = pa.table({"tag": pa.array([], pa.large_string()), "images": pa.array([], pa.int64())})
        self._pending: list[pa.Table] = []
        self._waiting = 0
        self._per_image = np.zeros(0, np.int64)
        self._dropped = 0

    def add(self, tags: pa.LargeListArray) -> None:
        """Adds the tags of a chunk of images."""
        rows, found = unique_tags(tags)
        counted = np.bincount(found.indices.to_numpy(), minlength=len(found.dictionary))
        self._pending.append(pa.table({"tag": found.dictionary, "images": pa.array(counted, pa.int64())}))
        self._waiting += len(found.dictionary)
        each = np.bincount(np.bincount(rows, minlength=len(tags)))
        size = max(len(each), len(self._per_image))
        self._per_image = np.pad(self._per_image, (0, size - len(self._per_image)))
        self._per_image[: len(each)] += each
        # The cost of joining grows with the tags so far. It is paid only when as many have come in again.
        if self._waiting > max(self._counts.num_rows, 1 << 20):
            self._join()

    def result(self) -> Tags:
        """The tags of all images that were added."""
        self._join()
        counts = self._counts.sort_by([("images", "descending"), ("tag", "ascending")])
        names = counts["tag"].combine_chunks()
        return Tags(ArrowNames(names), counts["images"].to_numpy(), self._per_image, self._dropped)

    def _join(self) -> None:
        joined = pa.concat_tables([self._counts, *self._pending]).group_by("tag").aggregate([("images", "sum")])
        self._pending, self._waiting = [], 0
        images = joined["images_sum"]
        if (excess := joined.num_rows - self._most) > 0:
            kept = np.argsort(images.to_numpy(), kind="stable")[excess:]
            joined, images = joined.take(kept), images.take(kept)
            self._dropped += excess
        self._counts = pa.table({"tag": joined["tag"], "images": images})


class ArrowNames(Sequence[str]):
    """Text in an Arrow column as a sequence. Only the names that are asked for become Python objects."""

    def __init__(self, column: pa.ChunkedArray | pa.Array) -> None:
        self.column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, place):  # type: ignore[no-untyped-def]
        found = self.column[place]
        return found.to_pylist() if isinstance(place, slice) else found.as_py()


def split_texts(texts: pa.LargeStringArray, separators: Iterable[str]) -> pa.LargeListArray:
    """Splits captions into tags at any of the separators. Tags are stripped; empty tags and null captions vanish."""
    first, *_ = separators = tuple(separators)
    parts = pc.split_pattern(pc.fill_null(with_one_separator(texts, separators), ""), first)
    tags = pc.utf8_trim_whitespace(parts.flatten())
    kept = pc.not_equal(tags, "").to_numpy(zero_copy_only=False)
    before = np.concatenate([[0], np.cumsum(kept)])
    offsets = parts.offsets.to_numpy()
    return pa.LargeListArray.from_arrays(before[offsets - offsets[0]], tags.filter(pa.array(kept)))


def unique_tags(tags: pa.LargeListArray) -> tuple[Int64[np.ndarray, " k"], pa.DictionaryArray]:
    """The rows and tags of images, each tag once for an image, as a row number and a code in a dictionary."""
    rows = pc.list_parent_indices(tags).to_numpy()
    encoded = tags.flatten().dictionary_encode()
    size = max(1, len(encoded.dictionary))
    keys = np.sort(rows.astype(np.int64) * size + encoded.indices.to_numpy())
    keys = keys[np.diff(keys, prepend=-1) > 0]  # np.unique is ten times slower
    codes = pa.array((keys % size).astype(np.int32))
    return keys // size, pa.DictionaryArray.from_arrays(codes, encoded.dictionary)


def count_together(chunks: Iterable[pa.LargeListArray], tags: Tags) -> Together:
    """Counts in a sample of images, given in chunks, how often the most frequent tags occur together."""
    names = pa.array(tags.names[:PAIRED], pa.large_string())
    counts = np.zeros((len(names), len(names)), np.int64)
    sample = 0
    for chunk in chunks:
        sample += len(chunk)
        rows, found = unique_tags(chunk)
        code = pc.index_in(found.dictionary, value_set=names).fill_null(-1).to_numpy()[found.indices.to_numpy()]
        rows, code = rows[code >= 0], code[code >= 0]
        has = csr_matrix((np.ones(len(rows), np.int32), (rows, code)), shape=(len(chunk), len(names)))
        counts += (has.T @ has).toarray()
    least = min(50, max(5, sample // 500))  # the lift of rarer pairs is chance
    order = neighbours(counts[:SHOWN_TAGS, :SHOWN_TAGS])
    shown = [tags.names[place] for place in order.tolist()]
    return Together(
        sample, shown, counts[np.ix_(order, order)], _pairs(counts, names.to_pylist(), sample, least), least
    )


def neighbours(counts: Int64[np.ndarray, "k k"]) -> Int64[np.ndarray, " k"]:
    """An order of tags in which tags that occur together are neighbours, by hierarchical clustering."""
    if len(counts) < 3:
        return np.arange(len(counts))
    own = np.diag(counts).astype(np.float64).clip(min=1)
    distance = 1 - counts / np.sqrt(np.outer(own, own))
    condensed = distance[np.triu_indices(len(counts), 1)].clip(min=0)
    return leaves_list(linkage(condensed, "average", optimal_ordering=True)).astype(np.int64)


def _pairs(counts: Int64[np.ndarray, "k k"], names: Sequence[str], sample: int, least: int) -> list[Pair]:
    """The pairs that occur in at least `least` images, the highest lift, less its standard errors, first."""
    own = np.diag(counts).astype(np.float64).clip(min=1)
    lift: Float64[np.ndarray, "k k"] = np.triu(counts * sample / np.outer(own, own), 1)
    lift[counts < least] = 0
    surely = lift * (1 - ERRORS / np.sqrt(counts.clip(min=1)))
    first, second = np.nonzero(surely > 1)
    order = np.argsort(-surely[first, second], kind="stable")[:SHOWN_PAIRS]
    return [
        Pair(names[a], names[b], int(counts[a, b]), float(lift[a, b]), counts[a, b] / own[a], counts[a, b] / own[b])
        for a, b in zip(first[order].tolist(), second[order].tolist(), strict=True)
    ]
