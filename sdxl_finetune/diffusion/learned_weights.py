"""Loss weights that a small network learns: the inverse of the loss at each noise level.

    L = mean of share_i (loss_i / exp(u(c_i)) + u(c_i))          c = ln(sigma_t / alpha_t) / 4 = -ln(SNR) / 8

For a fixed model L is smallest where exp(u(c)) is the mean loss at the noise level c. The model then trains with the
weight exp(-u), and each noise level contributes the same to its loss. L is, apart from constants, the negative
log-likelihood of normal errors whose variance is exp(u) (Kendall et al., arXiv 1705.07115).

Source: Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models (EDM2), arXiv 2312.02696, the
section on uncertainty-based weighting of the appendix. The noise level is the c_noise of EDM (Karras et al., arXiv
2206.00364, table 1), whose sigma is our sigma / alpha.
"""

import math

import numpy as np
import torch
from jaxtyping import Float, Float32, Num
from torch import Tensor, nn

from sdxl_finetune.diffusion.objective import Objective
from sdxl_finetune.seeding import position_rng

LARGEST_LEVEL = 8.0
"""Bound of |ln(sigma / alpha)|. Pure noise has an infinite one. The timestep 998 before it has 7.7 with zero terminal
SNR, and a flow is beyond the bound for t below 0.0003 only."""


class LogLoss(nn.Module):
    """u(c) = sum of w_i sqrt(2) cos(2 pi (f_i c + p_i)) / sqrt(n), with f normal, p uniform in [0, 1), and learned w.

    These are EDM2's magnitude-preserving Fourier features and linear layer (arXiv 2312.02696), with two differences.
    w starts at 0, so that training starts with the weight 1 everywhere. The norm of w is not forced to sqrt(n), which
    would keep u from becoming small enough for a loss of 0.001. L is convex in w.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        rng = position_rng(0, "features of the noise level")
        frequencies, phases = rng.standard_normal(channels), rng.random(channels)
        self.register_buffer("frequencies", torch.from_numpy(frequencies.astype(np.float32)))
        self.register_buffer("phases", torch.from_numpy(phases.astype(np.float32)))
        self.weight = nn.Parameter(torch.zeros(channels))

    def forward(self, levels: Float32[Tensor, " k"]) -> Float32[Tensor, " k"]:
        angles = 2 * torch.pi * (levels[:, None] * self.frequencies + self.phases)
        return (angles.cos() * self.weight).sum(dim=1) * math.sqrt(2 / len(self.weight))


def noise_level(objective: Objective, timesteps: Num[Tensor, " k"]) -> Float32[Tensor, " k"]:
    """ln(sigma / alpha) / 4 at the timesteps, within +-LARGEST_LEVEL / 4."""
    level = -0.5 * objective.schedule.snr(timesteps).log()
    return level.clamp(-LARGEST_LEVEL, LARGEST_LEVEL) / 4


def uncertainty_loss(
    losses: Float[Tensor, " k"], log_losses: Float32[Tensor, " k"], shares: Float32[Tensor, " k"]
) -> Float[Tensor, ""]:
    """The loss L of a micro-batch, given the loss of each image, u at its noise level, and its share in the step.

    The share contains the image's own loss weight. An image of weight 2 counts twice for the model and for the network.
    """
    return ((losses * (-log_losses).exp() + log_losses) * shares).sum()
