"""The loss weight of each image, as a function of the signal-to-noise ratio (SNR) at its timestep.

The formulas are the reference's (tests/golden/loss.json) and hold for SNR > 0. An SNR of exactly 0 occurs only at the
last timestep of a zero-terminal-SNR schedule. There the formulas give infinity, NaN, or 0, which would never train that
timestep. We use weight 1 there instead, as without any weighting.
"""

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from sdxl_finetune.config import LossOptions
from sdxl_finetune.diffusion.schedule import Schedule

LARGEST_SNR = 1000.0
"""Upper bound of the SNR in all formulas but min-SNR's, as in the reference."""
UNWEIGHTED = {
    "loss_type": "l2",
    "min_snr_gamma": None,
    "debiased_estimation_loss": False,
    "scale_v_pred_loss_like_noise_pred": False,
    "v_pred_like_loss": None,
}
"""Loss options of validation and tag reports, whatever the run trains with."""


def loss_weight(options: LossOptions, schedule: Schedule, timesteps: Int64[Tensor, " k"]) -> Float32[Tensor, " k"]:
    """The product of all weightings that are on, finite and positive. A gamma or factor of 0 turns a weighting off.

    `v_pred_like_loss` = f adds f times the loss of a noise prediction weighted like v: factor 1 + f (SNR + 1) / SNR.
    """
    snr = schedule.snr[timesteps]
    weight = torch.ones_like(snr)
    if options.min_snr_gamma:
        weight = weight * min_snr_weight(snr, options.min_snr_gamma, options.v_parameterization)
    if options.scale_v_pred_loss_like_noise_pred:
        weight = weight * noise_like_weight(snr)
    if options.v_pred_like_loss:
        weight = weight * (1 + options.v_pred_like_loss / noise_like_weight(snr))
    if options.debiased_estimation_loss:
        weight = weight * debiased_weight(snr, options.v_parameterization)
    return torch.where(snr > 0, weight, 1.0)


def min_snr_weight(snr: Float32[Tensor, " k"], gamma: float, v_parameterization: bool) -> Float32[Tensor, " k"]:
    """min(SNR, gamma) / SNR for noise prediction, min(SNR, gamma) / (SNR + 1) for v-prediction.

    Source: Hang et al., Efficient Diffusion Training via Min-SNR Weighting Strategy, arXiv 2303.09556, section 3.4.
    """
    return snr.clamp(max=gamma) / (snr + 1 if v_parameterization else snr)


def noise_like_weight(snr: Float32[Tensor, " k"]) -> Float32[Tensor, " k"]:
    """SNR / (SNR + 1) = alpha^2: the loss of a noise prediction divided by the loss of the same error in v.

    Source: the definition of v in Salimans and Ho, arXiv 2202.00512, section 4. The SNR is bounded by LARGEST_SNR.
    """
    snr = snr.clamp(max=LARGEST_SNR)
    return snr / (snr + 1)


def debiased_weight(snr: Float32[Tensor, " k"], v_parameterization: bool) -> Float32[Tensor, " k"]:
    """1 / sqrt(SNR) for noise prediction, 1 / (SNR + 1) for v-prediction. The SNR is bounded by LARGEST_SNR.

    Source: Yu et al., Unmasking Bias in Diffusion Model Training, arXiv 2310.08442. The form for v is the reference's.
    """
    snr = snr.clamp(max=LARGEST_SNR)
    return 1 / (snr + 1) if v_parameterization else snr.rsqrt()
