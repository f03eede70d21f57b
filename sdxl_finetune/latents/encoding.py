"""Latents of all images, encoded once and kept in shards, on the disk or in memory (see shards).

The latents are samples of the VAE as it gives them, before scaling. A latent is a function of its key alone: of the
image file's content, its size and crop, and whether it is mirrored; its sample noise too. So it is the same in any
batch and on any process, and an image that is moved, renamed or touched is found again. All 16-byte hashes are
blake2b; a key is the exclusive or of the content's and the geometry's, which numpy makes millions of in a moment.
"""

import hashlib
import os
import warnings
import zlib
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float16, Float32, Int64, Shaped, UInt8
from torch import Tensor

from sdxl_finetune.batch import LATENT_CHANNELS
from sdxl_finetune.data.buckets import crop_left_top
from sdxl_finetune.data.images import ImageError
from sdxl_finetune.data.index import Bucket, Entry, Index
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.latents.npz import Unfit, find_npz, read_npz
from sdxl_finetune.latents.shards import PLACE, Library, Shard, ShardWriter, nameless_file, set_aside
from sdxl_finetune.seeding import position_rng

PIXELS = "1"
"""Version of the way from a file's bytes to a bucket's pixels; another one makes other keys."""
READERS = 16
"""Threads that read and decode images ahead of the VAE, at most."""

Encode = Callable[[UInt8[Tensor, "k H W 3"], Float32[Tensor, "k 4 h w"]], Callable[[], Float16[Tensor, "k 4 h w"]]]
"""Starts to encode pixels with standard normal noise, both on the CPU, and gives a function that waits for the VAE's
sample, mean + deviation x noise.
"""


@dataclass(frozen=True)
class LatentStore:
    """Where the latents of an index lie. A small value: copies in other processes read the same files."""

    index: Index
    table: Path
    """A file of two PLACEs for each row of the index, as it is and mirrored."""
    files: tuple[Path, ...]
    pixels_per_latent: int
    """Along one side."""

    def __reduce__(self) -> tuple:
        return LatentStore, (self.index, self.table, self.files, self.pixels_per_latent)

    def read(self, rows: Sequence[int], mirrored: Sequence[bool]) -> Float16[np.ndarray, "k 4 h w"]:
        """Latents of images of one bucket. Raises UserError if one is not on the disk as it was written."""
        return np.stack([self._read(row, flip) for row, flip in zip(rows, mirrored, strict=True)])

    def _read(self, row: int, mirrored: bool) -> Float16[np.ndarray, "4 h w"]:
        number, crc, start = self.places[row, int(mirrored)].tolist()
        assert number >= 0, "it was not encoded"
        shape = latent_shape(self.index.buckets[self.index.bucket[row]], self.pixels_per_latent)
        path = self.files[number]
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(start)
                data = file.read(2 * int(np.prod(shape)))
        except OSError as error:
            problem = f"the latent of {self.index[row].path} cannot be read ({error.strerror}): start again"
            raise UserError(Problem(problem, file=str(path))) from None
        if zlib.crc32(data) != crc:
            message = f"the latent of {self.index[row].path} is damaged; the file is renamed to {set_aside(path).name}"
            raise UserError(Problem(f"{message}: start again, and its images are encoded again", file=str(path)))
        return np.frombuffer(data, np.float16).reshape(shape)

    @cached_property
    def places(self) -> Shaped[np.ndarray, "n 2"]:
        return np.memmap(self.table, PLACE, mode="r").view(np.ndarray).reshape(-1, 2)


@dataclass(frozen=True)
class Names:
    """What the rows of an index are called in the shards."""

    states: Int64[np.ndarray, "n 2"]
    """Of the files: size in bytes, time of change in nanoseconds."""
    stamps: UInt8[np.ndarray, "n 16"]
    """Of path and state."""
    geometry: Int64[np.ndarray, " n"]
    """Each row's place in `geometries`."""
    geometries: UInt8[np.ndarray, "g 2 16"]
    """Hashes of each way to bring an image into a bucket, as it is and mirrored."""

    def keys(
        self, rows: Int64[np.ndarray, " k"], digests: UInt8[np.ndarray, "k 16"], mirrored: bool
    ) -> UInt8[np.ndarray, "k 16"]:
        return digests ^ self.geometries[self.geometry[rows], int(mirrored)]


def name_rows(index: Index) -> Names:
    """By the states of the files that the scan has seen."""
    states = np.stack([index.numbers("bytes"), index.numbers("mtime")], axis=1)
    width, height = (index.numbers(f"resized_{side}").astype(np.int64) for side in ("width", "height"))
    sizes, size = np.unique(width << 32 | height, return_inverse=True)
    hows, how = index.interpolations
    count = len(index.buckets)
    ways, geometry = np.unique((size * len(hows) + how) * count + index.bucket, return_inverse=True)
    geometries = bytearray()
    for way in ways.tolist():
        resized, bucket = int(sizes[way // count // len(hows)]), index.buckets[way % count]
        image = f"{PIXELS} {resized >> 32} {resized & 0xFFFFFFFF} {bucket.width} {bucket.height}"
        for mirrored in (0, 1):
            geometries += _hash(f"{image} {hows[way // count % len(hows)]} {mirrored}".encode())
    return Names(
        states,
        index.stat_hashes,
        geometry.astype(np.int64),
        np.frombuffer(bytes(geometries), np.uint8).reshape(-1, 2, 16),
    )


def locate(index: Index, names: Names, library: Library) -> Shaped[np.ndarray, "n 2"]:
    """The PLACEs of the latents of every row, as it is and mirrored."""
    places = np.full((len(index), 2), np.array((-1, 0, 0), PLACE))
    known, digests = library.contents(names.stamps)
    places[known, 0] = library.places(names.keys(known, digests, False))
    flipped = index.flips[known]
    places[known[flipped], 1] = library.places(names.keys(known[flipped], digests[flipped], True))
    return places


def build_store(
    index: Index, names: Names, shards: Sequence[Shard], *, pixels_per_latent: int, scratch: Path
) -> LatentStore:
    """The latents that the shards hold for an index, those of the oldest first; `scratch` is for nameless_file."""
    library = Library(sorted(shards, key=lambda shard: shard.path.name))
    table = nameless_file(scratch)
    table.write_bytes(locate(index, names, library).tobytes())
    return LatentStore(index, table, library.files, pixels_per_latent)


def lacking(index: Index, places: Shaped[np.ndarray, "n 2"]) -> Int64[np.ndarray, " k"]:
    """The rows in use that lack a latent, in the order of the buckets."""
    absent = places["file"] < 0
    rows = np.flatnonzero(index.used & (absent[:, 0] | (index.flips & absent[:, 1])))
    return rows[np.argsort(index.bucket[rows], kind="stable")]


@dataclass(frozen=True)
class Report:
    """What became of the images, filled while they are encoded."""

    bad: dict[int, Problem] = field(default_factory=dict)
    """What is wrong with those that could not be, by row."""
    counts: Counter[str] = field(default_factory=Counter)
    """How many were encoded, found again, ..."""
    twins: dict[int, int] = field(default_factory=dict)
    """Rows whose latents are those of another row, which was encoded for both."""
    unfit: dict[str, list[Path]] = field(default_factory=dict)
    """Files of the reference that were not taken, by reason."""


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """Images to encode, and what it takes."""

    index: Index
    names: Names
    known: Library
    """What is there already."""
    encode: Encode
    pixels_per_latent: int
    batch_size: int
    threads: int
    npz: bool = False
    """Whether the reference's files beside the images are taken where they fit."""
    claims: dict[bytes, int] = field(default_factory=dict)
    """The row that each latent is encoded for, by key."""
    report: Report = field(default_factory=Report)

    def shape(self, row: int) -> tuple[int, int, int]:
        """Of an image's latent: channels, height, width."""
        return latent_shape(self.index.buckets[self.index.bucket[row]], self.pixels_per_latent)


@dataclass(frozen=True)
class Image:
    """An image file that was read."""

    row: int
    entry: Entry
    digest: UInt8[np.ndarray, "16"]
    keys: Mapping[bool, bytes]
    """Of the latents that are to be made, by whether they are mirrored."""
    pixels: UInt8[np.ndarray, "H W 3"] | None
    """None where nothing is to be encoded."""
    latents: dict[bool, Float16[np.ndarray, "4 h w"]]


Started = list[tuple[list[Image], bool, Callable[[], Tensor]]]
"""A batch on the device: images as they are and mirrored, each with what waits for their latents."""


def encode_images(job: Encoding, rows: Int64[np.ndarray, " k"], writer: ShardWriter) -> Generator[int, None, None]:
    """Makes the latents of these images of an index, in batches of one bucket, while threads read the next ones and
    the device is a batch behind the host. Yields how many images were finished; closed early, it finishes what the
    device is at.
    """
    batch: list[Image] = []
    running: deque[Started] = deque()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for row, image in _read_ahead(job, rows):
                if isinstance(image, ImageError):
                    job.report.bad[row] = Problem(image.reason, file=image.path)
                if isinstance(image, ImageError) or image.pixels is None:
                    yield 1 if isinstance(image, ImageError) else _store(job, writer, [image])
                    continue
                if batch and (len(batch) == job.batch_size or batch[0].entry.bucket != image.entry.bucket):
                    running.append(_start(job, batch))
                    batch = []
                batch.append(image)
                if len(running) > 1:
                    yield _finish(job, writer, running.popleft())
            running += [_start(job, batch)] if batch else []
        finally:
            finished = [_finish(job, writer, started) for started in running]
        yield from finished


def _read_ahead(job: Encoding, rows: Int64[np.ndarray, " k"]) -> Iterator[tuple[int, Image | ImageError]]:
    """Each image in order, or what is wrong with it, while threads are at the next ones."""
    with ThreadPoolExecutor(job.threads) as pool:
        waiting: deque[tuple[int, Future[Image | ImageError]]] = deque()
        try:
            for row in rows.tolist():
                waiting.append((row, pool.submit(_read_image, job, row)))
                if len(waiting) > 2 * job.threads + job.batch_size:
                    row, reading = waiting.popleft()
                    yield row, reading.result()
            while waiting:
                row, reading = waiting.popleft()
                yield row, reading.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _read_image(job: Encoding, row: int) -> Image | ImageError:
    entry = job.index[row]
    try:
        data = _read_file(entry.path, job.names.states[row].tolist())
        digest = np.frombuffer(_hash(data), np.uint8)
        wanted = {}
        for mirrored in {False, entry.subset.flip_aug}:
            key = job.names.keys(np.array([row]), digest[None], mirrored)
            if job.known.places(key)["file"][0] < 0:
                owner = job.claims.setdefault(key.tobytes(), row)
                if owner == row:
                    wanted[mirrored] = key.tobytes()
                else:
                    job.report.twins[row] = owner
        taken = read_npz(entry, data, job.shape(row), wanted) if job.npz and wanted else None
        if isinstance(taken, Unfit):
            job.report.unfit.setdefault(taken.reason, []).append(taken.path)
        latents = taken if isinstance(taken, dict) else {}
        pixels = None
        if wanted and not latents:
            left_top = crop_left_top(entry.resized, (entry.bucket.width, entry.bucket.height), None)
            pixels = entry.load(left_top, data)
        return Image(row, entry, digest, wanted, pixels, latents)
    except ImageError as error:
        return error


def _read_file(path: Path, expected: list[int]) -> bytes:
    try:
        with path.open("rb") as file:
            state, data = os.fstat(file.fileno()), file.read()
    except OSError as error:
        raise ImageError(str(path), f"not readable ({error.strerror})") from None
    if _state(state) != expected:
        raise ImageError(str(path), "it was changed during the run")
    return data


def _start(job: Encoding, batch: Sequence[Image]) -> Started:
    started: Started = []
    for mirrored in (False, True):
        images = [image for image in batch if mirrored in image.keys]
        if images:
            shape = job.shape(images[0].row)
            pixels = torch.from_numpy(np.stack([image.pixels for image in images if image.pixels is not None]))
            noise = torch.from_numpy(np.stack([_sample_noise(image.digest, mirrored, shape) for image in images]))
            started.append((images, mirrored, job.encode(pixels.flip(2) if mirrored else pixels, noise)))
    return started


def _finish(job: Encoding, writer: ShardWriter, started: Started) -> int:
    images: dict[int, Image] = {}
    for own, mirrored, wait in started:
        for image, latent in zip(own, wait().numpy(), strict=True):
            images[image.row] = image
            image.latents[mirrored] = latent
    return _store(job, writer, list(images.values()))


def _store(job: Encoding, writer: ShardWriter, images: Sequence[Image]) -> int:
    """Gives finished images to the writer, but for those whose latents are no numbers; returns how many they were."""
    for image in images:
        if all(np.isfinite(latent).all() for latent in image.latents.values()):
            latents = [(image.keys[mirrored], image.latents[mirrored]) for mirrored in image.keys]
            writer.add(job.names.stamps[image.row].tobytes(), image.digest.tobytes(), latents)
            made = "taken from .npz files" if latents else "found again"
            job.report.counts["encoded" if image.pixels is not None else made] += 1
        else:
            message = "its latent is NaN or infinite: is the VAE sound?"
            job.report.bad[image.row] = Problem(message, file=str(image.entry.path))
    return len(images)


def foreign_npz(job: Encoding, rows: Int64[np.ndarray, " k"]) -> Path | None:
    """Encodes these images and compares: a file of the reference that fits but was made by another VAE, if any is.

    Their sample and our mean may differ by the deviation, and by a tenth of the latent for half precision and for
    pixels that were resized by other means.
    """
    job = replace(job, known=Library([]), claims={}, report=Report(), npz=False)
    for row in rows.tolist():
        image, shape = _read_image(job, row), job.shape(row)
        if isinstance(image, ImageError) or image.pixels is None:
            continue
        taken = read_npz(image.entry, image.entry.path.read_bytes(), shape, [False])
        if isinstance(taken, dict):
            pixels = torch.from_numpy(image.pixels[None].copy())
            mean, above = (job.encode(pixels, torch.full((1, *shape), noise))().float()[0] for noise in (0.0, 1.0))
            error = (torch.from_numpy(taken[False]).float() - mean).square().mean()
            if not error <= 1.5**2 * (above - mean).square().mean() + 0.1**2 * mean.square().mean():
                return find_npz(image.entry)
    return None


def latent_shape(bucket: Bucket, pixels_per_latent: int) -> tuple[int, int, int]:
    """Channels, height and width."""
    return LATENT_CHANNELS, bucket.height // pixels_per_latent, bucket.width // pixels_per_latent


def _sample_noise(
    digest: UInt8[np.ndarray, "16"], mirrored: bool, shape: tuple[int, int, int]
) -> Float32[np.ndarray, "4 h w"]:
    return position_rng(0, "latent", *digest.view(np.uint32).tolist(), int(mirrored)).standard_normal(shape, np.float32)


def _state(found: os.stat_result) -> list[int]:
    return [found.st_size, found.st_mtime_ns]


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
