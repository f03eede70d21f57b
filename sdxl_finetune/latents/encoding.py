"""From image files to latents: threads read and decode images while the VAE encodes batches of one bucket.

A latent is a sample of the VAE's distribution. Its noise is a function of the file's content and of the flip. Therefore
the latent is the same in any batch and on any process.
"""

import warnings
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float16, Float32, Int64, UInt8
from torch import Tensor

from sdxl_finetune.batch import LatentSize
from sdxl_finetune.data.buckets import crop_left_top
from sdxl_finetune.data.images import ImageError
from sdxl_finetune.data.index import Entry, Index
from sdxl_finetune.errors import Problem
from sdxl_finetune.latents.keys import RowKeys, hash16
from sdxl_finetune.latents.library import Library
from sdxl_finetune.latents.npz import Rejected, find_npz, read_npz
from sdxl_finetune.latents.shards import ShardWriter
from sdxl_finetune.seeding import position_rng

Encode = Callable[[UInt8[Tensor, "k H W 3"], Float32[Tensor, "k 4 h w"]], Callable[[], Float16[Tensor, "k 4 h w"]]]
"""Starts to encode pixels with standard normal noise, both on the CPU. Returns a function that waits for the latents:
mean + standard deviation x noise of the VAE's distribution."""

QUEUED = 2
"""Batches on the device while the host waits for the oldest. With one, the device would wait for each delay of the
host."""
READ_AHEAD = 128 << 20
"""Bytes of decoded pixels that may wait for the VAE, beside a few images for each thread. Files take unequal times, and
the VAE should not wait for a slow one."""


@runtime_checkable  # jaxtyping checks annotations in the tests
class Encoder(Protocol):
    """The VAE, as far as the latent cache knows it."""

    latent_size: LatentSize
    """Pixels for one latent, along one side."""

    def identity(self) -> str:
        """A name that depends on the VAE's weights alone."""
        ...

    def on_device(self) -> AbstractContextManager[Encode]:
        """A context in which the VAE is on the training device and encodes."""
        ...


@dataclass(frozen=True)
class Report:
    """Results of encoding, filled while it runs."""

    bad: dict[int, Problem] = field(default_factory=dict)
    """Problems of images that could not be encoded, by row."""
    undecodable: dict[int, str] = field(default_factory=dict)
    """Messages on images of which the content of the file is the problem, by row."""
    counts: Counter[str] = field(default_factory=Counter)
    """Numbers of images by what happened: encoded, found again, taken from .npz files."""
    duplicates: dict[int, int] = field(default_factory=dict)
    """The row that is encoded in place of each duplicate, which has the same content."""
    rejected: dict[str, list[Path]] = field(default_factory=dict)
    """The reference's .npz files that were not used, by reason."""


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """Inputs, settings and results that all images of one encoding pass share."""

    index: Index
    keys: RowKeys
    known: Library
    """Latents that exist already."""
    encode: Encode
    latent_size: LatentSize
    batch_size: int
    threads: int
    use_npz: bool = False
    """True to use the reference's .npz files beside the images where they fit."""
    claims: dict[bytes, int] = field(default_factory=dict)
    """The row for which each latent is encoded, by cache key."""
    report: Report = field(default_factory=Report)

    def shape(self, row: int) -> tuple[int, int, int]:
        """Channels, height and width of an image's latent."""
        return self.latent_size.of(self.index.buckets[self.index.bucket[row]])


@dataclass(frozen=True)
class Image:
    """An image file that was read."""

    row: int
    entry: Entry
    content: UInt8[np.ndarray, "16"]
    """Hash of the file's bytes."""
    keys: Mapping[bool, bytes]
    """Cache keys of the latents to make; the mirrored one under True."""
    pixels: UInt8[np.ndarray, "H W 3"] | None
    """None if nothing has to be encoded."""
    noise: Mapping[bool, Float32[np.ndarray, "c h w"]]
    """Noise of the samples to encode; that of the mirrored one under True."""
    latents: dict[bool, Float16[np.ndarray, "c h w"]]


Running = list[tuple[list[Image], bool, Callable[[], Tensor]]]
"""A batch on the device: images as they are and mirrored, each with the function that waits for their latents."""


def encode_images(job: Encoding, rows: Int64[np.ndarray, " k"], writer: ShardWriter) -> Generator[int, None, None]:
    """Encodes the images of these rows in batches of one bucket, and yields how many images were finished since the
    last yield.

    Threads read the next images meanwhile, and the device is QUEUED batches behind the host. If the generator is closed
    early, it finishes the batches that are on the device.
    """
    batch: list[Image] = []
    running: deque[Running] = deque()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for row, image in _read_ahead(job, rows):
                if isinstance(image, ImageError):
                    job.report.bad[row] = Problem(image.reason, file=image.path)
                    if image.is_lasting:
                        job.report.undecodable[row] = image.reason
                if isinstance(image, ImageError) or image.pixels is None:
                    yield 1 if isinstance(image, ImageError) else _store(job, writer, [image])
                    continue
                if batch and batch[0].entry.bucket != image.entry.bucket:
                    running.append(_start(job, batch))
                    batch = []
                batch.append(image)
                if len(batch) == job.batch_size:  # now, and not when the next image has been read
                    running.append(_start(job, batch))
                    batch = []
                while len(running) > QUEUED:
                    yield _finish(job, writer, running.popleft())
            running += [_start(job, batch)] if batch else []
        finally:
            finished = [_finish(job, writer, started) for started in running]
        yield from finished


def _read_ahead(job: Encoding, rows: Int64[np.ndarray, " k"]) -> Iterator[tuple[int, Image | ImageError]]:
    """Yields each image in order, or its error, while threads read the next ones."""
    largest = max((3 * bucket.width * bucket.height for bucket in job.index.buckets), default=1)
    ahead = 2 * job.threads + job.batch_size + READ_AHEAD // largest
    with ThreadPoolExecutor(job.threads) as pool:
        waiting: deque[tuple[int, Future[Image | ImageError]]] = deque()
        try:
            for row in rows.tolist():
                waiting.append((row, pool.submit(_read_image, job, row)))
                if len(waiting) > ahead:
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
        data = entry.read(unchanged=True)
        content = np.frombuffer(hash16(data), np.uint8)
        keys = {}
        for mirrored in {False, entry.subset.flip_aug}:
            key = job.keys.keys(np.array([row]), content[None], mirrored)
            if job.known.places(key)["file"][0] < 0:
                owner = job.claims.setdefault(key.tobytes(), row)
                if owner == row:
                    keys[mirrored] = key.tobytes()
                else:
                    job.report.duplicates[row] = owner
        saved = read_npz(entry, data, job.shape(row), keys) if job.use_npz and keys else None
        if isinstance(saved, Rejected):
            job.report.rejected.setdefault(saved.reason, []).append(saved.path)
        latents = saved if isinstance(saved, dict) else {}
        pixels, noise = None, {}
        if keys and not latents:
            noise = {mirrored: _sample_noise(content, mirrored, job.shape(row)) for mirrored in keys}
            left_top = crop_left_top(entry.resized, (entry.bucket.width, entry.bucket.height), None)
            pixels = entry.load(left_top, data)
        return Image(row, entry, content, keys, pixels, noise, latents)
    except ImageError as error:
        return error


def _start(job: Encoding, batch: Sequence[Image]) -> Running:
    running: Running = []
    for mirrored in (False, True):
        images = [image for image in batch if mirrored in image.keys]
        if images:
            pixels = torch.from_numpy(np.stack([image.pixels for image in images if image.pixels is not None]))
            noise = torch.from_numpy(np.stack([image.noise[mirrored] for image in images]))
            running.append((images, mirrored, job.encode(pixels.flip(2) if mirrored else pixels, noise)))
    return running


def _sample_noise(
    content: UInt8[np.ndarray, "16"], mirrored: bool, shape: tuple[int, int, int]
) -> Float32[np.ndarray, "c h w"]:
    rng = position_rng(0, "latent", *content.view(np.uint32).tolist(), int(mirrored))
    return rng.standard_normal(shape, np.float32)


def _finish(job: Encoding, writer: ShardWriter, running: Running) -> int:
    images: dict[int, Image] = {}
    for batch, mirrored, wait in running:
        for image, latent in zip(batch, wait().numpy(), strict=True):
            images[image.row] = image
            image.latents[mirrored] = latent
    return _store(job, writer, list(images.values()))


def _store(job: Encoding, writer: ShardWriter, images: Sequence[Image]) -> int:
    """Gives finite latents to the writer and notes the others as bad; returns the number of images."""
    for image in images:
        if all(np.isfinite(latent).all() for latent in image.latents.values()):
            for mirrored, key in image.keys.items():
                writer.add(key, image.latents[mirrored])
            writer.add_file(job.keys.stat_hashes[image.row].tobytes(), image.content.tobytes())
            source = "taken from .npz files" if image.keys else "found again"
            job.report.counts["encoded" if image.pixels is not None else source] += 1
        else:
            message = "its latent is infinite or NaN: use another VAE, or remove the image"
            job.report.bad[image.row] = Problem(message, file=str(image.entry.path))
    return len(images)


def find_foreign_npz(job: Encoding, rows: Int64[np.ndarray, " k"]) -> Path | None:
    """Encodes these images and returns a .npz file of the reference that another VAE has made, if there is one.

    The reference stores a sample and the comparison uses the mean, so they may differ by the standard deviation. A
    tenth of the latent is allowed for half precision and for other ways of resizing.
    """
    job = replace(job, known=Library([]), claims={}, report=Report(), use_npz=False)
    for row in rows.tolist():
        image, shape = _read_image(job, row), job.shape(row)
        if isinstance(image, ImageError) or image.pixels is None:
            continue
        saved = read_npz(image.entry, image.entry.read(), shape, [False])
        if isinstance(saved, dict):
            pixels = torch.from_numpy(image.pixels[None].copy())
            mean, above = (job.encode(pixels, torch.full((1, *shape), noise))().float()[0] for noise in (0.0, 1.0))
            error = (torch.from_numpy(saved[False]).float() - mean).square().mean()
            if not error <= 1.5**2 * (above - mean).square().mean() + 0.1**2 * mean.square().mean():
                return find_npz(image.entry)
    return None
