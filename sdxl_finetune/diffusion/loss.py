"""The loss of each element: squared, absolute, or between the two (pseudo-Huber) with a threshold per image.

In float32 whatever the prediction's precision. The values are the reference's (tests/golden/loss.json).
"""

import math
from typing import Literal

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from typing_extensions import assert_never

from sdxl_finetune.batch import TIMESTEPS
from sdxl_finetune.config import Config
from sdxl_finetune.diffusion.schedule import Schedule


def elementwise_loss(
    prediction: Float[Tensor, "k c h w"],
    target: Float[Tensor, "k c h w"],
    loss_type: Literal["l2", "l1", "huber", "smooth_l1"],
    threshold: Float32[Tensor, " k"] | None = None,
) -> Float32[Tensor, "k c h w"]:
    """l2 is the squared error of Ho et al., arXiv 2006.11239, equation 14. huber and smooth_l1 are 2c H and 2
    H of the pseudo-Huber H = sqrt(error^2 + c^2) - c (Khrapov et al., arXiv 2403.16728), where c is the
    image's `threshold`: huber is near l2 for errors much smaller than c, smooth_l1 near 2 l1 for errors much
    larger.
    """
    error = prediction.float() - target.float()
    match loss_type:
        case "l2":
            return error**2
        case "l1":
            return error.abs()
        case "huber" | "smooth_l1":
            assert threshold is not None, f"{loss_type} needs a threshold"
            c = threshold[:, None, None, None]
            pseudo_huber = torch.sqrt(error**2 + c**2) - c
            return 2 * pseudo_huber * (c if loss_type == "huber" else 1)
        case _:
            assert_never(loss_type)


def huber_threshold(config: Config, schedule: Schedule, timesteps: Int64[Tensor, " k"]) -> Float32[Tensor, " k"] | None:
    """The threshold c of each image, or None for losses without one.

    exponential falls from huber_scale to huber_scale x huber_c over the timesteps (arXiv 2403.16728); snr
    falls from 1 to huber_c with c + (1 - c) / (1 + sigma / alpha)^2 and knows no huber_scale, as in the
    reference.
    """
    if config.loss_type not in ("huber", "smooth_l1"):
        return None
    match config.huber_schedule:
        case "constant":
            return torch.full_like(timesteps, config.huber_c * config.huber_scale, dtype=torch.float32)
        case "exponential":
            return torch.exp(math.log(config.huber_c) / TIMESTEPS * timesteps) * config.huber_scale
        case "snr":
            alphas_cumprod = schedule.alphas_cumprod[timesteps]
            ratio = torch.sqrt((1 - alphas_cumprod) / alphas_cumprod)
            return config.huber_c + (1 - config.huber_c) / (1 + ratio) ** 2
        case _:
            assert_never(config.huber_schedule)
