"""Validation: the loss of held out images at fixed timesteps with fixed noise.

Each image is used in the middle of each of `validation_timesteps` equal ranges of timesteps. Its noise is plain
Gaussian noise, a function of the file's name, the timestep and `validation_seed`. Its caption is whole and in order,
its crop is at the centre, and its loss is the squared error without loss weights. A figure therefore does
not depend on noise options, loss weights, batch size or seed of the run, and figures of such runs compare.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from accelerate.utils import gather_object
from jaxtyping import Int32
from torch import Tensor

from sdxl_finetune.batch import TIMESTEPS, Batch, Position
from sdxl_finetune.config import Config
from sdxl_finetune.data.batch_plan import MicroBatch
from sdxl_finetune.data.index import Index
from sdxl_finetune.data.loader import TrainingDataset, load_batches
from sdxl_finetune.data.unchanged import image_id, unchanged
from sdxl_finetune.diffusion.image_loss import image_losses
from sdxl_finetune.diffusion.loss_weights import UNWEIGHTED
from sdxl_finetune.model.sdxl import evaluating
from sdxl_finetune.model.vae import batch_latents
from sdxl_finetune.seeding import position_normal
from sdxl_finetune.training.learner import Learner


def draw_validation_noise(
    timesteps: Sequence[int],
    image_ids: Sequence[Sequence[tuple[int, int]]],
    position: Position,
    shape: tuple[int, int, int, int],
    _latents: None,
) -> tuple[Tensor, None]:
    """Draws the noise of a validation batch as a function of the image and the timestep.

    `image_ids` has, for each batch and each image, its `validation_seed` and a hash of its file name.
    """
    timestep = timesteps[position.step]
    ids = image_ids[position.micro_batch]
    noise = [position_normal(shape[1:], seed, "validation", timestep, name) for seed, name in ids]
    return torch.from_numpy(np.stack(noise)), None


def validation_timesteps(timesteps: Sequence[int], position: Position, images: int, _pixels: int) -> Tensor:
    """The timestep of this position, for each image."""
    return torch.full((images,), timesteps[position.step])


@dataclass(frozen=True, kw_only=True)
class Validation:
    """This rank's share of the held out images, and the timesteps at which their loss is computed."""

    dataset: TrainingDataset
    batches: Sequence[Int32[np.ndarray, " k"]]
    """Rows of the index, of one bucket each."""
    dataset_names: Mapping[int, str]
    """Names of the datasets that have held out images, by their number."""
    config: Config
    timesteps: Sequence[int]

    @torch.no_grad()
    def __call__(self, learner: Learner) -> dict[str, float]:
        """Mean losses over all ranks.

        The keys are `loss` for all images, `loss/t125` for a timestep, and `loss/dataset0` for a dataset where there
        are several. The model's modules keep their training or evaluation mode.
        """
        device = learner.accelerator.device
        sums: dict[tuple[int, int], Tensor] = {}
        with evaluating(learner.sdxl):
            for batch in self._load(pin_memory=device.type == "cuda"):
                number = self.dataset.index[int(self.batches[batch.position.micro_batch][0])].bucket.dataset
                batch = batch.to(device)
                latents = batch_latents(batch, learner.vae, drawn=False)
                with learner.autocast():
                    losses = image_losses(learner.sdxl, batch, latents, learner.objective, self.config)
                readable = (batch.weights > 0).float()
                part = torch.stack([(losses * readable).sum(), readable.sum()])
                key = number, self.timesteps[batch.position.step]
                sums[key] = sums[key] + part if key in sums else part
        return self._means({key: part.tolist() for key, part in sums.items()})

    def _load(self, *, pin_memory: bool) -> Iterator[Batch]:
        micro_batches = [
            MicroBatch(Position(epoch=0, step=step, micro_batch=number, micro_batches_in_step=1), rows)
            for number, rows in enumerate(self.batches)
            for step in range(len(self.timesteps))
        ]
        yield from load_batches(self.dataset, micro_batches, workers=0, pin_memory=pin_memory, on_bad_image="skip")

    def _means(self, sums: Mapping[tuple[int, int], Sequence[float]]) -> dict[str, float]:
        """Mean losses by key, from (sum of losses, number of images) by dataset and timestep on every rank."""
        groups: dict[str, list[Sequence[float]]] = {"loss": []}
        for (number, timestep), part in sorted(pair for rank in gather_object([sums]) for pair in rank.items()):
            groups["loss"].append(part)
            groups.setdefault(f"loss/t{timestep:03d}", []).append(part)
            if len(self.dataset_names) > 1:
                groups.setdefault(f"loss/{self.dataset_names[number]}", []).append(part)
        return {
            name: sum(total for total, _ in parts) / max(1, sum(count for _, count in parts))
            for name, parts in groups.items()
        }


def build_validation(config: Config, training: TrainingDataset) -> Validation | None:
    """The validation of the held out images of the training dataset's index; None if no image is held out."""
    index = training.index
    batches = batches_of(index, np.flatnonzero(index.held_out).astype(np.int32))
    if not batches:
        return None
    limit = config.max_validation_steps
    if limit and len(batches) > limit:
        batches = [batches[at] for at in np.linspace(0, len(batches) - 1, limit).round().astype(int)]
    numbers = {index.buckets[index.bucket[rows[0]]].dataset for rows in batches}
    count = config.validation_timesteps
    timesteps = [int((number + 0.5) * TIMESTEPS / count) for number in range(count)]
    batches_of_rank = batches[training.rank :: training.ranks]
    image_ids = [[image_id(index[row]) for row in rows.tolist()] for rows in batches_of_rank]
    dataset = unchanged(
        training,
        draw_noise=partial(draw_validation_noise, timesteps, image_ids),
        draw_timesteps=partial(validation_timesteps, timesteps),
        seed=config.validation_seed,
    )
    return Validation(
        dataset=dataset,
        batches=batches_of_rank,
        dataset_names={number: f"dataset{number}" for number in sorted(numbers)},
        config=config.model_copy(update=UNWEIGHTED),
        timesteps=timesteps,
    )


def batches_of(index: Index, rows: Int32[np.ndarray, " n"]) -> list[Int32[np.ndarray, " k"]]:
    """The rows in batches of one bucket, each with its dataset's batch size."""
    rows = rows[np.argsort(index.bucket[rows], kind="stable")]
    by_bucket = np.split(rows, np.flatnonzero(np.diff(index.bucket[rows])) + 1) if len(rows) else []
    batches = []
    for group in by_bucket:
        size = index.datasets[index.buckets[index.bucket[group[0]]].dataset].batch_size
        batches += [group[start : start + size] for start in range(0, len(group), size)]
    return batches
