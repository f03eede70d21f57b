"""SDXL's noise schedule: how much of an image is left at each of its 1,000 timesteps.

The values are those of the reference (diffusers' DDPMScheduler with "scaled_linear" betas). One thing differs: the SNR
is that of the schedule that is trained on, with or without zero terminal SNR.

All tensors are float32, whatever the precision of the network, because half precision changes timesteps and rounds the
noise. A `Schedule` is a value on one device. The functions index it with a tensor of timesteps on the same device, and
a step never waits for the GPU.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from sdxl_finetune.batch import TIMESTEPS

FIRST_BETA, LAST_BETA = 0.00085, 0.012
"""Variance of the noise that the first and the last timestep add, in SDXL's own schedule."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The noise schedule by timestep, from 0 (nearly no noise) to 999."""

    alphas_cumprod: Float32[Tensor, " timesteps"]
    """Alpha-bar: the share of the signal's variance that is left, in [0, 1)."""
    snr: Float32[Tensor, " timesteps"]
    """Signal-to-noise ratio. With zero terminal SNR it is exactly 0 at timestep 999."""

    def to(self, device: torch.device) -> "Schedule":
        return Schedule(alphas_cumprod=self.alphas_cumprod.to(device), snr=self.snr.to(device))


def build_schedule(*, zero_terminal_snr: bool) -> Schedule:
    """The noise schedule to train on, on the CPU.

    The SNR is taken after the zero-terminal-SNR fix. The reference takes it before.
    """
    betas = torch.linspace(FIRST_BETA**0.5, LAST_BETA**0.5, TIMESTEPS, dtype=torch.float32) ** 2
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    if zero_terminal_snr:
        alphas_cumprod = rescaled_to_zero_terminal_snr(alphas_cumprod)
    return Schedule(alphas_cumprod=alphas_cumprod, snr=signal_to_noise(alphas_cumprod))


def rescaled_to_zero_terminal_snr(alphas_cumprod: Float32[Tensor, " t"]) -> Float32[Tensor, " t"]:
    """Shifts and scales sqrt(alpha-bar) so that its first value stays and its last value is 0.

    Source: Lin et al., Common Diffusion Noise Schedules and Sample Steps are Flawed, arXiv 2305.08891, algorithm 1.
    """
    root = alphas_cumprod.sqrt()
    first, last = root[0], root[-1]
    return ((root - last) * first / (first - last)) ** 2


def signal_to_noise(alphas_cumprod: Float32[Tensor, " t"]) -> Float32[Tensor, " t"]:
    """SNR = alpha^2 / sigma^2, where alpha^2 = alpha-bar and sigma^2 = 1 - alpha-bar.

    Source: Kingma et al., Variational Diffusion Models, arXiv 2107.00630, equation 2.
    """
    return alphas_cumprod / (1 - alphas_cumprod)


def alpha_sigma(
    schedule: Schedule, timesteps: Int64[Tensor, " k"]
) -> tuple[Float32[Tensor, "k 1 1 1"], Float32[Tensor, "k 1 1 1"]]:
    """Standard deviations of signal and noise at the timesteps, in a shape that multiplies images."""
    alphas_cumprod = schedule.alphas_cumprod[timesteps, None, None, None]
    return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()


def add_noise(
    schedule: Schedule,
    latents: Float[Tensor, "k c h w"],
    noise: Float[Tensor, "k c h w"],
    timesteps: Int64[Tensor, " k"],
) -> Float32[Tensor, "k c h w"]:
    """x_t = alpha_t x_0 + sigma_t noise, the model's input. `latents` are multiplied by the VAE's scaling factor.

    Source: Ho et al., Denoising Diffusion Probabilistic Models, arXiv 2006.11239, equation 4.
    """
    alpha, sigma = alpha_sigma(schedule, timesteps)
    return alpha * latents.float() + sigma * noise.float()


def velocity(
    schedule: Schedule,
    latents: Float[Tensor, "k c h w"],
    noise: Float[Tensor, "k c h w"],
    timesteps: Int64[Tensor, " k"],
) -> Float32[Tensor, "k c h w"]:
    """v = alpha_t noise - sigma_t x_0, the target of v-prediction.

    Source: Salimans and Ho, Progressive Distillation for Fast Sampling of Diffusion Models, arXiv 2202.00512,
    section 4.
    """
    alpha, sigma = alpha_sigma(schedule, timesteps)
    return alpha * noise.float() - sigma * latents.float()
