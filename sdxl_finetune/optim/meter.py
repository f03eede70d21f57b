"""What a step says of itself beside its loss: losses by timestep, gradient norms and sizes of updates by part.

All of it stays on the device, as tensors of one element, until the log has time to read it.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from sdxl_finetune.batch import TIMESTEPS
from sdxl_finetune.optim.groups import Group

RANGES = 4
"""Equal ranges of timesteps whose losses are told apart."""
SAMPLE = 1 << 20
"""Elements of each part whose updates are measured: those of a few whole tensors."""


class Meter:
    """Collects over the micro-batches of a step and over the step itself, on one rank."""

    def __init__(self, groups: Sequence[Group], device: torch.device) -> None:
        self._groups = groups
        self._samples = {group.name: _sample(group.parameters) for group in groups}
        self._losses = torch.zeros(2, RANGES, device=device)
        self._measured: dict[str, Tensor] = {}

    @torch.no_grad()
    def add_losses(self, losses: Float[Tensor, " k"], timesteps: Int64[Tensor, " k"], weights: Tensor) -> None:
        """Takes in the losses of a micro-batch; images of weight 0 do not count."""
        counted = (weights > 0).float()
        ranges = (timesteps * RANGES // TIMESTEPS).clamp(max=RANGES - 1)
        self._losses.index_add_(1, ranges, torch.stack([losses.float() * counted, counted]))

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scales the gradients of all parts together down to `max_norm` (0: as they are); returns their norm before."""
        own = {group.name: [one for one in group.parameters.values() if one.grad is not None] for group in self._groups}
        norms = {name: get_total_norm([one.grad for one in given]) for name, given in own.items()}  # type: ignore[misc]
        total = torch.linalg.vector_norm(torch.stack(list(norms.values())))
        self._measured |= {f"grad_norm/{name}": norm for name, norm in norms.items()}
        if max_norm:
            clip_grads_with_norm_([one for given in own.values() for one in given], max_norm, total)
        return total

    @contextmanager
    def watch_updates(self) -> Iterator[None]:
        """Around the optimizer's step: measures how much of their own size the weights move by it."""
        before = {name: [one.detach().float().clone() for one in sample] for name, sample in self._samples.items()}
        yield
        for name, sample in self._samples.items():
            moved = [one.detach().float() - old for one, old in zip(sample, before[name], strict=True)]
            self._measured[f"update/{name}"] = get_total_norm(moved) / get_total_norm(before[name])

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
