"""LatentScale: the shift and the scale by which a U-Net's latents differ from those of the VAE.

diffusers' configs say them in two ways: `scaling_factor` and `shift_factor`, one number each, or `latents_mean` and
`latents_std`, one number per channel.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

SCALING_FACTOR = 0.13025
"""Scaling factor of SDXL's VAE. Latents are multiplied by it before the U-Net gets them."""
UNSAID = 0.18215
"""Scaling factor of a config of diffusers that names none: that of Stable Diffusion 1."""


@dataclass(frozen=True, kw_only=True)
class LatentScale:
    """The U-Net's latents are (latents - shift) * scale. Each is one number, or one number per channel."""

    shift: tuple[float, ...] = (0.0,)
    scale: tuple[float, ...] = (SCALING_FACTOR,)

    def scaled(self, latents: Float[Tensor, "k c h w"]) -> Float[Tensor, "k c h w"]:
        """The U-Net's latents of the VAE's `latents`."""
        if any(self.shift):
            latents = latents - _per_channel(self.shift, latents)
        return latents * _per_channel(self.scale, latents)

    def unscaled(self, latents: Float[Tensor, "k c h w"]) -> Float[Tensor, "k c h w"]:
        """The VAE's latents of the U-Net's `latents`: the inverse of `scaled`."""
        latents = latents / _per_channel(self.scale, latents)
        return latents + _per_channel(self.shift, latents) if any(self.shift) else latents

    def per_channel(self, channels: int) -> tuple[list[float], list[float]]:
        """Shift and scale as one number for each channel."""
        shift, scale = ([*values] * (channels if len(values) == 1 else 1) for values in (self.shift, self.scale))
        return shift, scale

    def to_config(self, channels: int) -> dict[str, Any]:
        """The entries of diffusers' AutoencoderKL.

        A scale alone is a `scaling_factor`. diffusers' pipelines of SDXL do not read `shift_factor`, so that a shift
        is also written as `latents_mean`.
        """
        if len(self.scale) == 1 and not any(self.shift):
            return {"scaling_factor": self.scale[0]}
        shift, scale = self.per_channel(channels)
        if len(self.scale) == 1:
            config: dict[str, Any] = {"scaling_factor": self.scale[0], "latents_std": [1.0] * channels}
        else:
            config = {"scaling_factor": 1.0, "latents_std": [1 / each for each in scale]}
        if len(self.scale) == len(self.shift) == 1:
            config["shift_factor"] = self.shift[0]
        return {**config, "latents_mean": shift}

    def __str__(self) -> str:
        return f"shift {_short(self.shift)}, scale {_short(self.scale)}"


SDXL_SCALE = LatentScale()
"""Shift and scale of SDXL's VAE."""


def scale_of_config(config: Mapping[str, Any]) -> LatentScale:
    """The LatentScale of a config of diffusers' AutoencoderKL, as diffusers' pipelines read it."""
    factor = float(config.get("scaling_factor") or UNSAID)
    mean, deviation = config.get("latents_mean"), config.get("latents_std")
    if mean is None or deviation is None:
        return LatentScale(shift=(float(config.get("shift_factor") or 0.0),), scale=(factor,))
    return LatentScale(
        shift=_joined([float(each) for each in mean]), scale=_joined([factor / each for each in deviation])
    )


def _joined(values: list[float]) -> tuple[float, ...]:
    """One number, if all are equal."""
    return tuple(values if len(set(values)) > 1 else values[:1])


def _per_channel(values: tuple[float, ...], latents: Tensor) -> Tensor | float:
    """The number, or a tensor (c, 1, 1) on the latents' device. CUDA copies so few bytes without a wait."""
    if len(values) == 1:
        return values[0]
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1).to(latents.device, non_blocking=True)


def _short(values: tuple[float, ...]) -> str:
    shown = ", ".join(f"{value:.6g}" for value in values)
    return shown if len(values) == 1 else f"[{shown}]"
