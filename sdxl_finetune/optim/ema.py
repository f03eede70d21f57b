"""Exponential moving average (EMA) of the trained weights, which draws and generalises better than the last weights.

    ema <- d ema + (1 - d) weights          after each optimizer step

The decay d is ema_decay, or the value that halves a weight's share within ema_half_life images. Karras et al. (arXiv
2312.02696, section 3.1) count averages in images, too. After n steps d is at most (1 + n) / (10 + n), so that the
initial weights do not stay for long. The EMA is float32, because bf16 would round its small steps away. Every rank
keeps its own copy.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from sdxl_finetune.config import EmaOptions
from sdxl_finetune.optim.parameters import TrainedParameters


class Ema:
    """The EMA of all trained parameters. It starts with their values."""

    def __init__(self, parameters: TrainedParameters, options: EmaOptions) -> None:
        self._options, self._trained = options, parameters
        self._parameters = dict(parameters.named())
        device = torch.device("cpu") if options.ema_on_cpu else None
        self.averages: dict[str, Tensor] = {
            name: parameters.value(parameter).to(device or parameter.device, torch.float32, copy=True)
            for name, parameter in self._parameters.items()
        }
        """Float32 averages by the full names of the parameters."""

    def decay(self, step: int, images: int) -> float:
        """Returns d for the optimizer step `step` (from 0) on so many images."""
        half_life = self._options.ema_half_life
        asked = self._options.ema_decay if half_life is None else 0.5 ** (images / half_life)
        assert asked is not None, "see uses_ema"
        return min(asked, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int, images: int) -> None:
        """Takes in the weights after the optimizer step `step` (from 0) on so many images."""
        share = 1 - self.decay(step, images)
        for name, parameter in self._parameters.items():
            average = self.averages[name]
            average.lerp_(self._trained.value(parameter).to(average), share)

    def in_place(self) -> AbstractContextManager[None]:
        """Returns a context in which the model holds the EMA, in float32 where files are written."""
        averages = {parameter: self.averages[name] for name, parameter in self._parameters.items()}
        return self._trained.masters.replaced_by(averages)

    def load(self, saved: Mapping[str, Tensor]) -> list[str]:
        """Copies the averages of a training state; returns the names of parameters that are missing there."""
        for name in self.averages.keys() & saved.keys():
            self.averages[name].copy_(saved[name])
        return [name for name in self.averages if name not in saved]


def build_ema(parameters: TrainedParameters, options: EmaOptions) -> Ema | None:
    """Returns the EMA, or None if the options ask for none."""
    return Ema(parameters, options) if uses_ema(options) else None


def uses_ema(options: EmaOptions) -> bool:
    return options.ema_decay is not None or options.ema_half_life is not None
