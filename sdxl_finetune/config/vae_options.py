"""Options of the VAE's latent space."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field

from sdxl_finetune.config.fields import Options, Refused, Shown, parsed


def _numbers(value: Any) -> Any:
    """Returns a tuple of one number, or of one number per channel."""
    parts = value.split(",") if isinstance(value, str) else list(value) if isinstance(value, list | tuple) else [value]
    if not parts or any(isinstance(part, bool) for part in parts):
        raise ValueError
    numbers = tuple(float(part) for part in parts)
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError
    return numbers


def _scales(value: Any) -> Any:
    numbers = _numbers(value)
    if min(numbers) <= 0:
        raise Refused("a scale must be above 0")
    return numbers


_SHOWN = Shown('a number, or one for each latent channel, as "0.5,0.6,..."')
Shifts = Annotated[tuple[float, ...], parsed(_numbers), _SHOWN]
Scales = Annotated[tuple[float, ...], parsed(_scales), _SHOWN]


VAE_TYPES = {"sdxl": (4, 0.13025, 0.0), "flux": (16, 0.3611, 0.0), "flux2": (32, 1.0, 0.0)}
"""Latent channels, scale and shift of each `vae_type` in the fork that has this option. The original Flux also shifts
by 0.1159, and that of Flux 2 is in the VAE's file; the fork uses neither."""


class VaeOptions(Options):
    """Latent space"""

    vae_custom_scale: Scales | None = None
    """Factor of the latents, after the shift. Default: that of the VAE, 0.13025 for SDXL's. Of forks of sd-scripts."""
    vae_custom_shift: Shifts | None = None
    """Number to subtract from the latents. Default: that of the VAE, 0 for SDXL's. Of forks of sd-scripts."""
    vae_reflection_padding: bool = False
    """Let convolutions of the VAE pad by reflection, for VAEs that were trained so. Of forks of sd-scripts."""
    latent_channels: int | None = Field(None, ge=1)
    """Latent channels that the VAE and the U-Net must have. The files say how many. Of forks of sd-scripts."""
    vae_type: Literal["sdxl", "flux", "flux2"] | None = None
    """Use the channels, the scale and the shift that a fork has for this kind of VAE. Of forks of sd-scripts."""

    @property
    def given_channels(self) -> int | None:
        """Latent channels that the options ask for."""
        return self.latent_channels or (VAE_TYPES[self.vae_type][0] if self.vae_type else None)

    @property
    def given_scale(self) -> tuple[float, ...] | None:
        """Scale that the options ask for."""
        return self.vae_custom_scale or ((VAE_TYPES[self.vae_type][1],) if self.vae_type else None)

    @property
    def given_shift(self) -> tuple[float, ...] | None:
        """Shift that the options ask for."""
        return self.vae_custom_shift or ((VAE_TYPES[self.vae_type][2],) if self.vae_type else None)
