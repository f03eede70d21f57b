"""SDXL's noise schedule: how much of an image is left at each of its 1,000 timesteps.

Everything is float32 and stays float32, whatever precision the network works in: half precision moves
timesteps and rounds the noise. A `Schedule` is a value; the functions read it at a tensor of timesteps on its
own device, so that a step never waits for the GPU. Its numbers are those of the reference (diffusers'
DDPMScheduler with "scaled_linear" betas), except that the SNR follows the schedule that is trained on.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from sdxl_finetune.batch import TIMESTEPS

FIRST_BETA, LAST_BETA = 0.00085, 0.012


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The noise schedule on one device, by timestep 0 (nearly no noise) to 999."""

    alphas_cumprod: Float32[Tensor, " timesteps"]
    """The share of the signal's variance that is left: alpha-bar, in [0, 1)."""
    snr: Float32[Tensor, " timesteps"]
    """Signal-to-noise ratio; with zero terminal SNR exactly 0 at timestep 999."""

    def to(self, device: torch.device) -> "Schedule":
        return Schedule(alphas_cumprod=self.alphas_cumprod.to(device), snr=self.snr.to(device))


def build_schedule(*, zero_terminal_snr: bool) -> Schedule:
    """The schedule to train on, on the CPU.

    The SNR that the loss weights read is taken after the zero-terminal-SNR fix; the reference takes it
    before.
    """
    betas = torch.linspace(FIRST_BETA**0.5, LAST_BETA**0.5, TIMESTEPS, dtype=torch.float32) ** 2
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    if zero_terminal_snr:
        alphas_cumprod = rescaled_to_zero_terminal_snr(alphas_cumprod)
    return Schedule(alphas_cumprod=alphas_cumprod, snr=signal_to_noise(alphas_cumprod))


def rescaled_to_zero_terminal_snr(alphas_cumprod: Float32[Tensor, " t"]) -> Float32[Tensor, " t"]:
    """Shifts and stretches sqrt(alpha-bar) so that it keeps its first value and ends at 0: Lin et al., Common
    Diffusion Noise Schedules and Sample Steps are Flawed, arXiv 2305.08891, algorithm 1.
    """
    root = alphas_cumprod.sqrt()
    first, last = root[0], root[-1]
    return ((root - last) * first / (first - last)) ** 2


def signal_to_noise(alphas_cumprod: Float32[Tensor, " t"]) -> Float32[Tensor, " t"]:
    """SNR = alpha^2 / sigma^2 with alpha^2 = alpha-bar, sigma^2 = 1 - alpha-bar: Kingma et al., Variational
    Diffusion Models, arXiv 2107.00630, equation 2.
    """
    return alphas_cumprod / (1 - alphas_cumprod)


def alpha_sigma(
    schedule: Schedule, timesteps: Int64[Tensor, " k"]
) -> tuple[Float32[Tensor, "k 1 1 1"], Float32[Tensor, "k 1 1 1"]]:
    """Standard deviations of signal and noise at the timesteps, ready to multiply images with."""
    alphas_cumprod = schedule.alphas_cumprod[timesteps, None, None, None]
    return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()


def add_noise(
    schedule: Schedule,
    latents: Float[Tensor, "k c h w"],
    noise: Float[Tensor, "k c h w"],
    timesteps: Int64[Tensor, " k"],
) -> Float32[Tensor, "k c h w"]:
    """x_t = alpha_t x_0 + sigma_t noise: Ho et al., Denoising Diffusion Probabilistic Models, arXiv
    2006.11239, equation 4. `latents` are scaled, as the U-Net sees them.
    """
    alpha, sigma = alpha_sigma(schedule, timesteps)
    return alpha * latents.float() + sigma * noise.float()


def velocity(
    schedule: Schedule,
    latents: Float[Tensor, "k c h w"],
    noise: Float[Tensor, "k c h w"],
    timesteps: Int64[Tensor, " k"],
) -> Float32[Tensor, "k c h w"]:
    """v = alpha_t noise - sigma_t x_0, the target of v-prediction: Salimans and Ho, Progressive Distillation
    for Fast Sampling of Diffusion Models, arXiv 2202.00512, section 4.
    """
    alpha, sigma = alpha_sigma(schedule, timesteps)
    return alpha * noise.float() - sigma * latents.float()
