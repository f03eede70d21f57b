"""Measurements of a training step beside its loss: losses by timestep, gradient norms and sizes of updates.

All of them stay on the device, as tensors of one element, until the log reads them.
"""

import zlib
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import get_total_norm

from sdxl_finetune.batch import TIMESTEPS, Batch
from sdxl_finetune.optim.loss_scale import LossScale
from sdxl_finetune.optim.parameters import TrainedParameters

RANGES = 4
"""Number of equal ranges of timesteps with a loss of their own."""
IMAGE_LOSSES, GRADIENT_NORMS = "image_losses", "gradient_norms"
"""Names of vectors: the loss of each image, 0 for images of weight 0, and the gradient norm of each parameter."""
SAMPLE = 1 << 20
"""Elements of each group whose updates are measured, in a few whole tensors: all of them would take too long."""


class Meter:
    """Measures the micro-batches of a step and the step itself, on one rank."""

    def __init__(self, parameters: TrainedParameters, device: torch.device, ranks: int = 1) -> None:
        self._trained, self._ranks = parameters, ranks
        self._samples = {group.name: sample(group.parameters) for group in parameters.groups}
        self._before: dict[str, list[Tensor]] = {}
        self._losses = torch.zeros(2, RANGES, device=device)
        self._of_images: list[Tensor] = []
        self._measured: dict[str, Tensor] = {}

    @torch.no_grad()
    def add_losses(self, losses: Float[Tensor, " k"], batch: Batch) -> None:
        """Adds the losses of a micro-batch; images of weight 0 do not count."""
        self._of_images.append(batch.among_ranks(counted_losses(losses, batch.weights)))
        counted = (batch.weights > 0).float()
        ranges = (batch.timesteps * RANGES // TIMESTEPS).long().clamp(max=RANGES - 1)
        self._losses.index_add_(1, ranges, torch.stack([losses.float() * counted, counted]))

    def begin_step(self) -> None:
        """Copies the sampled weights. Call it before the backward pass in which the optimizer may step."""
        self._before = {
            name: [self._trained.value(parameter).float().clone() for parameter in sample]
            for name, sample in self._samples.items()
        }

    def end_step(self, norms: Mapping[str, Tensor], scale: LossScale | None = None) -> None:
        """Measures the step that was made, given the gradient norm of each group and the loss scale of the next step.

        The size of an update is the norm of the change of the sampled weights, divided by the norm of these weights.
        """
        self._measured |= {f"grad_norm/{name}": norm for name, norm in norms.items()}
        if scale is not None:
            self._measured["loss_scale"] = scale.value
        for name, sample in self._samples.items():
            before = self._before.pop(name)
            after = [self._trained.value(parameter).float() for parameter in sample]
            changes = torch._foreach_sub(after, before)
            self._measured[f"update/{name}"] = get_total_norm(changes) / get_total_norm(before)

    @property
    def sums(self) -> Float[Tensor, " n"]:
        """Sums of losses and numbers of images by range of timesteps, and losses of images, to average over ranks."""
        return torch.cat([self._losses.flatten(), *self._of_images])

    def take(self, sums: Float[Tensor, " n"]) -> Mapping[str, Tensor]:
        """Returns all measurements since the last call, with these sums; NaN for a range without images."""
        losses, images = sums[: 2 * RANGES].reshape(2, RANGES)
        width = TIMESTEPS // RANGES
        names = [f"loss/t{width * at:03d}-{width * (at + 1) - 1:03d}" for at in range(RANGES)]
        measured = self._measured | dict(zip(names, (losses / images).unbind(), strict=True))
        self._losses, self._of_images, self._measured = torch.zeros_like(self._losses), [], {}
        return measured

    def vectors(self, sums: Float[Tensor, " n"], norms: Float[Tensor, " p"]) -> Mapping[str, Tensor]:
        """Returns the loss of each image over all ranks, from these sums, and the gradient norm of each parameter."""
        return {IMAGE_LOSSES: sums[2 * RANGES :] * self._ranks, GRADIENT_NORMS: norms}


def counted_losses(losses: Float[Tensor, " k"], weights: Tensor) -> Float[Tensor, " k"]:
    """Losses of images, with 0 for images of weight 0. A loss that is not finite stays, because it spoils the sum."""
    losses = losses.float()
    return torch.where((weights > 0) | ~losses.isfinite(), losses, torch.zeros_like(losses))


def sample(parameters: Mapping[str, Parameter]) -> list[Parameter]:
    """Chooses whole tensors by a hash of their names, up to SAMPLE elements; at least one."""
    chosen: list[Parameter] = []
    size = 0
    for name in sorted(parameters, key=lambda name: zlib.crc32(name.encode())):
        if size + parameters[name].numel() <= SAMPLE:
            chosen.append(parameters[name])
            size += parameters[name].numel()
    return chosen or [min(parameters.values(), key=Tensor.numel)]
