"""Images that occur more than once: files of equal content, and images with equal captions.

The latent cache knows the hash of each file's content. Without it, files of equal size in bytes and in pixels are
candidates. Some candidates are then read, to see how many of them are duplicates.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, Shaped

from sdxl_finetune.config import Config
from sdxl_finetune.data.images import ImageError
from sdxl_finetune.data.index import Index
from sdxl_finetune.latents.catalogue import CATALOGUE, Shelf
from sdxl_finetune.latents.keys import hash16
from sdxl_finetune.latents.library import Library
from sdxl_finetune.latents.shards import Kind

logger = logging.getLogger(__name__)

EXAMPLES = 6
"""Groups that the page shows."""
READ = 500
"""Candidates that are read at most: a few seconds on a local disk."""


@dataclass(frozen=True)
class Groups:
    """Rows that are equal to one another, in groups of two and more."""

    groups: int
    rows: int
    """Rows in all groups."""
    largest: Sequence[Int64[np.ndarray, " _"]]
    """The largest groups, at most EXAMPLES."""

    @property
    def surplus(self) -> int:
        """Rows beyond the first of each group."""
        return self.rows - self.groups


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """Files of equal content."""

    groups: Groups
    is_content: bool
    """True if the contents were compared; False if the groups are candidates of equal size."""
    read: int = 0
    """Candidates that were read."""
    confirmed: int = 0
    """Candidates among them whose content equals that of another file in their group."""


def group_rows(columns: Sequence[Shaped[np.ndarray, " n"]], most: int = EXAMPLES) -> Groups:
    """Groups the rows that are equal in all columns."""
    order = np.lexsort(list(columns))
    if not len(order):
        return Groups(0, 0, [])
    is_new = np.zeros(len(order), bool)
    is_new[0] = True
    for column in columns:
        values = column[order]
        is_new[1:] |= values[1:] != values[:-1]
    starts = np.flatnonzero(is_new)
    sizes = np.diff(starts, append=len(order))
    several = np.flatnonzero(sizes > 1)
    chosen = several[np.argsort(-sizes[several], kind="stable")[:most]]
    largest = [np.sort(order[starts[place] : starts[place] + sizes[place]]) for place in chosen.tolist()]
    return Groups(len(several), int(sizes[several].sum()), largest)


def find_duplicates(index: Index, options: Config) -> Duplicates:
    """Finds duplicate files by the content hashes of the latent cache, or else candidates by their size."""
    contents = cached_contents(index, options)
    if contents is not None:
        return Duplicates(groups=group_rows([contents]), is_content=True)
    columns = [index.numbers(name) for name in ("bytes", "width", "height")]
    candidates = group_rows(columns, most=READ // 2)
    return _confirm(candidates, lambda row: index[row].read())


def cached_contents(index: Index, options: Config) -> Int64[np.ndarray, " n"] | None:
    """The first half of each file's content hash, from the shards of any VAE; None if a file is unknown there."""
    kinds = [Kind("latents", folder.name) for folder in sorted((options.cache_folder / "latents").glob("*"))]
    shelves = [
        Shelf(kind.folder(options.cache_location), kind, kind.folder(options.cache_folder) / CATALOGUE)
        for kind in kinds
    ]
    shards = [shard for shelf in shelves for shard in shelf.open(check=False)]
    known, contents = Library(shards).contents(index.stat_hashes)
    if len(known) < len(index):
        return None
    return np.ascontiguousarray(contents[:, :8]).view(np.int64)[:, 0]


def _confirm(candidates: Groups, read: Callable[[int], bytes]) -> Duplicates:
    """Reads candidates, whole groups at a time, and keeps the groups of equal content."""
    total, found = 0, []
    for group in candidates.largest:
        if total + len(group) > READ:
            continue
        total += len(group)
        try:
            hashes = np.array([int.from_bytes(hash16(read(row))[:8], "little") for row in group.tolist()], np.uint64)
        except (OSError, ImageError) as error:
            logger.warning("duplicates: %s", error)
            continue
        found += [group[rows] for rows in group_rows([hashes]).largest]
    found.sort(key=len, reverse=True)
    confirmed = sum(map(len, found))
    if total == candidates.rows:  # all of them were read
        return Duplicates(groups=Groups(len(found), confirmed, found[:EXAMPLES]), is_content=True)
    groups = Groups(candidates.groups, candidates.rows, found[:EXAMPLES])
    return Duplicates(groups=groups, is_content=False, read=total, confirmed=confirmed)
