"""Stores: read latents and text encoder outputs by row of the index, from shards on the disk or in memory."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float16, Int64, Shaped

from sdxl_finetune.data.index import Index
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.latents.keys import RowKeys, latent_shape
from sdxl_finetune.latents.shards import PLACE, Library, nameless_file, set_aside


@dataclass(frozen=True)
class LatentStore:
    """The places of all latents of an index. A small value: copies in other processes read the same files."""

    index: Index
    table: Path
    """File with two PLACEs for each row of the index: the latent of the image as it is, and mirrored."""
    files: tuple[Path, ...]
    pixels_per_latent: int

    def __reduce__(self) -> tuple:
        return LatentStore, (self.index, self.table, self.files, self.pixels_per_latent)

    def read(self, rows: Sequence[int], mirrored: Sequence[bool]) -> Float16[np.ndarray, "k 4 h w"]:
        """Unscaled latents of images of one bucket. Raises UserError if the bytes differ from those written."""
        return np.stack([self._read(row, flip) for row, flip in zip(rows, mirrored, strict=True)])

    def _read(self, row: int, mirrored: bool) -> Float16[np.ndarray, "4 h w"]:
        number, crc, start = self.places[row, int(mirrored)].tolist()
        assert number >= 0, "the latent was not encoded"
        shape = latent_shape(self.index.buckets[self.index.bucket[row]], self.pixels_per_latent)
        return read_record(self.files[number], start, crc, shape, f"the latent of {self.index[row].path}")

    @cached_property
    def places(self) -> Shaped[np.ndarray, "n 2"]:
        return np.memmap(self.table, PLACE, mode="r").view(np.ndarray).reshape(-1, 2)


@dataclass(frozen=True)
class TextStore:
    """The places of the text encoders' outputs of all captions of an index. A small value, as a LatentStore."""

    index: Index
    table: Path
    """File with `variants` PLACEs for each row of the index, and in its last row those of the empty caption."""
    files: tuple[Path, ...]
    variants: int
    """Number of variants of each caption."""
    hidden_shape: tuple[int, int]
    """Positions and channels of the hidden states."""
    pooled_size: int
    """Channels of the pooled output."""

    def __reduce__(self) -> tuple:
        return TextStore, (self.index, self.table, self.files, self.variants, self.hidden_shape, self.pooled_size)

    def read(
        self, rows: Sequence[int | None], draws: Sequence[float]
    ) -> tuple[Float16[np.ndarray, "k t c"], Float16[np.ndarray, "k p"]]:
        """Hidden states and pooled outputs of the captions of these rows; None means the empty caption.

        A random number from 0 to 1 chooses among the variants of each caption. Raises UserError if the bytes differ
        from those written.
        """
        records = np.stack([self._read(row, draw) for row, draw in zip(rows, draws, strict=True)])
        hidden, pooled = np.split(records, [int(np.prod(self.hidden_shape))], axis=1)
        return hidden.reshape(len(rows), *self.hidden_shape), pooled

    def _read(self, row: int | None, draw: float) -> Float16[np.ndarray, " n"]:
        number, crc, start = self.places[-1 if row is None else row, int(draw * self.variants)].tolist()
        assert number >= 0, "the caption was not encoded"
        size = int(np.prod(self.hidden_shape)) + self.pooled_size
        caption = "the empty caption" if row is None else f"the caption of {self.index[row].path}"
        return read_record(self.files[number], start, crc, (size,), f"the text encoders' output for {caption}")

    @cached_property
    def places(self) -> Shaped[np.ndarray, "n v"]:
        return np.memmap(self.table, PLACE, mode="r").view(np.ndarray).reshape(-1, self.variants)


def read_record(path: Path, start: int, crc: int, shape: tuple[int, ...], what: str) -> Float16[np.ndarray, "..."]:
    """Reads a record of this shape at position `start` of a shard. Raises UserError if its checksum is not `crc`."""
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            data = file.read(2 * int(np.prod(shape)))
    except OSError as error:
        message = f"{what} cannot be read ({error.strerror}): start the run again"
        raise UserError(Problem(message, file=str(path))) from None
    if zlib.crc32(data) != crc:
        aside = set_aside(path).name
        message = f"{what} is damaged; the file is renamed to {aside}: start the run again, which encodes it again"
        raise UserError(Problem(message, file=str(path)))
    return np.frombuffer(data, np.float16).reshape(shape)


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
    files: tuple[Path, ...],
    *,
    pixels_per_latent: int,
    scratch: Path,
) -> LatentStore:
    """The store of an index whose latents are at these places in these files.

    `scratch` is the folder for a temporary file, on systems without files in memory.
    """
    return LatentStore(index, write_table(places, scratch), files, pixels_per_latent)
