"""The mask cache: masks at the size of latents, in shards as latents are (shards.py).

A mask's key is hash(content of its file) XOR hash(size of its image, way into the bucket, channel). Latents and
masks are separate records: a new mask leaves the latent valid. A mask is stored once, because the mirrored mask is its
mirror image.
"""

import os
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Float16, Int64, Shaped, UInt8

from sdxl_finetune.batch import LatentSize
from sdxl_finetune.config import Config
from sdxl_finetune.data.buckets import crop_left_top
from sdxl_finetune.data.contents import absolute
from sdxl_finetune.data.images import ImageError
from sdxl_finetune.data.index import Index
from sdxl_finetune.data.inspection import hash_of_stat
from sdxl_finetune.data.masks import find_mask, latent_mask, load_mask, read_mask
from sdxl_finetune.data.remarks import report_bad_images
from sdxl_finetune.errors import Problem, Tally
from sdxl_finetune.latents.alone import again_if_filled
from sdxl_finetune.latents.keys import hash16
from sdxl_finetune.latents.library import PLACE, Library
from sdxl_finetune.latents.records import Records
from sdxl_finetune.latents.shards import Kind, ShardWriter
from sdxl_finetune.latents.store import write_table
from sdxl_finetune.latents.together import (
    check_complete,
    encode_in_rounds,
    find_team,
    join_shards,
    open_together,
    readable_shards,
)
from sdxl_finetune.runtime.signals import StopRequest

VERSION = "1"
"""Version of the way from a mask's file to its record. Another version gives other keys."""
RESIZED = ("resized_width", "resized_height")
"""Columns of the size before the crop."""
CHUNK = 64
"""Masks that the threads read before the records are written."""


@dataclass(frozen=True)
class MaskStore:
    """The places of the masks of an index. A small value: copies in other processes read the same files."""

    index: Index
    table: Path
    """File with one PLACE for each row of the index."""
    records: Records
    pixels_per_latent: int

    def __reduce__(self) -> tuple:
        return MaskStore, (self.index, self.table, self.records, self.pixels_per_latent)

    def read(self, rows: Sequence[int], mirrored: Sequence[bool]) -> Float16[np.ndarray, "k h w"]:
        """Masks of images of one bucket, 0 to 1. An image without a mask counts fully.

        Raises UserError if the bytes differ from those written.
        """
        masks = [self._read(row) for row in rows]
        return np.stack([mask[:, ::-1] if flip else mask for mask, flip in zip(masks, mirrored, strict=True)])

    def _read(self, row: int) -> Float16[np.ndarray, "h w"]:
        number, crc, start = self.places[row].tolist()
        _, *shape = LatentSize(self.pixels_per_latent).of(self.index.buckets[self.index.bucket[row]])
        if number < 0:
            return np.ones(shape, np.float16)
        mask = np.empty(shape, np.float16)
        self.records.read(number, start, crc, mask, lambda: f"the mask of {self.index[row].path}")
        return mask

    @cached_property
    def places(self) -> Shaped[np.ndarray, " n"]:
        return np.memmap(self.table, PLACE, mode="r").view(np.ndarray)


@dataclass(frozen=True)
class MaskFiles:
    """The files of the masks in use, ordered by bucket."""

    rows: Int64[np.ndarray, " k"]
    stat_hashes: UInt8[np.ndarray, "k 16"]
    geometry_hashes: UInt8[np.ndarray, "k 16"]

    def places(self, library: Library) -> Shaped[np.ndarray, " k"]:
        """The PLACE of each mask in the shards."""
        places = np.full(len(self.rows), np.array((-1, 0, 0), PLACE))
        known, contents = library.contents(self.stat_hashes)
        places[known] = library.places(contents ^ self.geometry_hashes[known])
        return places


@dataclass(frozen=True)
class MaskEncoding:
    """Inputs and results that all masks of one pass share."""

    index: Index
    files: MaskFiles
    known: Library
    pixels_per_latent: int
    threads: int
    bad: dict[int, Problem] = field(default_factory=dict)
    """Problems of masks that could not be read, by row."""
    claims: set[bytes] = field(default_factory=set)
    """Keys of the masks that were made. Equal masks are stored once."""


@again_if_filled
def prepare_masks(
    index: Index, config: Config, accelerator: Accelerator, pixels_per_latent: int, stop: StopRequest | None = None
) -> tuple[Index, MaskStore | None]:
    """Returns the masks of all images in use, None if no image has one, and the index without images of bad masks.

    Masks that exist are found again; the missing ones are made. Raises UserError, and Interrupt once `stop` was
    requested.
    """
    if not index.has_mask.any():
        return index, None
    kind = Kind("masks", f"{VERSION}-{pixels_per_latent}")
    scratch = config.cache_folder
    team = find_team(accelerator, kind, config, on_disk=config.cache_latents_to_disk)
    shards = open_together(team, accelerator)
    files, bad = find_mask_files(index)
    library = Library(shards)
    missing = np.flatnonzero(files.places(library)["file"] < 0)
    if sum(gather_object([len(missing)])):
        threads = max(1, (os.cpu_count() or 1) // team.ranks_here)
        job = MaskEncoding(index, files, library, pixels_per_latent, threads)
        own = missing[team.share]
        with team.writer() as writer:
            encode_in_rounds(encode_masks(job, own, writer), len(own), writer, team, stop, "masks")
        library = Library(join_shards(team, shards, readable_shards(team, writer.shards)))
        for problems in gather_object([job.bad]):
            bad |= problems
    if accelerator.is_main_process or config.on_bad_image == "stop":
        report_bad_images(Tally(bad.values()), config.on_bad_image)
    index = index.without(bad) if bad else index
    places = np.full(len(index), np.array((-1, 0, 0), PLACE))
    places[files.rows] = files.places(library)
    complete = bool((places["file"][index.used & index.has_mask] >= 0).all())
    check_complete(team, complete=complete)
    records = Records(library.files, team.copies)
    return index, MaskStore(index, write_table(places[:, None], scratch), records, pixels_per_latent)


def find_mask_files(index: Index) -> tuple[MaskFiles, dict[int, Problem]]:
    """Looks for the file of every mask in use. Returns the files, and problems of missing files by row."""
    rows = np.flatnonzero(index.used & index.has_mask)
    rows = rows[np.argsort(index.bucket[rows], kind="stable")]
    stat_hashes, bad = index.stat_hashes[rows], dict[int, Problem]()
    places = np.flatnonzero(index.has_mask_file[rows])
    if len(places):
        own = rows[places]
        for row in own[index.numbers("mask_bytes")[own] < 0].tolist():
            try:
                find_mask(index[row])
            except ImageError as error:  # noqa: PERF203 (rows without a usable mask alone)
                bad[row] = Problem(error.reason, file=error.path)
        stat_hashes[places] = _stat_hashes(index, own)
    kept = ~np.isin(rows, list(bad))
    return MaskFiles(rows[kept], stat_hashes[kept], _geometry_hashes(index, rows[kept])), bad


def _geometry_hashes(index: Index, rows: Int64[np.ndarray, " k"]) -> UInt8[np.ndarray, "k 16"]:
    """Hashes of all that masks depend on besides the content of their files. Equal geometry is hashed once."""
    columns = [index.numbers(name)[rows] for name in ("subset", "width", "height", *RESIZED, "bucket")]
    kind, first = np.zeros(len(rows), np.int64), np.zeros(0, np.int64)
    for values in columns:
        kind = kind * (int(values.max(initial=0)) + 1) + values
        _, first, kind = np.unique(kind, return_index=True, return_inverse=True)
    hashes = bytearray()
    for number, *sizes, place in np.stack(columns, axis=1)[first].tolist():
        subset, bucket = index.subsets[number], index.buckets[place]
        channel = "red" if subset.conditioning_data_dir else "alpha"
        parts = (VERSION, channel, subset.resize_interpolation, *sizes, bucket.width, bucket.height)
        hashes += hash16(" ".join(map(str, parts)).encode())
    return np.frombuffer(bytes(hashes), np.uint8).reshape(-1, 16)[kind]


def encode_masks(job: MaskEncoding, places: Int64[np.ndarray, " k"], writer: ShardWriter) -> Generator[int, None, None]:
    """Makes the masks at these places in `job.files`, and yields how many were finished since the last yield."""
    with ThreadPoolExecutor(job.threads) as pool:
        for start in range(0, len(places), CHUNK):
            chunk = places[start : start + CHUNK].tolist()
            for place, result in zip(chunk, pool.map(lambda place: _read(job, place), chunk), strict=True):
                if isinstance(result, ImageError):
                    job.bad[int(job.files.rows[place])] = Problem(result.reason, file=result.path)
                    continue
                content, key, mask = result
                if mask is not None and key not in job.claims:
                    job.claims.add(key)
                    writer.add(key, mask)
                writer.add_file(job.files.stat_hashes[place].tobytes(), content)
            yield len(chunk)


def _read(job: MaskEncoding, place: int) -> tuple[bytes, bytes, Float16[np.ndarray, "h w"] | None] | ImageError:
    """Hash of the file's content, key of the mask, and the mask if it is not known yet."""
    entry = job.index[int(job.files.rows[place])]
    try:
        path = find_mask(entry)
        data = entry.read(unchanged=True) if path is None else read_mask(entry)
        content = hash16(data)
        key = np.frombuffer(content, np.uint8) ^ job.files.geometry_hashes[place]
        if key.tobytes() in job.claims or job.known.places(key[None])["file"][0] >= 0:
            return content, key.tobytes(), None
        left_top = crop_left_top(entry.resized, (entry.bucket.width, entry.bucket.height), None)
        mask = latent_mask(load_mask(entry, entry.resized, left_top, data), job.pixels_per_latent)
        return content, key.tobytes(), mask.astype(np.float16)
    except ImageError as error:
        return error


def _stat_hashes(index: Index, rows: Int64[np.ndarray, " k"]) -> UInt8[np.ndarray, "k 16"]:
    """The hashes by which shards know the mask files of these rows, from their `stat` in the index."""
    dirs = [one.conditioning_data_dir for one in index.subsets]
    folders = [os.fsencode(str(absolute(folder))) if folder else b"" for folder in dirs]
    columns = (index.subset[rows], index.numbers("mask_bytes")[rows], index.numbers("mask_version")[rows])
    names = index.masks.take(pa.array(rows)).to_pylist()
    hashes = (
        hash_of_stat(folders[subset] + b"/" + name, size, version)
        for name, subset, size, version in zip(names, *(column.tolist() for column in columns), strict=True)
    )
    return np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 16)
