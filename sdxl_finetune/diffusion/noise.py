"""What the training noise is made of, as functions of numbers already drawn (draws.py draws them).

All out of place and in float32. The values are the reference's (tests/golden/noise.json), which works in
place and in the latents' own precision.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor


def offset_noise(
    noise: Float32[Tensor, "k c h w"],
    channel_noise: Float32[Tensor, "k c 1 1"],
    strength: float | Float32[Tensor, "k c 1 1"],
) -> Float32[Tensor, "k c h w"]:
    """Adds to each channel one constant, so that a model learns to move an image's mean: Guttenberg,
    Diffusion with Offset Noise, crosslabs.org 2023.
    """
    return noise + strength * channel_noise


def adaptive_offset(latents: Float[Tensor, "k c h w"], offset: float, scale: float) -> Float32[Tensor, "k c 1 1"]:
    """Strength of the offset for each channel: `offset` + `scale` x |mean of the latents|, at least 0."""
    return (offset + scale * latents.float().mean(dim=(2, 3), keepdim=True).abs()).clamp(min=0)


def multires_sizes(height: int, width: int, divisors: Sequence[float]) -> list[tuple[int, int]]:
    """Sizes (height, width) of the layers of a noise pyramid: level i is divided by `divisors[i] ** i`, so
    the first has full size. Ends with the first level that has a side of 1, or with the last divisor. The
    reference draws the divisors from [2, 4).
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
    """Adds the layers of a noise pyramid, each enlarged to full size and `discount` times weaker than the one
    before, and divides by the standard deviation of the whole batch: Whitaker, Multi-Resolution Noise for
    Diffusion Model Training, wandb.ai 2023.
    """
    total = noise.clone()
    for level, layer in enumerate(layers):
        if layer.shape != noise.shape:
            layer = F.interpolate(layer, size=noise.shape[2:], mode="bilinear")
        total.add_(layer, alpha=discount**level)
    return total.div_(total.std())
