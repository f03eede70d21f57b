"""Images and captions without anything random, as validation, colour checks and tag reports use them.

Their figures depend only on the weights and on the images, so that they compare over checkpoints and runs.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sdxl_finetune.batch import Position
from sdxl_finetune.config import Dataset
from sdxl_finetune.data.captions import AS_WRITTEN
from sdxl_finetune.data.index import Entry, Index
from sdxl_finetune.data.loader import DrawNoise, TrainingDataset

NOT_AT_RANDOM = {"flip_aug": False, "color_aug": False, "random_crop": False, "face_crop_aug_range": None}
UNCHANGED = {**AS_WRITTEN, **NOT_AT_RANDOM}
"""Options of datasets whose captions and images are not changed at random. A wildcard {a|b} still becomes one of its
options, chosen by position."""


def no_noise(_position: Position, shape: tuple[int, int, int, int], _latents: Tensor | None) -> tuple[Tensor, None]:
    """Stands in for noise that nothing uses."""
    return torch.zeros(shape), None


def no_timesteps(_position: Position, count: int, _pixels: int) -> Tensor:
    """Stands in for timesteps that nothing uses."""
    return torch.zeros(count, dtype=torch.int64)


def unchanged_index(index: Index) -> Index:
    """An index of the same images, with captions that are whole and in order, and crops at the centre."""
    return Index(index.path, tuple(map(_unchanged, index.datasets)), index.excluded, index.bad_files)


def unchanged(
    training: TrainingDataset,
    *,
    draw_noise: DrawNoise = no_noise,
    draw_timesteps: Callable[[Position, int, int], Tensor] = no_timesteps,
    seed: int = 0,
) -> TrainingDataset:
    """The images of the training dataset with captions and views that are not changed at random, for one rank alone."""
    return replace(
        training,
        index=unchanged_index(training.index),
        draw_noise=draw_noise,
        draw_timesteps=draw_timesteps,
        seed=seed,
        max_steps=1,
        noise_latent_scale=None,
        contrastive=False,
        rank=0,
        ranks=1,
    )


def _unchanged(dataset: Dataset) -> Dataset:
    subsets = tuple(subset.model_copy(update=UNCHANGED) for subset in dataset.subsets)
    return dataset.model_copy(update={"subsets": subsets})


def image_id(entry: Entry) -> tuple[int, int]:
    """The image's `validation_seed` and a hash of its file name, from which its noise is drawn."""
    digest = hashlib.blake2b(os.fsencode(entry.path.name), digest_size=4).digest()
    return entry.subset.validation_seed, int.from_bytes(digest, "little")
