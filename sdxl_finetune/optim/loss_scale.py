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
        """Returns True if the norm of all gradients is finite, and False if the step must be skipped.

        Waits for the device, because the host decides whether the optimizer is called.
        """
        return bool(norm.isfinite())

    def adapt(self, *, accepted: bool) -> None:
        """Changes the scale after a step."""
        self._steps = self._steps + 1 if accepted else 0
        if not accepted:
            self.value = self.value * BACKOFF
        elif self._steps == GROWTH_INTERVAL:
            self.value, self._steps = self.value * GROWTH, 0

    def state_dict(self) -> dict[str, Any]:
        """Returns what a training state keeps."""
        return {"scale": self.value.item(), "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes what `state_dict` returned."""
        self.value, self._steps = torch.full_like(self.value, state["scale"]), state["steps"]
