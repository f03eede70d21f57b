"""The loss scale of float16 training: a factor on the loss that keeps small gradients from vanishing.

Source: Micikevicius et al., Mixed Precision Training, arXiv 1710.03740, section 3.2. The constants are those of torch's
GradScaler, which the reference uses. GradScaler refuses gradients in float16. Here the update divides gradients by the
scale in float32, whatever their dtype.

All ranks see the same sums of gradients, so they skip the same steps and have the same scale.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sdxl_finetune.config import HardwareOptions, NumbersOptions

START = 2.0**16
"""Scale of the first step."""
GROWTH, BACKOFF = 2.0, 0.5
"""Factors of the scale after GROWTH_INTERVAL steps without overflow, and after an overflow. They are powers of two, so
that scaling does not round."""
GROWTH_INTERVAL = 2000
"""Steps without overflow after which the scale grows."""


class LossScale:
    """The factor on the loss. It falls when gradients overflow, and grows after many steps in which they do not."""

    def __init__(self, device: torch.device) -> None:
        self.value = torch.full((), START, device=device)
        self._steps = 0
        """Steps since the scale changed."""

    def scaled(self, loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Returns the loss to call backward of."""
        return loss * self.value

    def accepts(self, norm: Float[Tensor, ""]) -> bool:
        """Returns True if the norm of all gradients is finite, False if the step must be skipped; adapts the scale.

        Waits for the device, because the host decides whether the optimizer is called.
        """
        accepted = bool(norm.isfinite())
        self._steps = self._steps + 1 if accepted else 0
        if not accepted:
            self.value = self.value * BACKOFF
        elif self._steps == GROWTH_INTERVAL:
            self.value, self._steps = self.value * GROWTH, 0
        return accepted

    def state_dict(self) -> dict[str, Any]:
        """Returns what a training state keeps."""
        return {"scale": self.value.item(), "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes what `state_dict` returned."""
        self.value, self._steps = torch.full_like(self.value, state["scale"]), state["steps"]


def build_loss_scale(options: HardwareOptions, device: torch.device) -> LossScale | None:
    """Returns the loss scale, or None if training is not in float16."""
    return LossScale(device) if options.mixed_precision == "fp16" else None


def accepts_step(norm: Float[Tensor, ""], scale: LossScale | None, options: NumbersOptions) -> bool:
    """Returns False if the step with gradients of this norm must be skipped; adapts the loss scale.

    Without a loss scale only `non_finite_steps = "skip"` skips steps. The host then waits for the device.
    """
    if scale is not None:
        return scale.accepts(norm)
    return options.non_finite_steps == "stop" or bool(norm.isfinite())


def gradient_factor(norm: Tensor, max_norm: float, scale: LossScale | None = None) -> Tensor | None:
    """Returns the factor on gradients that divides them by the scale and clips `norm`, the norm after that division.

    It clips as torch's clip_grad_norm_ does, unless `max_norm` is 0. Returns None if the factor would be 1.
    """
    clip = (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm else None
    if scale is None:
        return clip
    return scale.value.reciprocal() if clip is None else clip / scale.value
