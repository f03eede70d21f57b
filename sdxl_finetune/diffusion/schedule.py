"""Noise schedules: how much signal and how much noise the model's input has at a timestep.

    x_t = alpha_t x_0 + sigma_t e          (Ho et al., arXiv 2006.11239, equation 4)

Timesteps are 0 to 1000, the number that the U-Net embeds. SDXL's own schedule is a table of 1,000 whole timesteps. The
straight path of a flow has a value at every timestep between.

All tensors are float32, whatever the precision of the network, because half precision changes timesteps and rounds the
noise. A schedule is a value on one device. It takes a tensor of timesteps on the same device, and a step never waits
for the GPU.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float32, Int64, Num
from torch import Tensor

from sdxl_finetune.batch import TIMESTEPS

FIRST_BETA, LAST_BETA = 0.00085, 0.012
"""Variance of the noise that the first and the last timestep add, in SDXL's own schedule."""


@runtime_checkable
class Schedule(Protocol):
    """Signal and noise by timestep."""

    def alpha_sigma(self, timesteps: Num[Tensor, " k"]) -> tuple[Float32[Tensor, " k"], Float32[Tensor, " k"]]:
        """Standard deviations of signal and noise at the timesteps."""
        ...

    def snr(self, timesteps: Num[Tensor, " k"]) -> Float32[Tensor, " k"]:
        """Signal-to-noise ratio alpha^2 / sigma^2 (Kingma et al., arXiv 2107.00630, equation 2).

        It is exactly 0 where the input is pure noise.
        """
        ...

    def to(self, device: torch.device) -> "Schedule": ...


@dataclass(frozen=True, kw_only=True)
class DiscreteSchedule:
    """SDXL's noise schedule at the timesteps 0 (nearly no noise) to 999.

    The values are those of the reference (diffusers' DDPMScheduler with "scaled_linear" betas). One thing differs: the
    SNR is that of the schedule that is trained on, with or without zero terminal SNR. The reference takes the SNR
    before the zero-terminal-SNR fix.
    """

    alphas_cumprod: Float32[Tensor, " timesteps"]
    """Alpha-bar: the share of the signal's variance that is left, in [0, 1). alpha^2 = alpha-bar."""
    snr_table: Float32[Tensor, " timesteps"]

    def alpha_sigma(self, timesteps: Int64[Tensor, " k"]) -> tuple[Float32[Tensor, " k"], Float32[Tensor, " k"]]:
        alphas_cumprod = self.alphas_cumprod[timesteps]
        return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()

    def snr(self, timesteps: Int64[Tensor, " k"]) -> Float32[Tensor, " k"]:
        return self.snr_table[timesteps]

    def to(self, device: torch.device) -> "DiscreteSchedule":
        return DiscreteSchedule(alphas_cumprod=self.alphas_cumprod.to(device), snr_table=self.snr_table.to(device))

    @property
    def ends_in_noise(self) -> bool:
        """True for a schedule with zero terminal SNR."""
        return bool(self.alphas_cumprod[-1] == 0)


@dataclass(frozen=True)
class StraightPath:
    """The straight path from data to noise: alpha = 1 - t and sigma = t, where t = timestep / 1000 in (0, 1].

    Sources: Liu et al., arXiv 2209.03003, equation 1, and Lipman et al., arXiv 2210.02747, equation 20 without
    sigma_min. The direction of time is that of Esser et al., arXiv 2403.03206, equation 13.
    """

    def alpha_sigma(self, timesteps: Num[Tensor, " k"]) -> tuple[Float32[Tensor, " k"], Float32[Tensor, " k"]]:
        t = timesteps.float() / TIMESTEPS
        return 1 - t, t

    def snr(self, timesteps: Num[Tensor, " k"]) -> Float32[Tensor, " k"]:
        alpha, sigma = self.alpha_sigma(timesteps)
        return (alpha / sigma) ** 2

    def to(self, device: torch.device) -> "StraightPath":
        return self


def discrete_schedule(*, zero_terminal_snr: bool) -> DiscreteSchedule:
    """SDXL's noise schedule on the CPU."""
    betas = torch.linspace(FIRST_BETA**0.5, LAST_BETA**0.5, TIMESTEPS, dtype=torch.float32) ** 2
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    if zero_terminal_snr:
        alphas_cumprod = rescaled_to_zero_terminal_snr(alphas_cumprod)
    return DiscreteSchedule(alphas_cumprod=alphas_cumprod, snr_table=alphas_cumprod / (1 - alphas_cumprod))


def rescaled_to_zero_terminal_snr(alphas_cumprod: Float32[Tensor, " t"]) -> Float32[Tensor, " t"]:
    """Shifts and scales sqrt(alpha-bar) so that its first value stays and its last value is 0.

    Source: Lin et al., Common Diffusion Noise Schedules and Sample Steps are Flawed, arXiv 2305.08891, algorithm 1.
    """
    root = alphas_cumprod.sqrt()
    first, last = root[0], root[-1]
    return ((root - last) * first / (first - last)) ** 2
