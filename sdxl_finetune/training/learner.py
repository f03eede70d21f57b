"""The learner: the model, its trained parameters, and everything else that an optimizer step needs.

A run builds one learner and feeds it batches. The memory estimate builds one on tensors without memory.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import nn

from sdxl_finetune.config import Config
from sdxl_finetune.diffusion.objective import Objective, build_objective
from sdxl_finetune.model.sdxl import SDXL
from sdxl_finetune.optim.ema import Ema, build_ema
from sdxl_finetune.optim.lr import Rate
from sdxl_finetune.optim.parameters import TrainedParameters, trained_parameters
from sdxl_finetune.optim.update import Context, Update, build_update
from sdxl_finetune.runtime.processes import Autocast, autocast
from sdxl_finetune.training.learned_weights import LearnedWeights


@dataclass(frozen=True, kw_only=True)
class Learner:
    """Model, optimizer and schedules that `training_steps` uses."""

    config: Config
    accelerator: Accelerator
    sdxl: SDXL
    model: nn.Module
    """`sdxl` in the precision of `mixed_precision`, as accelerate prepared it."""
    vae: AutoencoderKL
    """Encodes batches of images that have no cached latents."""
    objective: Objective
    parameters: TrainedParameters
    update: Update
    """The optimizer, and how its steps reach the parameters."""
    ema: Ema | None
    lr: Rate
    loss_weights: LearnedWeights | None = None
    """Loss weights that are learned; None without `edm2_loss_weighting`, and for the memory estimate."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns a context that computes in the precision of `mixed_precision`."""
        return autocast(self.config, self.accelerator.device)


def build_learner(
    config: Config,
    sdxl: SDXL,
    vae: AutoencoderKL,
    accelerator: Accelerator,
    lr: Rate,
    real_tensors: Context = nullcontext,
) -> Learner:
    """Builds the learner of a model that is on its device. Raises UserError if nothing would be trained.

    The memory estimate passes fake tensors. `real_tensors()` leaves that mode while the optimizer is built.
    """
    parameters = trained_parameters(config, sdxl.parameters_by_part(), sdxl.masters)
    in_precision = Autocast(sdxl, partial(autocast, config, accelerator.device))
    model, update = build_update(config, parameters, in_precision, accelerator, real_tensors)
    objective = build_objective(config.objective, zero_terminal_snr=config.zero_terminal_snr)
    return Learner(
        config=config,
        accelerator=accelerator,
        sdxl=sdxl,
        model=model,
        vae=vae,
        objective=objective.to(accelerator.device),
        parameters=parameters,
        update=update,
        ema=build_ema(parameters, config),
        lr=lr,
    )
