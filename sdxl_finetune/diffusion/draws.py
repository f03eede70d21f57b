"""Everything random of one global micro-batch: noise, input noise and timesteps.

Each number is a function of (seed, purpose, optimizer step, micro-batch, slot), where a slot is an image's
place in the micro-batch over all ranks. So ranks, steps and images never share noise, a resumed run draws
what the uninterrupted one would have drawn, and an image gets the same draws on however many ranks it is
trained. The reference draws from one generator, seeded alike on every rank, where one option moves the draws
of all others.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from sdxl_finetune.batch import TIMESTEPS, Position
from sdxl_finetune.config import Config
from sdxl_finetune.diffusion.noise import adaptive_offset, multires_noise, multires_sizes, offset_noise
from sdxl_finetune.seeding import position_rng


@dataclass(frozen=True, kw_only=True)
class Draws:
    """What was drawn for k images, on the CPU."""

    noise: Float32[Tensor, "k c h w"]
    """The noise that the model learns to predict."""
    input_noise: Float32[Tensor, "k c h w"] | None
    """Added to `noise` for the model's input only (ip_noise_gamma): Ning et al., Input Perturbation Reduces
    Exposure Bias in Diffusion Models, arXiv 2301.11706."""
    timesteps: Int64[Tensor, " k"]


def draw(
    config: Config,
    seed: int,
    position: Position,
    shape: tuple[int, int, int, int],
    latents: Float[Tensor, "k c h w"] | None = None,
    *,
    latent_scale: float = 1.0,
) -> Draws:
    """Draws for a micro-batch of `shape` (images over all ranks, channels, height, width); a rank takes its rows.

    `latents` of the same shape, scaled as the U-Net sees them, are needed with adaptive_noise_scale. Row i does not
    depend on the number of rows, but for multires noise, which divides by the deviation of all rows together. A
    random strength is one number for the whole micro-batch, as in the reference.
    """
    base = noise = _draw_normal(seed, "noise", position, shape)
    if config.noise_offset:
        offset = config.noise_offset
        if config.noise_offset_random_strength:
            offset *= _draw_strength(seed, "noise offset strength", position)
        strength: float | Tensor = offset
        if config.adaptive_noise_scale is not None:
            assert latents is not None, "adaptive_noise_scale needs the latents"
            strength = adaptive_offset(latents, offset, config.adaptive_noise_scale)
        channel_noise = _draw_normal(seed, "noise offset", position, (*shape[:2], 1, 1))
        noise = offset_noise(noise, channel_noise, strength)
    if config.multires_noise_iterations:
        rng = position_rng(seed, "multires sizes", position.step, position.micro)
        divisors = rng.uniform(2, 4, config.multires_noise_iterations).tolist()
        # The first layer is unit noise of full size, as the base is. Their sum is unit noise times the root of 2,
        # which the base alone can give: the same distribution for half of the numbers.
        layers = [(2**0.5 - 1) * base]
        for level, size in enumerate(multires_sizes(*shape[2:], divisors)[1:], start=1):
            layers.append(_draw_normal(seed, f"multires layer {level}", position, (*shape[:2], *size)))
        noise = multires_noise(noise, layers, config.multires_noise_discount)
    input_noise = None
    if config.ip_noise_gamma:
        gamma = config.ip_noise_gamma
        if config.ip_noise_gamma_random_strength:
            gamma *= _draw_strength(seed, "input noise strength", position)
        input_noise = _draw_normal(seed, "input noise", position, shape) * gamma
    return Draws(noise=noise, input_noise=input_noise, timesteps=_draw_timesteps(config, seed, position, shape[0]))


def _draw_timesteps(config: Config, seed: int, position: Position, images: int) -> Int64[Tensor, " k"]:
    """Uniform over min_timestep (0) <= t < max_timestep (1000); an empty range gives max_timestep, as in the
    reference.
    """
    low = config.min_timestep or 0
    high = TIMESTEPS if config.max_timestep is None else config.max_timestep
    assert low < high or high < TIMESTEPS, f"no timestep in {low}..{high}"
    if low >= high:
        return torch.full((images,), high)
    rngs = (position_rng(seed, "timestep", position.step, position.micro, slot) for slot in range(images))
    return torch.tensor([int(rng.integers(low, high)) for rng in rngs])


def _draw_normal(seed: int, purpose: str, position: Position, shape: tuple[int, ...]) -> Float32[Tensor, "k c h w"]:
    values = np.empty(shape, np.float32)
    for slot, row in enumerate(values):
        rng = position_rng(seed, purpose, position.step, position.micro, slot)
        rng.standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(values)


def _draw_strength(seed: int, purpose: str, position: Position) -> float:
    return position_rng(seed, purpose, position.step, position.micro).random()
