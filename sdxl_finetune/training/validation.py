"""Validation: the loss on images that are held out, at fixed timesteps with fixed noise.

Each image is looked at in the middle of each of `validation_timesteps` equal ranges of timesteps, with plain Gaussian
noise that is a function of its name, the timestep and validation_seed, its whole caption in order, its centre crop, and
the squared error without weights. So a figure depends on weights and images alone: it can be compared between the
checks of a run, and between runs that differ in noise, loss weights, batch size or seed.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import gather_object
from diffusers import AutoencoderKL
from jaxtyping import Int32
from torch import Tensor, nn

from sdxl_finetune.batch import TIMESTEPS, Batch, Position
from sdxl_finetune.config import Config, Dataset
from sdxl_finetune.data.batch_plan import MicroBatch
from sdxl_finetune.data.index import Entry, Index
from sdxl_finetune.data.loader import TrainingDataset, load_batches
from sdxl_finetune.data.tokens import Tokenizer
from sdxl_finetune.diffusion.draws import Draws
from sdxl_finetune.diffusion.objective import image_losses
from sdxl_finetune.diffusion.schedule import Schedule
from sdxl_finetune.latents.encoding import LatentStore
from sdxl_finetune.model.sdxl import evaluating
from sdxl_finetune.model.vae import batch_latents, pixels_per_latent
from sdxl_finetune.seeding import position_rng

UNWEIGHTED = {
    "loss_type": "l2",
    "min_snr_gamma": None,
    "debiased_estimation_loss": False,
    "scale_v_pred_loss_like_noise_pred": False,
    "v_pred_like_loss": None,
}
AS_WRITTEN = {
    "shuffle_caption": False,
    "caption_dropout_rate": 0.0,
    "caption_dropout_every_n_epochs": 0,
    "caption_tag_dropout_rate": 0.0,
    "token_warmup_step": 0,
    "flip_aug": False,
    "color_aug": False,
    "random_crop": False,
}
"""Captions and images are not changed at random; {a|b} still becomes one of the two, by the position."""


@dataclass(frozen=True)
class Draw:
    """Noise and timesteps of validation batches, by what each image is called."""

    timesteps: Sequence[int]
    names: Sequence[Sequence[tuple[int, int]]]
    """Of the images of each batch: validation_seed, and the file's name as a number."""

    def __call__(self, position: Position, shape: tuple[int, int, int, int], _latents: Tensor | None) -> Draws:
        timestep = self.timesteps[position.step]
        rngs = [position_rng(seed, "validation", timestep, name) for seed, name in self.names[position.micro]]
        noise = torch.from_numpy(np.stack([rng.standard_normal(shape[1:], np.float32) for rng in rngs]))
        return Draws(noise=noise, input_noise=None, timesteps=torch.full((shape[0],), timestep))


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What is looked at, the same each time; this rank's share of it."""

    images: TrainingDataset
    batches: Sequence[Int32[np.ndarray, " k"]]
    """Rows of the index, of one bucket each."""
    names: Mapping[int, str]
    """Of the datasets that have held out images, by their number."""
    config: Config
    vae: AutoencoderKL
    schedule: Schedule
    timesteps: Sequence[int]

    @torch.no_grad()
    def __call__(
        self, model: nn.Module, device: torch.device, autocast: Callable[[], AbstractContextManager]
    ) -> dict[str, float]:
        """Mean losses over all ranks: `loss` of all, `loss/t125` of a timestep, `loss/NAME` of a dataset where there
        are several. The model is afterwards in the mode that it was in.
        """
        sums: dict[tuple[int, int], Tensor] = {}
        with evaluating(model):
            for batch in self._load():
                owner = self.images.index[int(self.batches[batch.position.micro][0])].bucket.dataset
                batch = batch.to(device)
                latents = batch_latents(batch, self.vae, drawn=False)
                with autocast():
                    losses = image_losses(model, batch, latents, self.schedule, self.config)
                key = owner, self.timesteps[batch.position.step]
                readable = (batch.weights > 0).float()
                part = torch.stack([(losses * readable).sum(), readable.sum()])
                sums[key] = sums[key] + part if key in sums else part
        return self._means({key: part.tolist() for key, part in sums.items()})

    def _load(self) -> Iterator[Batch]:
        pinned = torch.cuda.is_available()
        micro_batches = [
            MicroBatch(Position(epoch=0, step=step, micro=number, micros=1), rows)
            for number, rows in enumerate(self.batches)
            for step in range(len(self.timesteps))
        ]
        yield from load_batches(self.images, micro_batches, workers=0, pin_memory=pinned, on_bad_image="skip")

    def _means(self, own: Mapping[tuple[int, int], Sequence[float]]) -> dict[str, float]:
        groups: dict[str, list[Sequence[float]]] = {"loss": []}
        for (owner, timestep), part in sorted(pair for rank in gather_object([own]) for pair in rank.items()):
            groups["loss"].append(part)
            groups.setdefault(f"loss/t{timestep:03d}", []).append(part)
            if len(self.names) > 1:
                groups.setdefault(f"loss/{self.names[owner]}", []).append(part)
        return {
            name: sum(total for total, _ in parts) / max(1, sum(count for _, count in parts))
            for name, parts in groups.items()
        }


def build_validation(
    config: Config,
    index: Index,
    store: LatentStore | None,
    tokenizer: Tokenizer,
    vae: AutoencoderKL,
    schedule: Schedule,
    *,
    rank: int,
    ranks: int,
) -> Validation | None:
    """None without held out images. Batches are of one bucket; with max_validation_steps, evenly taken out of all."""
    rows = np.flatnonzero(index.held_out).astype(np.int32)
    if not len(rows):
        return None
    rows = rows[np.argsort(index.bucket[rows], kind="stable")]
    groups = np.split(rows, np.flatnonzero(np.diff(index.bucket[rows])) + 1)
    sizes = [index.datasets[index.buckets[index.bucket[group[0]]].dataset].batch_size for group in groups]
    parts = [
        group[at : at + size] for group, size in zip(groups, sizes, strict=True) for at in range(0, len(group), size)
    ]
    if config.max_validation_steps and len(parts) > config.max_validation_steps:
        parts = [parts[at] for at in np.linspace(0, len(parts) - 1, config.max_validation_steps).round().astype(int)]
    owners = [index.buckets[index.bucket[part[0]]].dataset for part in parts]
    timesteps = [
        int((number + 0.5) * TIMESTEPS / config.validation_timesteps) for number in range(config.validation_timesteps)
    ]
    datasets = tuple(_as_written(dataset) for dataset in index.datasets)
    own = parts[rank::ranks]
    draw = Draw(timesteps, [[_name(index[row]) for row in part.tolist()] for part in own])
    images = TrainingDataset(
        index=Index(index.path, datasets, index.excluded, index.bad_files),
        latents=store,
        tokenize=tokenizer,
        draw=draw,
        seed=config.validation_seed,
        max_steps=1,
        pixels_per_latent=pixels_per_latent(vae),
    )
    return Validation(
        images=images,
        batches=own,
        names={owner: f"dataset{owner}" for owner in sorted(set(owners))},
        config=config.model_copy(update=UNWEIGHTED),
        vae=vae,
        schedule=schedule,
        timesteps=timesteps,
    )


def validation_due(config: Config, *, step: int, epoch: int | None, last: bool) -> bool:
    """Whether to validate: before training (step 0), after `step` steps, of which `epoch` may have ended with them,
    and at the end.
    """
    if step == 0 or last:
        return True
    epochs, steps = config.validate_every_n_epochs, config.validate_every_n_steps
    if epochs is None and steps is None:
        epochs = 1
    if epochs:
        return epoch is not None and epoch % epochs == 0
    return bool(steps and step % steps == 0)


def _as_written(dataset: Dataset) -> Dataset:
    subsets = tuple(subset.model_copy(update=AS_WRITTEN) for subset in dataset.subsets)
    return dataset.model_copy(update={"subsets": subsets})


def _name(entry: Entry) -> tuple[int, int]:
    digest = hashlib.blake2b(os.fsencode(entry.path.name), digest_size=4).digest()
    return entry.subset.validation_seed, int.from_bytes(digest, "little")
