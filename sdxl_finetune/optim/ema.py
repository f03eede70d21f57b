"""A moving average of the trained weights, which draws and generalises better than the last of them.

    average <- d average + (1 - d) weights          after each optimizer step

d is ema_decay, or falls to a half in ema_half_life images (Karras et al., arXiv 2312.02696, section 3.1, on averages
that are counted in images). Early in a run it is held to (1 + n) / (10 + n) after n steps, so that what training began
with does not stay for long. The average is float32, since bf16 would round its small steps away. Every rank keeps it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from sdxl_finetune.config import Config
from sdxl_finetune.low_bits import Masters, exact_value, rounded
from sdxl_finetune.optim.parameters import Group


class MovingAverage:
    """The average of the parameters of these groups; it begins with their values."""

    def __init__(self, groups: Sequence[Group], masters: Masters, config: Config) -> None:
        self._config, self._masters = config, masters
        self._parameters = {
            f"{group.part}.{name}": parameter for group in groups for name, parameter in group.parameters.items()
        }
        device = torch.device("cpu") if config.ema_on_cpu else None
        self.averages = {
            name: exact_value(parameter, masters).to(device or parameter.device, torch.float32, copy=True)
            for name, parameter in self._parameters.items()
        }

    def decay(self, step: int, images: int) -> float:
        """Share of the average that stays after the optimizer step `step` (from 0) on so many images."""
        config = self._config
        if config.ema_half_life is not None:
            asked = 0.5 ** (images / config.ema_half_life)
        else:
            assert config.ema_decay is not None
            asked = config.ema_decay
        return min(asked, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int, images: int) -> None:
        """Takes in the weights after the optimizer step `step`."""
        share = 1 - self.decay(step, images)
        for name, parameter in self._parameters.items():
            average = self.averages[name]
            average.lerp_(exact_value(parameter, self._masters).to(average), share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the model holds the average, which is its own master too; afterwards the very tensors of before.
        It takes no more memory on the device: what is not swapped for the average itself waits in host memory.
        """
        trained: dict[str, Tensor] = {}
        kept = dict(self._masters)
        try:
            for name, parameter in self._parameters.items():
                average = self.averages[name]
                if self._is_swapped(name):
                    trained[name], parameter.data = parameter.data, average
                    continue
                trained[name] = parameter.data.to("cpu", copy=True)
                if parameter.dtype == torch.bfloat16:
                    parameter.data.copy_(rounded(average))
                    self._masters[parameter] = average
                else:
                    parameter.data.copy_(average)
            yield
        finally:
            for name, value in trained.items():
                parameter = self._parameters[name]
                if self._is_swapped(name):
                    parameter.data = value
                else:
                    parameter.data.copy_(value)
            self._masters.clear()
            self._masters.update(kept)

    def _is_swapped(self, name: str) -> bool:
        parameter, average = self._parameters[name], self.averages[name]
        return parameter.dtype == average.dtype and parameter.device == average.device

    def load(self, kept: Mapping[str, Tensor]) -> list[str]:
        """Goes on from what a training state has kept; returns the names of which it has nothing."""
        missing = [name for name in self.averages if name not in kept]
        for name, average in self.averages.items():
            if name in kept:
                average.copy_(kept[name])
        return missing


def build_average(groups: Sequence[Group], masters: Masters, config: Config) -> MovingAverage | None:
    """The average, if the config asks for one."""
    return MovingAverage(groups, masters, config) if asks_for_average(config) else None


def asks_for_average(config: Config) -> bool:
    return config.ema_decay is not None or config.ema_half_life is not None
