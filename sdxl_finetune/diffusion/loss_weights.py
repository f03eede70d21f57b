"""The loss weight of each image, as a function of the signal-to-noise ratio (SNR) at its timestep.

For noise and velocity the formulas are the reference's (tests/golden/loss.json). For a flow they weight the error of
x_0 or of the noise in the same way, as the papers define them. They hold for SNR > 0. An SNR of exactly 0 occurs only
where the input is pure noise: at the end of a zero-terminal-SNR schedule or of a flow. There the formulas give
infinity, NaN, or 0, which would never train that timestep. We use weight 1 there instead, as without any weighting.
"""

import torch
from jaxtyping import Float32, Num
from torch import Tensor
from typing_extensions import assert_never

from sdxl_finetune.config import LossOptions
from sdxl_finetune.diffusion.objective import Objective

LARGEST_SNR = 1000.0
"""Upper bound of the SNR in all formulas but those of min-SNR and soft min-SNR, as in the reference."""
UNWEIGHTED = {
    "loss_type": "l2",
    "min_snr_gamma": None,
    "soft_min_snr_gamma": None,
    "loss_multiplier": None,
    "debiased_estimation_loss": False,
    "scale_v_pred_loss_like_noise_pred": False,
    "v_pred_like_loss": None,
}
"""Loss options of validation and tag reports, whatever the run trains with."""


def loss_weight(options: LossOptions, objective: Objective, timesteps: Num[Tensor, " k"]) -> Float32[Tensor, " k"]:
    """The product of all weightings that are on, finite and positive. A gamma or factor of 0 turns a weighting off.

    `v_pred_like_loss` = f adds f times the loss of a noise prediction weighted like v: factor 1 + f (SNR + 1) / SNR.
    """
    snr = objective.schedule.snr(timesteps)
    weight = torch.ones_like(snr)
    if options.min_snr_gamma:
        weight = weight * min_snr_weight(snr, options.min_snr_gamma, objective)
    if options.soft_min_snr_gamma:
        weight = weight * soft_min_snr_weight(snr, options.soft_min_snr_gamma, objective)
    if options.scale_v_pred_loss_like_noise_pred:
        weight = weight * noise_like_weight(snr)
    if options.v_pred_like_loss:
        weight = weight * (1 + options.v_pred_like_loss / noise_like_weight(snr))
    if options.debiased_estimation_loss:
        weight = weight * debiased_weight(snr, objective)
    weight = torch.where(snr > 0, weight, 1.0)
    return weight * options.loss_multiplier if options.loss_multiplier else weight


def min_snr_weight(snr: Float32[Tensor, " k"], gamma: float, objective: Objective) -> Float32[Tensor, " k"]:
    """min(SNR, gamma) times the squared error of x_0, as a weight of the squared error of the prediction.

    noise: min(SNR, gamma) / SNR; velocity: min(SNR, gamma) / (SNR + 1); flow: min(SNR, gamma) / (1 + sqrt(SNR))^2.
    Source: Hang et al., Efficient Diffusion Training via Min-SNR Weighting Strategy, arXiv 2303.09556, section 3.4.
    """
    return snr.clamp(max=gamma) / objective.rules.error_ratio(snr)


def soft_min_snr_weight(snr: Float32[Tensor, " k"], gamma: float, objective: Objective) -> Float32[Tensor, " k"]:
    """1 / (1 / SNR + 1 / gamma) times the squared error of x_0, as a weight of the squared error of the prediction.

    It is min(SNR, gamma) without the kink: half of gamma where the SNR is gamma, and never above either of them.
    noise: gamma / (SNR + gamma); velocity and flow: SNR gamma / (SNR + gamma), divided by SNR + 1 or (1 + sqrt(SNR))^2.
    Source: Crowson et al., Scalable High-Resolution Pixel-Space Image Synthesis with Hourglass Diffusion Transformers,
    arXiv 2401.11605, section on the loss weighting, where 1 / SNR is sigma^2. A fork squares the SNR there.
    """
    return gamma / (1 + gamma / snr) / objective.rules.error_ratio(snr)


def noise_like_weight(snr: Float32[Tensor, " k"]) -> Float32[Tensor, " k"]:
    """SNR / (SNR + 1) = alpha^2: the loss of a noise prediction divided by the loss of the same error in v.

    Source: the definition of v in Salimans and Ho, arXiv 2202.00512, section 4. The SNR is bounded by LARGEST_SNR.
    """
    snr = snr.clamp(max=LARGEST_SNR)
    return snr / (snr + 1)


def debiased_weight(snr: Float32[Tensor, " k"], objective: Objective) -> Float32[Tensor, " k"]:
    """1 / sqrt(SNR) for the squared error of the noise. The SNR is bounded by LARGEST_SNR.

    noise: 1 / sqrt(SNR); velocity: 1 / (SNR + 1), as in the reference; flow: sqrt(SNR) / (1 + sqrt(SNR))^2, because the
    error of the noise is alpha times the error of the prediction.
    Source: Yu et al., Unmasking Bias in Diffusion Model Training, arXiv 2310.08442.
    """
    snr = snr.clamp(max=LARGEST_SNR)
    match objective.kind:
        case "noise":
            return snr.rsqrt()
        case "velocity":
            return 1 / (snr + 1)
        case "flow":
            return snr.sqrt() / objective.rules.error_ratio(snr)
        case _:
            assert_never(objective.kind)
