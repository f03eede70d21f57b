"""The objective of training. The table OBJECTIVES has all that differs between the three objectives.

    objective   target                   schedule (alpha, sigma)     sources
    noise       e                        SDXL's own                  Ho et al., arXiv 2006.11239, equation 14
    velocity    alpha_t e - sigma_t x_0  SDXL's own                  Salimans and Ho, arXiv 2202.00512, section 4
    flow        e - x_0                  1 - t, t                    Liu et al., arXiv 2209.03003, equation 1; Lipman et
                                                                     al., arXiv 2210.02747, equation 23; Esser et al.,
                                                                     arXiv 2403.03206, equation 13

The model's input is x_t = alpha_t x_0 + sigma_t e for all of them, and the SNR that loss weights read is that of its
schedule. x_0 are latents, scaled as the U-Net sees them, and e is unit noise.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float32, Num
from torch import Tensor

from sdxl_finetune.config.training_options import ObjectiveKind
from sdxl_finetune.diffusion.schedule import DiscreteSchedule, Schedule, StraightPath, discrete_schedule


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The definition of an objective, apart from its schedule. `alpha` and `sigma` are factors of signal and noise."""

    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """The target of (latents, noise, alpha, sigma)."""
    latents: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """The x_0 that follows from (noisy latents, prediction, alpha, sigma)."""
    error_ratio: Callable[[Tensor], Tensor]
    """Squared error of the prediction divided by the squared error of the x_0 that follows from it, by the SNR."""
    prediction_type: str
    """Name in diffusers' schedulers."""


OBJECTIVES: Mapping[ObjectiveKind, Rules] = {
    "noise": Rules(
        target=lambda latents, noise, alpha, sigma: noise,
        latents=lambda noisy, prediction, alpha, sigma: (noisy - sigma * prediction) / alpha,
        error_ratio=lambda snr: snr,
        prediction_type="epsilon",
    ),
    "velocity": Rules(
        target=lambda latents, noise, alpha, sigma: alpha * noise - sigma * latents,
        latents=lambda noisy, prediction, alpha, sigma: alpha * noisy - sigma * prediction,
        error_ratio=lambda snr: snr + 1,
        prediction_type="v_prediction",
    ),
    "flow": Rules(
        target=lambda latents, noise, alpha, sigma: noise - latents,
        latents=lambda noisy, prediction, alpha, sigma: noisy - sigma * prediction,
        error_ratio=lambda snr: (1 + snr.sqrt()) ** 2,
        prediction_type="flow_prediction",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """An objective on its schedule, as training, validation, previews and tag reports use it."""

    kind: ObjectiveKind
    schedule: Schedule

    @property
    def rules(self) -> Rules:
        return OBJECTIVES[self.kind]

    @property
    def ends_in_noise(self) -> bool:
        """True if the last timestep is pure noise: for a flow, and with zero terminal SNR."""
        return not isinstance(self.schedule, DiscreteSchedule) or self.schedule.ends_in_noise

    def to(self, device: torch.device) -> "Objective":
        return replace(self, schedule=self.schedule.to(device))

    def noisy(
        self, latents: Float[Tensor, "k c h w"], noise: Float[Tensor, "k c h w"], timesteps: Num[Tensor, " k"]
    ) -> Float32[Tensor, "k c h w"]:
        """x_t = alpha_t x_0 + sigma_t e, the model's input."""
        alpha, sigma = self._factors(timesteps)
        return alpha * latents.float() + sigma * noise.float()

    def target(
        self, latents: Float[Tensor, "k c h w"], noise: Float[Tensor, "k c h w"], timesteps: Num[Tensor, " k"]
    ) -> Float32[Tensor, "k c h w"]:
        """The target of the model's prediction."""
        return self.rules.target(latents.float(), noise.float(), *self._factors(timesteps))

    def latents(
        self, noisy: Float[Tensor, "k c h w"], prediction: Float[Tensor, "k c h w"], timesteps: Num[Tensor, " k"]
    ) -> Float32[Tensor, "k c h w"]:
        """The x_0 that follows from a prediction. Not finite for a noise prediction of pure noise."""
        return self.rules.latents(noisy.float(), prediction.float(), *self._factors(timesteps))

    def _factors(self, timesteps: Tensor) -> tuple[Float32[Tensor, "k 1 1 1"], Float32[Tensor, "k 1 1 1"]]:
        alpha, sigma = self.schedule.alpha_sigma(timesteps)
        return alpha[:, None, None, None], sigma[:, None, None, None]


def build_objective(kind: ObjectiveKind, *, zero_terminal_snr: bool = False) -> Objective:
    """The objective on the CPU. `zero_terminal_snr` changes SDXL's own schedule; a flow always ends in pure noise."""
    schedule = StraightPath() if kind == "flow" else discrete_schedule(zero_terminal_snr=zero_terminal_snr)
    return Objective(kind=kind, schedule=schedule)
