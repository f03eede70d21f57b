"""The loss of each element of a prediction, and the thresholds of the pseudo-Huber losses.

Losses are float32, whatever the precision of the prediction. The values are the reference's (tests/golden/loss.json).
"""

import math
from typing import Literal

import torch
from jaxtyping import Float, Float32, Num
from torch import Tensor
from typing_extensions import assert_never

from sdxl_finetune.batch import TIMESTEPS
from sdxl_finetune.config import LossOptions
from sdxl_finetune.diffusion.schedule import Schedule


def elementwise_loss(
    prediction: Float[Tensor, "k c h w"],
    target: Float[Tensor, "k c h w"],
    loss_type: Literal["l2", "l1", "huber", "smooth_l1"],
    threshold: Float32[Tensor, " k"] | None = None,
) -> Float32[Tensor, "k c h w"]:
    """The loss of each element, where c is the `threshold` of the image and H the pseudo-Huber loss:

        l2         error^2                  Ho et al., arXiv 2006.11239, equation 14
        l1         |error|
        huber      2 c H                    H = sqrt(error^2 + c^2) - c
        smooth_l1  2 H                      Khrapov et al., arXiv 2403.16728

    For errors much smaller than c, huber is close to l2. For errors much larger than c, smooth_l1 is close to 2 l1.
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


def huber_threshold(
    options: LossOptions, schedule: Schedule, timesteps: Num[Tensor, " k"]
) -> Float32[Tensor, " k"] | None:
    """The threshold c of each image by `huber_schedule`, or None for losses without a threshold:

        constant     huber_c * huber_scale
        exponential  huber_c ^ (t / 1000) * huber_scale                 arXiv 2403.16728
        snr          huber_c + (1 - huber_c) / (1 + sigma / alpha)^2    the reference

    The snr schedule ignores `huber_scale`, as in the reference.
    """
    if options.loss_type not in ("huber", "smooth_l1"):
        return None
    match options.huber_schedule:
        case "constant":
            return torch.full_like(timesteps, options.huber_c * options.huber_scale, dtype=torch.float32)
        case "exponential":
            return torch.exp(math.log(options.huber_c) / TIMESTEPS * timesteps) * options.huber_scale
        case "snr":
            alpha, sigma = schedule.alpha_sigma(timesteps)
            return options.huber_c + (1 - options.huber_c) / (1 + sigma / alpha) ** 2
        case _:
            assert_never(options.huber_schedule)
