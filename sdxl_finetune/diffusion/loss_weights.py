"""How much each image's loss counts, by its timestep's signal-to-noise ratio.

The formulas are the reference's, multiplied together (tests/golden/loss.json); each is a function of the SNR and
holds for SNR > 0. `loss_weight` is finite everywhere: at the one timestep whose SNR is exactly 0, the last of a
zero-terminal-SNR schedule, the formulas give 0 (it would never be trained), infinity or NaN. The weight there is 1,
as without weighting.
"""

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from sdxl_finetune.config import Config
from sdxl_finetune.diffusion.schedule import Schedule

LARGEST_SNR = 1000.0
"""Of all formulas but min-SNR's, as in the reference."""


def loss_weight(config: Config, schedule: Schedule, timesteps: Int64[Tensor, " k"]) -> Float32[Tensor, " k"]:
    """The product of all weightings that are on; a gamma or factor of 0 is off, as in the reference."""
    snr = schedule.snr[timesteps]
    weight = torch.ones_like(snr)
    if config.min_snr_gamma:
        weight = weight * min_snr_weight(snr, config.min_snr_gamma, config.v_parameterization)
    if config.scale_v_pred_loss_like_noise_pred:
        weight = weight * noise_like_weight(snr)
    if config.v_pred_like_loss:
        weight = weight * (1 + config.v_pred_like_loss / noise_like_weight(snr))
    if config.debiased_estimation_loss:
        weight = weight * debiased_weight(snr, config.v_parameterization)
    return torch.where(snr > 0, weight, 1.0)


def min_snr_weight(snr: Float32[Tensor, " k"], gamma: float, v_parameterization: bool) -> Float32[Tensor, " k"]:
    """min(SNR, gamma) / SNR for noise prediction, min(SNR, gamma) / (SNR + 1) for v-prediction: Hang et al.,
    Efficient Diffusion Training via Min-SNR Weighting Strategy, arXiv 2303.09556, section 3.4.
    """
    return snr.clamp(max=gamma) / (snr + 1 if v_parameterization else snr)


def noise_like_weight(snr: Float32[Tensor, " k"]) -> Float32[Tensor, " k"]:
    """SNR / (SNR + 1), the loss of a noise prediction over that of the same error in v: alpha^2, from the
    definition of v (Salimans and Ho, arXiv 2202.00512, section 4).
    """
    snr = snr.clamp(max=LARGEST_SNR)
    return snr / (snr + 1)


def debiased_weight(snr: Float32[Tensor, " k"], v_parameterization: bool) -> Float32[Tensor, " k"]:
    """1 / sqrt(SNR) for noise prediction: Yu et al., Unmasking Bias in Diffusion Model Training, arXiv
    2310.08442. For v-prediction the reference's 1 / (SNR + 1).
    """
    snr = snr.clamp(max=LARGEST_SNR)
    return 1 / (snr + 1) if v_parameterization else snr.rsqrt()
