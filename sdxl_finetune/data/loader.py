"""The data set as torch's loader knows it: a micro-batch's position and images in, one rank's Batch out.

It keeps no state: flips, crops, captions and noise are functions of (seed, step, micro-batch, slot), so that any
worker on any rank can make any batch, and slot i of a batch is the same however many ranks share it.
"""

import atexit
import contextlib
import logging
import os
import signal
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from typing import Protocol, runtime_checkable

import cv2
import numpy as np
import torch
from jaxtyping import Float16, Float32, Int64
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from sdxl_finetune.batch import LATENT_CHANNELS, Batch, Position, to_images
from sdxl_finetune.data.batch_plan import MicroBatch
from sdxl_finetune.data.buckets import crop_left_top, mirrored_left
from sdxl_finetune.data.captions import caption
from sdxl_finetune.data.images import ImageError, jitter_color
from sdxl_finetune.data.index import Entry, Index
from sdxl_finetune.data.tokens import Tokens
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.seeding import position_random, position_rng

logger = logging.getLogger(__name__)

WORKERS_WITH_LATENTS = 2
"""Without images to decode a batch of 5 takes some 15 ms, most of it noise: two workers keep up with any GPU."""
STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}


class Draws(Protocol):
    """What a micro-batch of k images over all ranks needs of random numbers."""

    @property
    def noise(self) -> Float32[Tensor, "k 4 h w"]: ...
    @property
    def input_noise(self) -> Float32[Tensor, "k 4 h w"] | None: ...
    @property
    def timesteps(self) -> Int64[Tensor, " k"]: ...


Draw = Callable[[Position, tuple[int, int, int, int], Tensor | None], Draws]
"""The draws of a global micro-batch from its position, its shape and, if they are cached, its unscaled latents."""


@runtime_checkable
class Latents(Protocol):
    """Cached latents of an index: what `latents.prepare` returns."""

    def read(self, rows: Sequence[int], mirrored: Sequence[bool]) -> Float16[np.ndarray, "k 4 h w"]:
        """Unscaled latents of `rows`, which are of one bucket; of their mirror images where `mirrored`."""
        ...


@dataclass(frozen=True)
class Loaded:
    """A batch, and what is wrong with images that it should have held; without a batch, with more than an image."""

    batch: Batch | None
    problems: tuple[Problem, ...]

    def pin_memory(self) -> "Loaded":
        return replace(self, batch=self.batch and self.batch.pin_memory())


@dataclass(frozen=True)
class View:
    """How one image is looked at this time."""

    entry: Entry
    mirrored: bool
    left_top: tuple[int, int]
    """Cut off the resized image, in pixels, before it is mirrored."""

    @property
    def seen_top_left(self) -> tuple[int, int]:
        """Of the crop, as the model is told: in the resized image, mirrored if the image is."""
        left, top = self.left_top
        if self.mirrored:
            left = mirrored_left(left, self.entry.resized[0], self.entry.bucket.width)
        return top, left


@dataclass(frozen=True, kw_only=True)
class TrainingDataset(TorchDataset):
    """Micro-batches of an index, for one rank."""

    index: Index
    latents: Latents | None
    """Without it, batches hold images."""
    tokenize: Callable[[Sequence[str]], Tokens]
    draw: Draw
    seed: int
    max_steps: int
    all_latents: bool = False
    """Whether `draw` wants the cached latents, those of all ranks."""
    pixels_per_latent: int = 8
    rank: int = 0
    ranks: int = 1

    def __getitem__(self, micro: MicroBatch) -> Loaded:
        # An exception that leaves a worker arrives as another, with the worker's traceback for a message.
        try:
            return self._load(micro)
        except UserError as error:
            return Loaded(None, error.problems)

    def _load(self, micro: MicroBatch) -> Loaded:
        position, count = micro.position, len(micro.items)
        views = [self._view(position, slot, row) for slot, row in enumerate(micro.items.tolist())]
        # A rank left without an image takes the first one at weight 0, so that all ranks compute one shape.
        slots = np.array_split(np.arange(count), self.ranks)[self.rank].tolist()
        weights = torch.full((len(slots) or 1,), self.ranks / (count * position.micros) if slots else 0.0)
        slots = slots or [0]
        scale, bucket = self.pixels_per_latent, views[0].entry.bucket
        shape = (count, LATENT_CHANNELS, bucket.height // scale, bucket.width // scale)
        latents = images = None
        problems: tuple[Problem, ...] = ()
        if self.latents is not None:
            latents = self._read_latents(micro, views, range(count) if self.all_latents else slots)
        else:
            images, readable, problems = self._load_images(position, {slot: views[slot] for slot in slots})
            weights *= readable
        draws = self.draw(position, shape, latents if self.all_latents else None)
        if latents is not None and self.all_latents:
            latents = latents[slots]
        mine = [views[slot] for slot in slots]
        tokens = self.tokenize([self._caption(position, slot, views[slot].entry) for slot in slots])
        batch = Batch(
            position=position,
            latents=latents,
            images=images,
            encoding_noise=None if images is None else self._encoding_noise(position, slots, shape),
            noise=draws.noise[slots],
            input_noise=None if draws.input_noise is None else draws.input_noise[slots],
            timesteps=draws.timesteps[slots],
            tokens1=tokens.ids1,
            tokens2=tokens.ids2,
            token_weights=tokens.weights,
            original_size=torch.tensor([view.entry.size[::-1] for view in mine]),
            crop_top_left=torch.tensor([view.seen_top_left for view in mine]),
            target_size=torch.tensor([(bucket.height, bucket.width)] * len(mine)),
            weights=weights,
            images_in_step=count,
        )
        return Loaded(batch, problems)

    def _read_latents(
        self, micro: MicroBatch, views: Sequence[View], slots: Sequence[int]
    ) -> Float32[Tensor, "k 4 h w"]:
        assert self.latents is not None
        rows = [int(micro.items[slot]) for slot in slots]
        return torch.from_numpy(self.latents.read(rows, [views[slot].mirrored for slot in slots])).float()

    def _encoding_noise(
        self, position: Position, slots: list[int], shape: tuple[int, int, int, int]
    ) -> Float32[Tensor, "k 4 h w"]:
        rngs = [position_rng(self.seed, "encoding", position.step, position.micro, slot) for slot in slots]
        return torch.from_numpy(np.stack([rng.standard_normal(shape[1:], np.float32) for rng in rngs]))

    def _view(self, position: Position, slot: int, row: int) -> View:
        entry = self.index[row]
        rng = position_random(self.seed, "view", position.step, position.micro, slot)
        mirrored = rng.random() < 0.5 and entry.subset.flip_aug
        bucket = (entry.bucket.width, entry.bucket.height)
        left_top = crop_left_top(entry.resized, bucket, rng if entry.subset.random_crop else None)
        return View(entry, mirrored, left_top)

    def _caption(self, position: Position, slot: int, entry: Entry) -> str:
        rng = position_random(self.seed, "caption", position.step, position.micro, slot)
        where = {"epoch": position.epoch, "step": position.step, "max_steps": self.max_steps}
        return caption(entry.subset, entry.caption, rng, **where)

    def _load_images(
        self, position: Position, views: dict[int, View]
    ) -> tuple[Float32[Tensor, "k 3 H W"], Float32[Tensor, " k"], tuple[Problem, ...]]:
        """The images; 1 for each that could be read and 0 (a grey one) for others; and what is wrong with those."""
        loaded, readable, problems = [], [], []
        for slot, view in views.items():
            bucket = view.entry.bucket
            try:
                pixels = view.entry.load(view.left_top)
                readable.append(1.0)
            except ImageError as error:
                problems.append(Problem(error.reason, file=error.path))
                pixels = np.full((bucket.height, bucket.width, 3), 128, np.uint8)
                readable.append(0.0)
            if view.entry.subset.color_aug:
                rng = position_random(self.seed, "color", position.step, position.micro, slot)
                pixels = jitter_color(pixels, rng)
            loaded.append(pixels[:, ::-1] if view.mirrored else pixels)
        return to_images(torch.from_numpy(np.stack(loaded))), torch.tensor(readable), tuple(problems)


def load_batches(
    dataset: TrainingDataset,
    micro_batches: Iterable[MicroBatch],
    *,
    workers: int,
    pin_memory: bool,
    on_bad_image: str,
) -> Generator[Batch, None, None]:
    """The batches of one rank, in order, made ahead by up to `workers` processes (max_data_loader_n_workers); 0
    makes them here. Close the generator to end the workers.

    An image that cannot be read raises UserError if `on_bad_image` is "stop", and is named in a warning, once, if
    it is "skip".
    """
    limit = WORKERS_WITH_LATENTS if dataset.latents is not None else os.cpu_count() or 1
    workers = min(workers, limit)
    loader: DataLoader = DataLoader(
        dataset,
        sampler=micro_batches,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # else the loader draws from the main process's own
    )
    with _stop_signals_blocked() if workers else contextlib.nullcontext():
        running = iter(loader)
    # Workers ignore SIGTERM, by which an exiting process would otherwise end them: it would wait for ever. torch ends
    # them when nothing refers to the iterator any more, which an exception's traceback may do for long.
    end_workers = getattr(running, "_shutdown_workers", lambda: None)
    atexit.register(end_workers)
    named: set[Problem] = set()
    try:
        while (loaded := next(running, None)) is not None:
            if loaded.batch is None or (loaded.problems and on_bad_image == "stop"):
                raise UserError(loaded.problems)
            for problem in set(loaded.problems) - named:
                logger.warning("skipped: %s", problem)
            named.update(loaded.problems)
            yield loaded.batch
    finally:
        end_workers()
        atexit.unregister(end_workers)


@contextlib.contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Processes started within it do not receive SIGINT and SIGTERM: these are for the main process, which ends
    its workers after the step, and launchers and terminals send them to all.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # else the first process starts it, which unblocks both signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(_number: int) -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    cv2.setNumThreads(0)  # torch has set its own
