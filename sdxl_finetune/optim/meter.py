"""What a step says of itself beside its loss: losses by timestep, gradient norms and sizes of updates by part.

All of it stays on the device, as tensors of one element, until the log has time to read it.
"""

import zlib
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import get_total_norm

from sdxl_finetune.batch import TIMESTEPS
from sdxl_finetune.low_bits import Masters, exact_value
from sdxl_finetune.optim.parameters import Group

RANGES = 4
"""Equal ranges of timesteps whose losses are told apart."""
SAMPLE = 1 << 20
"""Elements of each part whose updates are measured: those of a few whole tensors."""


class Meter:
    """Collects over the micro-batches of a step and over the step itself, on one rank."""

    def __init__(self, groups: Sequence[Group], masters: Masters, device: torch.device) -> None:
        self._masters = masters
        self._samples = {group.name: _sample(group.parameters) for group in groups}
        self._before: dict[str, list[Tensor]] = {}
        self._losses = torch.zeros(2, RANGES, device=device)
        self._measured: dict[str, Tensor] = {}

    @torch.no_grad()
    def add_losses(self, losses: Float[Tensor, " k"], timesteps: Int64[Tensor, " k"], weights: Tensor) -> None:
        """Takes in the losses of a micro-batch; images of weight 0 do not count."""
        counted = (weights > 0).float()
        ranges = (timesteps * RANGES // TIMESTEPS).clamp(max=RANGES - 1)
        self._losses.index_add_(1, ranges, torch.stack([losses.float() * counted, counted]))

    def begin_step(self) -> None:
        """Before the backward pass in which the optimizer may step: remembers some of the weights."""
        self._before = {
            name: [exact_value(one, self._masters).float().clone() for one in sample]
            for name, sample in self._samples.items()
        }

    def end_step(self, norms: Mapping[str, Tensor]) -> None:
        """After the step: takes in the norms of the parts' gradients, and how much of their own size weights moved."""
        self._measured |= {f"grad_norm/{name}": norm for name, norm in norms.items()}
        for name, sample in self._samples.items():
            before = self._before.pop(name)
            moved = [exact_value(one, self._masters).float() - old for one, old in zip(sample, before, strict=True)]
            self._measured[f"update/{name}"] = get_total_norm(moved) / get_total_norm(before)

    @property
    def sums(self) -> Float[Tensor, " n"]:
        """Of losses and images by range of timesteps, to be added up over ranks."""
        return self._losses.flatten()

    def take(self, sums: Float[Tensor, " n"]) -> Mapping[str, Tensor]:
        """What was measured since the last time, with these sums; a range without images is not a number."""
        losses, images = sums.reshape(2, RANGES)
        width = TIMESTEPS // RANGES
        names = [f"loss/t{width * at:03d}-{width * (at + 1) - 1:03d}" for at in range(RANGES)]
        measured = self._measured | dict(zip(names, (losses / images).unbind(), strict=True))
        self._losses, self._measured = torch.zeros_like(self._losses), {}
        return measured


def _sample(parameters: Mapping[str, Parameter]) -> list[Parameter]:
    """Some of a part's tensors, chosen by their names, up to SAMPLE elements; at least one."""
    chosen: list[Parameter] = []
    size = 0
    for name in sorted(parameters, key=lambda name: zlib.crc32(name.encode())):
        if size + parameters[name].numel() <= SAMPLE:
            chosen.append(parameters[name])
            size += parameters[name].numel()
    return chosen or [min(parameters.values(), key=Tensor.numel)]
