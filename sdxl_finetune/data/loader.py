"""The data loader: makes one rank's Batch from the position and the images of a micro-batch.

The loader keeps no state. Flips, crops, captions and noise are functions of seed, step, micro-batch and slot (see
seeding.py). Any data-loader worker on any rank can therefore make any batch, and slot i of a micro-batch is the same
however many ranks share the micro-batch.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from sdxl_finetune.batch import SDXL_LATENTS, Batch, LatentSize, Position, TextOutputs, Tokens, to_images
from sdxl_finetune.data.batch_plan import MicroBatch
from sdxl_finetune.data.caption_sources import choose_text
from sdxl_finetune.data.captions import caption, is_dropped
from sdxl_finetune.data.images import ImageError
from sdxl_finetune.data.index import Index
from sdxl_finetune.data.views import View, draw_view
from sdxl_finetune.data.workers import make_ahead
from sdxl_finetune.errors import Problem, UserError, listed
from sdxl_finetune.seeding import position_normal, position_random

logger = logging.getLogger(__name__)

WORKERS_WITH_LATENTS = 2
"""Most workers if latents are cached. A batch of 5 then takes about 15 ms, most of it for noise, and two workers keep
up with any GPU."""

DrawNoise = Callable[[Position, tuple[int, int, int, int], Tensor | None], tuple[Tensor, Tensor | None]]
"""Draws noise and input noise of k images from position, shape (k, c, h, w) and, on request, their latents."""


@dataclass(frozen=True)
class LoadedBatch:
    """A batch, and the problems of the images in it that could not be read."""

    batch: Batch | None
    """None if the run cannot continue, as with a damaged latent."""
    problems: tuple[Problem, ...]

    def pin_memory(self) -> "LoadedBatch":
        return replace(self, batch=self.batch and self.batch.pin_memory())


@dataclass(frozen=True, kw_only=True)
class TrainingDataset(TorchDataset):
    """One rank's batches of the images of an index, by micro-batch."""

    index: Index
    read_latents: Callable[[Sequence[int], Sequence[bool]], np.ndarray] | None
    """Reads unscaled latents (k, c, h, w) of k rows of one bucket, mirrored or not. None: batches hold images."""
    tokenize: Callable[[Sequence[str]], Tokens]
    read_text: Callable[[Sequence[int | None], Sequence[float]], tuple[np.ndarray, np.ndarray]] | None = None
    """Reads cached hidden states and pooled outputs of captions by row, None for the empty caption, and by a random
    number from 0 to 1, which chooses a variant. If `read_text` is None, batches hold tokens."""
    read_masks: Callable[[Sequence[int], Sequence[bool]], np.ndarray] | None = None
    """Reads masks (k, h, w) of k rows of one bucket, mirrored or not. None: batches of images read their own masks."""
    draw_noise: DrawNoise
    draw_timesteps: Callable[[Position, int, int], Tensor]
    """Draws the timesteps of k images from position, k and the pixels of each image."""
    seed: int
    max_steps: int
    """Optimizer steps of the whole run, of which `token_warmup_step` may be a share."""
    scale_latents: Callable[[Tensor], Tensor] | None = None
    """Scales the cached latents of all ranks, which `draw_noise` needs, for the U-Net. None: it needs no latents."""
    contrastive: bool = False
    """Add latents and noise of another image to each image. Needs `scale_latents`."""
    latent_size: LatentSize = SDXL_LATENTS
    rank: int = 0
    ranks: int = 1

    def __getitem__(self, micro_batch: MicroBatch) -> LoadedBatch:
        position, rows = micro_batch.position, micro_batch.rows.tolist()
        slots = np.array_split(np.arange(len(rows)), self.ranks)[self.rank].tolist()
        weights = torch.full(
            (len(slots) or 1,), self.ranks / (len(rows) * position.micro_batches_in_step) if slots else 0.0
        )
        first_slot = slots[0] if slots else None
        # A rank without an image takes the first one at weight 0, because all ranks have to compute on one shape.
        slots = slots or [0]
        weights *= torch.from_numpy(self.index.loss_weights([rows[slot] for slot in slots]))
        needed = slots if self.scale_latents is None else range(len(rows))
        views = {slot: draw_view(self.index[rows[slot]], self.seed, position, slot) for slot in needed}
        own_views = [views[slot] for slot in slots]
        bucket = own_views[0].entry.bucket
        shape = (len(rows), *self.latent_size.of(bucket))
        latents = images = mask = encoding_noise = None
        problems: tuple[Problem, ...] = ()
        try:
            text = self._text(position, {slot: rows[slot] for slot in slots})
            if self.read_latents is not None:
                flips = [view.mirrored for view in views.values()]
                latents = torch.from_numpy(self.read_latents([rows[slot] for slot in needed], flips)).float()
            if self.read_masks is not None:
                own_flips = [view.mirrored for view in own_views]
                mask = torch.from_numpy(self.read_masks([rows[slot] for slot in slots], own_flips)).float()
        except UserError as error:
            # Raised in a worker, it would arrive as another exception with the worker's traceback as its message.
            return LoadedBatch(None, error.problems)
        if self.read_latents is None:
            images, mask, readable, problems = self._read_images(own_views)
            weights *= readable
            place = position.step, position.micro_batch
            normal = [position_normal(shape[1:], self.seed, "encoding", *place, slot) for slot in slots]
            encoding_noise = torch.from_numpy(np.stack(normal))
        scaled = None
        if latents is not None and self.scale_latents is not None:
            scaled, latents = self.scale_latents(latents), latents[slots]
        timesteps = self.draw_timesteps(position, len(rows), bucket.width * bucket.height)
        batch = Batch(
            position=position,
            latents=latents,
            images=images,
            encoding_noise=encoding_noise,
            **self._noise(position, shape, slots, scaled),
            timesteps=timesteps[slots],
            timesteps_of_ranks=tuple(timesteps.float().tolist()),
            tokens1=text.ids1 if isinstance(text, Tokens) else None,
            tokens2=text.ids2 if isinstance(text, Tokens) else None,
            token_weights=text.weights if isinstance(text, Tokens) else None,
            hidden=text.hidden if isinstance(text, TextOutputs) else None,
            pooled=text.pooled if isinstance(text, TextOutputs) else None,
            original_size=torch.tensor([view.entry.size[::-1] for view in own_views]),
            crop_top_left=torch.tensor([view.crop_top_left for view in own_views]),
            target_size=torch.tensor([(bucket.height, bucket.width)] * len(slots)),
            mask=mask,
            weights=weights,
            images_in_step=len(rows),
            first_slot=first_slot,
        )
        return LoadedBatch(batch, problems)

    def _noise(
        self, position: Position, shape: tuple[int, int, int, int], slots: Sequence[int], latents: Tensor | None
    ) -> dict[str, Any]:
        """The batch's tensors of noise for these slots. `latents` are the scaled ones of all images, or None.

        With `contrastive`, the negative of an image is the image in the slot before, as in forks of sd-scripts. The
        images of a micro-batch are in random order, which does not depend on the number of ranks.
        """
        noise, input_noise = self.draw_noise(position, shape, latents)
        tensors = {"noise": noise[slots], "input_noise": None if input_noise is None else input_noise[slots]}
        if self.contrastive and len(noise) > 1:
            assert latents is not None, "contrastive needs the latents"
            before = [slot - 1 for slot in slots]
            tensors |= {"negative_latents": latents[before], "negative_noise": noise[before]}
        return tensors

    def caption_at(self, position: Position, slot: int, row: int) -> str:
        """The caption of an image as the model is given it at this place."""
        entry = self.index[row]
        rng = position_random(self.seed, "caption", position.step, position.micro_batch, slot)
        where = {"epoch": position.epoch, "step": position.step, "max_steps": self.max_steps}
        chosen = choose_text(entry.subset, entry.captions, rng.random)
        return caption(entry.subset, chosen.text, rng, **where, whole=chosen.whole, quality=entry.quality)

    def draw_variant(self, position: Position, slot: int, row: int) -> float | None:
        """A number from 0 to 1 that chooses a cached variant of the caption; None if the caption is dropped."""
        rng = position_random(self.seed, "caption", position.step, position.micro_batch, slot)
        return None if is_dropped(self.index[row].subset, rng, epoch=position.epoch) else rng.random()

    def _text(self, position: Position, rows: Mapping[int, int]) -> Tokens | TextOutputs:
        """Tokens or cached outputs of the captions of these rows, which are given by slot."""
        if self.read_text is None:
            return self.tokenize([self.caption_at(position, slot, row) for slot, row in rows.items()])
        draws = [self.draw_variant(position, slot, row) for slot, row in rows.items()]
        kept = [None if draw is None else row for row, draw in zip(rows.values(), draws, strict=True)]
        hidden, pooled = self.read_text(kept, [draw or 0.0 for draw in draws])
        return TextOutputs(torch.from_numpy(hidden), torch.from_numpy(pooled))

    def _read_images(
        self, views: Sequence[View]
    ) -> tuple[Float32[Tensor, "k 3 H W"], Float32[Tensor, "k h w"] | None, Float32[Tensor, " k"], tuple[Problem, ...]]:
        """Images in [-1, 1]; masks, if the run has any; 1 or 0 for readable and unreadable images; and the problems.

        An image is unreadable, and grey, if its mask is.
        """
        bucket, scale = views[0].entry.bucket, self.latent_size.pixels
        images, problems = np.full((len(views), bucket.height, bucket.width, 3), 128, np.uint8), []
        masks = np.ones((len(views), bucket.height // scale, bucket.width // scale), np.float32)
        readable = torch.ones(len(views))
        for number, view in enumerate(views):
            try:
                if (mask := view.load_mask(scale)) is not None:
                    masks[number] = mask
                images[number] = view.load_pixels()
            except ImageError as error:  # noqa: PERF203 (all problems are reported together)
                problems.append(Problem(error.reason, file=error.path))
                readable[number] = 0
        own_masks = torch.from_numpy(masks) if self.index.has_mask.any() else None
        return to_images(torch.from_numpy(images)), own_masks, readable, tuple(problems)


def timed(batches: Iterable[Batch]) -> Iterator[tuple[float, Batch]]:
    """Yields each batch with the seconds that the loop waited for it."""
    started = time.perf_counter()
    for batch in batches:
        yield time.perf_counter() - started, batch
        started = time.perf_counter()


def load_batches(
    dataset: TrainingDataset,
    micro_batches: Iterable[MicroBatch],
    *,
    workers: int,
    pin_memory: bool,
    on_bad_image: str,
) -> Generator[Batch, None, None]:
    """One rank's batches, in order.

    Up to `workers` processes (max_data_loader_n_workers) prepare them ahead; with 0 this process makes them. A process
    that dies is replaced. Raises WorkersDied if this happens again and again. Close the generator to end the workers.

    An unreadable image raises UserError if `on_bad_image` is "stop". If it is "skip", one warning names the image, and
    its loss weight is 0. Raises UserError for a damaged latent.
    """
    limit = WORKERS_WITH_LATENTS if dataset.read_latents is not None else os.cpu_count() or 1

    def describe(micro_batch: MicroBatch) -> str:
        paths = (str(dataset.index[row].path) for row in micro_batch.rows.tolist())
        return f"the batch of step {micro_batch.position.step + 1} ({listed(paths)})"

    batches = make_ahead(dataset, micro_batches, workers=min(workers, limit), pin_memory=pin_memory, describe=describe)
    reported: set[Problem] = set()
    with contextlib.closing(batches):
        for loaded in batches:
            if loaded.batch is None or (loaded.problems and on_bad_image == "stop"):
                raise UserError(loaded.problems)
            for problem in set(loaded.problems) - reported:
                logger.warning("skipped: %s", problem)
            reported.update(loaded.problems)
            yield loaded.batch
