"""Chunks of a metadata file: entries in columns, before the files of their images are looked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute

from sdxl_finetune.config.dataset import Subset
from sdxl_finetune.data.sources.listed import LISTED
from sdxl_finetune.errors import Problem

GIVEN = ("name", "captions", "width", "height", "train_width", "train_height", "score")
"""Columns of LISTED that a metadata file may give."""
ENTRIES = pa.schema([pa.field("number", pa.int64()), *(LISTED.field(name) for name in GIVEN)])
"""Columns of the valid entries of a metadata file: those of LISTED, and the number of the line, row or entry from 1.

The name is as it stands in the file: absolute or below the subset's folder, with or without the file's ending."""
USUAL = {"path": "image_path"}
"""Names of columns that differ from what they hold."""


@dataclass(frozen=True)
class Fields:
    """Names of the columns or keys of a metadata file."""

    given: Mapping[str, str] = field(default_factory=dict)
    """Names that the user gave (metadata_columns), by what the column holds, as {"path": "key"}."""
    sources: Sequence[str | None] = ()
    """Columns or keys that hold the texts of a caption set, None for a file. Empty: `caption` and `tags` are joined."""
    ignores_captions: bool = False
    """True if all caption sources are files beside the images."""

    beside: bool = False
    """True if images in tar files or an object store may have texts beside them, for entries without a caption."""

    def one(self, what: str) -> str:
        """The name of the key that holds this."""
        return self.given.get(what) or USUAL.get(what, what)


@dataclass(frozen=True)
class Chunk:
    """Neighbouring entries of a metadata file."""

    table: pa.Table
    """The valid ones, with the columns of ENTRIES."""
    problems: Sequence[Problem]
    """Problems of the others: the first of them, if there are many of one kind."""
    more: Mapping[Problem, int] = field(default_factory=dict)
    """Number of further problems of the same kind as one of `problems`."""


def fields_of(subset: Subset, *, beside: bool) -> Fields:
    """The names of columns or keys for a subset. For `beside` see Fields."""
    given = column_names(subset)
    sources = [None if one.is_file else given.get(one.name, one.name) for one in subset.caption_sources or ()]
    if any(sources):
        return Fields(given, sources, beside=beside)
    return Fields(given, ignores_captions=bool(sources), beside=beside)


def column_names(subset: Subset) -> dict[str, str]:
    """The names that `metadata_columns` gives, by what the columns hold."""
    return dict(text.split("=", 1) for text in subset.metadata_columns or ())


def joined_caption(subset: Subset, caption: str, tags: str) -> str:
    """The caption, then the tags. With enable_wildcard the tags follow each line of the caption.

    The reference's code is `FineTuningDataset.__init__`. There, tags without a caption are lost with enable_wildcard.
    """
    if not tags:
        return caption
    if not subset.enable_wildcard:
        return f"{caption}{subset.caption_separator}{tags}" if caption else tags
    tags = tags.replace("\n", subset.caption_separator)
    lines = [line for line in caption.split("\n") if line.strip()]
    return "\n".join(f"{line}{subset.caption_separator}{tags}" for line in lines) or tags


def joined_captions(subset: Subset, caption: pa.Array, tags: pa.Array) -> pa.Array:
    """The caption and the tags of each row as in `joined_caption`. Null counts as an empty text."""
    caption, tags = caption.fill_null(""), tags.fill_null("")
    if subset.enable_wildcard:
        both = zip(caption.to_pylist(), tags.to_pylist(), strict=True)
        return pa.array([joined_caption(subset, *texts) for texts in both], pa.large_string())
    joined = pa.compute.binary_join_element_wise(caption, tags, pa.scalar(subset.caption_separator, pa.large_string()))
    has_both = pa.compute.and_(pa.compute.not_equal(caption, ""), pa.compute.not_equal(tags, ""))
    either = pa.compute.if_else(pa.compute.equal(caption, ""), tags, caption)
    return pa.compute.if_else(has_both, joined, either)


def without_empty(texts: pa.Array) -> pa.Array:
    """The texts, with null for empty ones: an image lacks a caption source whose text is empty."""
    return pa.compute.if_else(pa.compute.equal(texts, ""), None, texts)


def as_lists(texts: Sequence[pa.Array]) -> pa.Array:
    """The texts of each row as a list. `texts` has one array for each caption source."""
    count, size = len(texts), len(texts[0])
    # All texts of one source stand after those of another. They are brought into the order of the rows.
    order = np.arange(count * size).reshape(count, size).T.ravel()
    offsets = pa.array(np.arange(0, count * size + 1, count), pa.int64())
    return pa.LargeListArray.from_arrays(offsets, pa.concat_arrays(texts).take(pa.array(order)))
