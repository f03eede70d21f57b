"""Latents of all images, encoded once: one array of 16-bit floats a bucket, end to end in one file.

The latents are samples of the VAE as it gives them, before scaling. The file may have no name: then it is memory
that is freed with the process, and that workers and other ranks of the machine map without a copy. An image's
sample depends on its folder's and its own name and not on what is encoded with it, so that any batch size and any
number of processes give the same latents.
"""

import atexit
import math
import os
import tempfile
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float16, Float32, Int64, UInt8
from torch import Tensor
from tqdm import tqdm

from sdxl_finetune.data.buckets import crop_left_top
from sdxl_finetune.data.images import ImageError
from sdxl_finetune.data.index import Entry, Index
from sdxl_finetune.problems import Problem, UserError
from sdxl_finetune.seeding import position_rng

CHANNELS = 4
"""Of SDXL's latents."""
READERS = 16
"""Threads that decode images ahead of the VAE, at most."""

Encode = Callable[[Float32[Tensor, "k 3 H W"], Float32[Tensor, "k 4 h w"]], Float32[Tensor, "k 4 h w"]]
"""Images in [-1, 1] and standard normal noise, both on the CPU, to the VAE's sample: mean + deviation x noise."""


@dataclass(frozen=True)
class LatentStore:
    """The file of latents of an index. A small value: copies in other processes map the same file."""

    path: Path
    index: Index
    pixels_per_latent: int
    """Along one side."""

    def __reduce__(self) -> tuple:
        return LatentStore, (self.path, self.index, self.pixels_per_latent)

    @cached_property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Of one latent of each bucket: (channels, height, width)."""
        scale = self.pixels_per_latent
        return tuple((CHANNELS, bucket.height // scale, bucket.width // scale) for bucket in self.index.buckets)

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return int(self._sizes.sum()) * 2

    def read(self, rows: Sequence[int], mirrored: Sequence[bool]) -> Float16[np.ndarray, "k 4 h w"]:
        """A copy of the latents of images of one bucket."""
        return np.stack([self._latent(row, flip) for row, flip in zip(rows, mirrored, strict=True)])

    def write(self, row: int, mirrored: bool, latent: Float16[np.ndarray, "4 h w"]) -> None:
        self._latent(row, mirrored)[...] = latent

    def _latent(self, row: int, mirrored: bool) -> Float16[np.ndarray, "4 h w"]:
        assert not mirrored or self.index.flips[row]
        shape = self.shapes[self.index.bucket[row]]
        size = math.prod(shape)
        start = self._starts[row] + mirrored * size
        return self._values[start : start + size].reshape(shape)

    @cached_property
    def _values(self) -> Float16[np.ndarray, " values"]:
        return np.memmap(self.path, np.float16, mode="r+").view(np.ndarray)

    @cached_property
    def _sizes(self) -> Int64[np.ndarray, " n"]:
        """Values that each image takes, its mirror image included."""
        sizes = np.array([math.prod(shape) for shape in self.shapes], np.int64)
        return sizes[self.index.bucket] * (1 + self.index.flips)

    @cached_property
    def _starts(self) -> Int64[np.ndarray, " n"]:
        """Where each image's latent starts: after those of the buckets before, then of the rows before; a
        mirrored latent comes next.
        """
        sizes = self._sizes
        order = np.argsort(self.index.bucket, kind="stable")
        starts = np.empty_like(sizes)
        starts[order] = np.cumsum(sizes[order]) - sizes[order]
        return starts


def build_store(index: Index, cache_dir: Path, *, pixels_per_latent: int = 8) -> LatentStore:
    """An empty store in memory that lives as long as this process; where the system has no nameless files, in a
    temporary file in `cache_dir`. Raises UserError if the machine has less memory.
    """
    size = LatentStore(cache_dir, index, pixels_per_latent).bytes
    if not hasattr(os, "memfd_create"):
        cache_dir.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(".tmp", ".latents.", cache_dir)
        os.truncate(descriptor, size)
        os.close(descriptor)
        atexit.register(Path(name).unlink, missing_ok=True)
        return LatentStore(Path(name), index, pixels_per_latent)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        message = f"the latents take {size / 1e9:.1f} GB and this machine has {memory / 1e9:.1f} GB of memory"
        raise UserError(Problem(f"{message}: train without it", key="cache_latents", value=True))
    descriptor = os.memfd_create("latents")
    os.truncate(descriptor, size)
    return LatentStore(Path(f"/proc/{os.getpid()}/fd/{descriptor}"), index, pixels_per_latent)


def cache_latents(
    store: LatentStore, encode: Encode, *, batch_size: int, part: int = 0, parts: int = 1
) -> dict[int, Problem]:
    """Encodes every image of the index that is used into `store`, batches of one bucket at a time, while threads
    decode the next ones. Processes that share a store each do one of `parts`. Returns what is wrong with images
    that could not be encoded, by row.
    """
    index = store.index
    rows = np.flatnonzero(index.repeats > 0)
    rows = rows[np.argsort(index.bucket[rows], kind="stable")]
    cuts = np.flatnonzero(np.diff(index.bucket[rows])) + 1
    batches = [
        group[start : start + batch_size]
        for group in np.split(rows, cuts)
        for start in range(0, len(group), batch_size)
    ][part::parts]
    bad: dict[int, Problem] = {}
    threads = max(1, min(READERS, (os.cpu_count() or 1) // parts))
    total = sum(len(batch) for batch in batches)
    with warnings.catch_warnings(), tqdm(total=total, desc="encoding", unit=" images", disable=None) as progress:
        warnings.simplefilter("ignore")
        for rows, loaded in _load_ahead(index, batches, threads):
            good = []
            for row, pixels in zip(rows.tolist(), loaded, strict=True):
                if isinstance(pixels, ImageError):
                    bad[row] = Problem(pixels.reason, file=pixels.path)
                else:
                    good.append((row, pixels))
            if good:
                bad |= _encode_batch(store, encode, *zip(*good, strict=True))
            progress.update(len(rows))
    return bad


def _load_ahead(
    index: Index, batches: Sequence[np.ndarray], threads: int
) -> Iterator[tuple[np.ndarray, list[UInt8[np.ndarray, "H W 3"] | ImageError]]]:
    """Each batch with its images, or what is wrong with them; the next batches are being decoded meanwhile."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[tuple[np.ndarray, list[Future]]] = deque()
        try:
            for rows in batches:
                waiting.append((rows, [pool.submit(_load_centre, index[row]) for row in rows.tolist()]))
                while sum(len(futures) for _, futures in waiting) > 2 * threads + len(rows):
                    ready, futures = waiting.popleft()
                    yield ready, [future.result() for future in futures]
            while waiting:
                ready, futures = waiting.popleft()
                yield ready, [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)


def _load_centre(entry: Entry) -> UInt8[np.ndarray, "H W 3"] | ImageError:
    try:
        return entry.load(crop_left_top(entry.resized, (entry.bucket.width, entry.bucket.height), None))
    except ImageError as error:
        return error


def _encode_batch(
    store: LatentStore, encode: Encode, rows: tuple[int, ...], pixels: tuple[UInt8[np.ndarray, "H W 3"], ...]
) -> dict[int, Problem]:
    bad = {}
    images = to_tensor(np.stack(pixels))
    for mirrored in (False, True):
        kept = [number for number, row in enumerate(rows) if store.index.flips[row] or not mirrored]
        if not kept:
            continue
        chosen = images[kept].flip(3) if mirrored else images[kept]
        paths = [store.index[rows[number]].path for number in kept]
        shape = store.shapes[store.index.bucket[rows[0]]]
        noise = np.stack([_sample_noise(path, mirrored, shape) for path in paths])
        latents = encode(chosen, torch.from_numpy(noise))
        for number, path, latent in zip(kept, paths, latents.to("cpu", torch.float16).numpy(), strict=True):
            if np.isfinite(latent).all():
                store.write(rows[number], mirrored, latent)
            else:
                bad[rows[number]] = Problem("its latent is NaN or infinite: is the VAE sound?", file=str(path))
    return bad


def to_tensor(pixels: UInt8[np.ndarray, "k H W 3"]) -> Float32[Tensor, "k 3 H W"]:
    """Images in [-1, 1] of pixels of 0 to 255."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).float().div_(127.5).sub_(1)


def _sample_noise(path: Path, mirrored: bool, shape: tuple[int, int, int]) -> Float32[np.ndarray, "4 h w"]:
    name = zlib.crc32(os.fsencode(f"{path.parent.name}/{path.name}"))
    return position_rng(0, "latent", name, int(mirrored)).standard_normal(shape, np.float32)
