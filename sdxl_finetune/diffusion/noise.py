"""The training noise: functions that mix random numbers, and `draw_noise`, which draws the numbers and mixes them.

Every random number is a function of seed, purpose, step, micro-batch and slot (see seeding.py). Ranks, steps and images
therefore never share noise. A resumed run draws the noise of an uninterrupted run, and one option does not change the
numbers of another. The reference draws everything from one generator that is seeded alike on every rank.

All functions work in float32 and leave their inputs unchanged. Their values are the reference's
(tests/golden/noise.json), which works in place and in the precision of the latents.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor

from sdxl_finetune.batch import Position
from sdxl_finetune.config import NoiseOptions
from sdxl_finetune.seeding import position_normal, position_rng


def draw_noise(
    options: NoiseOptions,
    seed: int,
    position: Position,
    shape: tuple[int, int, int, int],
    latents: Float[Tensor, "k c h w"] | None = None,
    slots: Sequence[int] | None = None,
) -> tuple[Float32[Tensor, "k c h w"], Float32[Tensor, "k c h w"] | None]:
    """Draws the noise of k images, and the input noise of `ip_noise_gamma`, or None without that option.

    `shape` is (k, channels, height, width), where k counts the images of all ranks. `slots` says whose random numbers
    each image is given, by default its own. Everything else is as in `mix_noise`.
    """
    slots = range(shape[0]) if slots is None else slots
    return mix_noise(options, seed, position, draw_base(seed, position, shape, slots), latents, slots)


def draw_base(
    seed: int, position: Position, shape: tuple[int, int, int, int], slots: Sequence[int] | None = None
) -> Float32[Tensor, "k c h w"]:
    """Draws the standard normal noise of k images, without anything that the options add."""
    return _draw_normal(seed, "noise", position, shape, range(shape[0]) if slots is None else slots)


def mix_noise(
    options: NoiseOptions,
    seed: int,
    position: Position,
    base: Float32[Tensor, "k c h w"],
    latents: Float[Tensor, "k c h w"] | None = None,
    slots: Sequence[int] | None = None,
) -> tuple[Float32[Tensor, "k c h w"], Float32[Tensor, "k c h w"] | None]:
    """Adds to standard normal noise what the options ask for. Returns the noise and the input noise, or None for it.

    The model learns to predict the noise, or a target that is computed from it. The input noise is added to it for the
    model's input only: Ning et al., Input Perturbation Reduces Exposure Bias in Diffusion Models, arXiv 2301.11706,
    algorithm 1.

    `latents` are needed if `adaptive_noise_scale` is set, and are scaled as the U-Net sees them. Image i has the same
    noise whatever k is. The exception is multires noise, which is divided by the standard deviation of all
    k images. A random strength is one number for the micro-batch, as in the reference.
    """
    shape, place = tuple(base.shape), (position.step, position.micro_batch)
    slots = range(len(base)) if slots is None else slots
    noise = base
    if options.noise_offset:
        offset = options.noise_offset
        if options.noise_offset_random_strength:
            offset *= position_rng(seed, "noise offset strength", *place).random()
        strength: float | Tensor = offset
        if options.adaptive_noise_scale is not None:
            assert latents is not None, "adaptive_noise_scale needs the latents"
            strength = adaptive_offset(latents, offset, options.adaptive_noise_scale)
        channel_noise = _draw_normal(seed, "noise offset", position, (*shape[:2], 1, 1), slots)
        noise = offset_noise(noise, channel_noise, strength)
    if options.multires_noise_iterations:
        rng = position_rng(seed, "multires sizes", *place)
        divisors = rng.uniform(2, 4, options.multires_noise_iterations).tolist()
        # The first layer is unit noise of full size, as the base is. The sum of both is unit noise times the root of 2.
        # A multiple of the base has the same distribution and needs half of the random numbers.
        layers = [(2**0.5 - 1) * base]
        for level, size in enumerate(multires_sizes(base.shape[2], base.shape[3], divisors)[1:], start=1):
            layers.append(_draw_normal(seed, f"multires layer {level}", position, (*shape[:2], *size), slots))
        noise = multires_noise(noise, layers, options.multires_noise_discount)
    if not options.ip_noise_gamma:
        return noise, None
    gamma = options.ip_noise_gamma
    if options.ip_noise_gamma_random_strength:
        gamma *= position_rng(seed, "input noise strength", *place).random()
    return noise, _draw_normal(seed, "input noise", position, shape, slots) * gamma


def offset_noise(
    noise: Float32[Tensor, "k c h w"],
    channel_noise: Float32[Tensor, "k c 1 1"],
    strength: float | Float32[Tensor, "k c 1 1"],
) -> Float32[Tensor, "k c h w"]:
    """Adds one constant to each channel, so that a model learns to change the mean of an image.

    Source: Guttenberg, Diffusion with Offset Noise, crosslabs.org 2023.
    """
    return noise + strength * channel_noise


def adaptive_offset(latents: Float[Tensor, "k c h w"], offset: float, scale: float) -> Float32[Tensor, "k c 1 1"]:
    """Strength of the noise offset of each channel: max(0, offset + scale * |mean of the channel's latents|).

    Source: the reference, which has no paper for it (apply_noise_offset).
    """
    return (offset + scale * latents.float().mean(dim=(2, 3), keepdim=True).abs()).clamp(min=0)


def multires_sizes(height: int, width: int, divisors: Sequence[float]) -> list[tuple[int, int]]:
    """Sizes (height, width) of the layers of a noise pyramid. Layer i is divided by `divisors[i] ** i`.

    The first layer therefore has full size. The last layer is the first with a side of 1, or the one of the last
    divisor. The reference draws the divisors from [2, 4).
    """
    sizes: list[tuple[int, int]] = []
    for level, divisor in enumerate(divisors):
        sizes.append((max(1, int(height / divisor**level)), max(1, int(width / divisor**level))))
        if 1 in sizes[-1]:
            break
    return sizes


def multires_noise(
    noise: Float32[Tensor, "k c h w"], layers: Sequence[Float32[Tensor, "k c _ _"]], discount: float
) -> Float32[Tensor, "k c h w"]:
    """Adds the layers of a noise pyramid, and divides the sum by its standard deviation over the whole micro-batch.

    Each layer is enlarged to full size and multiplied by `discount ** level`.
    Source: Whitaker, Multi-Resolution Noise for Diffusion Model Training, wandb.ai 2023.
    """
    total = noise.clone()
    for level, layer in enumerate(layers):
        if layer.shape != noise.shape:
            layer = F.interpolate(layer, size=noise.shape[2:], mode="bilinear")
        total.add_(layer, alpha=discount**level)
    return total.div_(total.std())


def _draw_normal(
    seed: int, purpose: str, position: Position, shape: tuple[int, ...], slots: Sequence[int]
) -> Float32[Tensor, "k c h w"]:
    place = position.step, position.micro_batch
    return torch.from_numpy(np.stack([position_normal(shape[1:], seed, purpose, *place, slot) for slot in slots]))
