"""The learner: the model, its trained parameters, and everything else that an optimizer step needs.

A run builds one learner and feeds it batches. The memory estimate builds one on tensors without memory.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import nn

from sdxl_finetune.config import Config
from sdxl_finetune.diffusion.schedule import Schedule, build_schedule
from sdxl_finetune.model.sdxl import SDXL, named_parts
from sdxl_finetune.optim.ema import MovingAverage, build_average
from sdxl_finetune.optim.lr import Rate
from sdxl_finetune.optim.optimizer import build_optimizer
from sdxl_finetune.optim.parameters import Group, build_groups
from sdxl_finetune.optim.update import ExactUpdate, PlainUpdate, Update, is_exact


@dataclass(frozen=True, kw_only=True)
class Learner:
    """Exactly what a training step needs."""

    config: Config
    accelerator: Accelerator
    sdxl: SDXL
    model: nn.Module
    """`sdxl` as accelerate prepared it: its forward runs in the precision of `mixed_precision`."""
    vae: AutoencoderKL
    """Encodes batches of images that have no cached latents."""
    noise_schedule: Schedule
    groups: list[Group]
    update: Update
    """The optimizer, and how its steps reach the parameters."""
    ema: MovingAverage | None
    lr: Rate


def build_learner(
    config: Config,
    sdxl: SDXL,
    vae: AutoencoderKL,
    accelerator: Accelerator,
    lr: Rate,
    real_tensors: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Learner:
    """Builds the learner of a model that is on its device. Raises UserError if nothing would be trained.

    Within `real_tensors()` tensors are real, where those of the model are not. The optimizer is built in it.
    """
    groups = build_groups(config, named_parts(sdxl))
    model: nn.Module
    update: Update
    if is_exact(config):
        update = ExactUpdate(config, groups, sdxl.masters, accelerator, real_tensors)
        # In evaluation mode accelerate does not wrap the model in DDP, whose buckets add up gradients in the precision
        # of the weights. ExactUpdate adds them up in float32.
        model = accelerator.prepare_model(sdxl, evaluation_mode=True)
    else:
        with real_tensors():
            optimizer = build_optimizer(config, groups)
        model, prepared = accelerator.prepare(sdxl, optimizer)
        update = PlainUpdate(accelerator, model, prepared, groups)
    noise_schedule = build_schedule(zero_terminal_snr=config.zero_terminal_snr).to(accelerator.device)
    return Learner(
        config=config,
        accelerator=accelerator,
        sdxl=sdxl,
        model=model,
        vae=vae,
        noise_schedule=noise_schedule,
        groups=groups,
        update=update,
        ema=build_average(groups, sdxl.masters, config),
        lr=lr,
    )
