"""Stores: read latents and text encoder outputs by row of the index, from shards on the disk or in memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from jaxtyping import Float16, Int64, Shaped

from sdxl_finetune.batch import LatentSize
from sdxl_finetune.data.index import Index
from sdxl_finetune.latents.keys import RowKeys
from sdxl_finetune.latents.library import PLACE, Library
from sdxl_finetune.latents.records import Records
from sdxl_finetune.latents.shards import nameless_file
from sdxl_finetune.storage import LocalCopies, Location


@dataclass(frozen=True)
class LatentStore:
    """The places of all latents of an index. A small value: copies in other processes read the same files."""

    index: Index
    table: Path
    """File with two PLACEs for each row of the index: the latent of the image as it is, and mirrored."""
    records: Records
    latent_size: LatentSize

    def __reduce__(self) -> tuple:
        return LatentStore, (self.index, self.table, self.records, self.latent_size)

    def read(self, rows: Sequence[int], mirrored: Sequence[bool]) -> Float16[np.ndarray, "k c h w"]:
        """Unscaled latents of images of one bucket. Raises UserError if the bytes differ from those written."""
        bucket = self.index.buckets[self.index.bucket[rows[0]]]
        latents = np.empty((len(rows), *self.latent_size.of(bucket)), np.float16)
        for row, flip, latent in zip(rows, mirrored, latents, strict=True):
            number, crc, start = self.places[row, int(flip)].tolist()
            assert number >= 0, "the latent was not encoded"
            self.records.read(number, start, crc, latent, partial(self._describe, row))
        return latents

    def _describe(self, row: int) -> str:
        return f"the latent of {self.index[row].path}"

    @cached_property
    def places(self) -> Shaped[np.ndarray, "n 2"]:
        return np.memmap(self.table, PLACE, mode="r").view(np.ndarray).reshape(-1, 2)


@dataclass(frozen=True)
class TextStore:
    """The places of the text encoders' outputs of all captions of an index. A small value, as a LatentStore."""

    index: Index
    table: Path
    """File with `variants` PLACEs for each row of the index, and in its last row those of the empty caption."""
    records: Records
    variants: int
    """Number of variants of each caption."""
    hidden_shape: tuple[int, int]
    """Positions and channels of the hidden states."""
    pooled_size: int
    """Channels of the pooled output."""

    def __reduce__(self) -> tuple:
        return TextStore, (self.index, self.table, self.records, self.variants, self.hidden_shape, self.pooled_size)

    def read(
        self, rows: Sequence[int | None], draws: Sequence[float]
    ) -> tuple[Float16[np.ndarray, "k t c"], Float16[np.ndarray, "k p"]]:
        """Hidden states and pooled outputs of the captions of these rows; None means the empty caption.

        A random number from 0 to 1 chooses among the variants of each caption. Raises UserError if the bytes differ
        from those written.
        """
        size = int(np.prod(self.hidden_shape))
        outputs = np.empty((len(rows), size + self.pooled_size), np.float16)
        for row, draw, output in zip(rows, draws, outputs, strict=True):
            number, crc, start = self.places[-1 if row is None else row, int(draw * self.variants)].tolist()
            assert number >= 0, "the caption was not encoded"
            self.records.read(number, start, crc, output, partial(self._describe, row))
        return outputs[:, :size].reshape(len(rows), *self.hidden_shape), outputs[:, size:]

    def _describe(self, row: int | None) -> str:
        caption = "the empty caption" if row is None else f"the caption of {self.index[row].path}"
        return f"the text encoders' output for {caption}"

    @cached_property
    def places(self) -> Shaped[np.ndarray, "n v"]:
        return np.memmap(self.table, PLACE, mode="r").view(np.ndarray).reshape(-1, self.variants)


def write_table(places: Shaped[np.ndarray, "n v"], scratch: Path) -> Path:
    """Writes a table of PLACEs to a file in memory, or on systems without such files to the folder `scratch`."""
    table = nameless_file(scratch)
    table.write_bytes(places.tobytes())
    return table


def find_places(index: Index, keys: RowKeys, library: Library) -> Shaped[np.ndarray, "n 2"]:
    """The PLACEs of the latents of every row: of the image as it is, and mirrored if flip_aug is on for it."""
    places = np.full((len(index), 2), np.array((-1, 0, 0), PLACE))
    known, contents = library.contents(keys.stat_hashes)
    places[known, 0] = library.places(keys.keys(known, contents, False))
    flipped = index.flips[known]
    places[known[flipped], 1] = library.places(keys.keys(known[flipped], contents[flipped], True))
    return places


def missing_rows(index: Index, places: Shaped[np.ndarray, "n 2"]) -> Int64[np.ndarray, " k"]:
    """The rows in use of which a latent is missing, ordered by bucket."""
    missing = places["file"] < 0
    rows = np.flatnonzero(index.used & (missing[:, 0] | (index.flips & missing[:, 1])))
    return rows[np.argsort(index.bucket[rows], kind="stable")]


def build_store(
    index: Index,
    places: Shaped[np.ndarray, "n 2"],
    files: tuple[Location, ...],
    copies: LocalCopies | None = None,
    *,
    latent_size: LatentSize,
    scratch: Path,
) -> LatentStore:
    """The store of an index whose latents are at these places in these files.

    `scratch` is the folder for a temporary file, on systems without files in memory.
    """
    return LatentStore(index, write_table(places, scratch), Records(files, copies), latent_size)
