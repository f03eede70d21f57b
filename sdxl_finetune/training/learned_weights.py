"""Learned loss weights in a run: the network of `diffusion.learned_weights`, its optimizer, and its training state.

The network is float32 on every rank and is no part of the model. It has its own backward pass, apart from the model's,
which needs no loss scale and works with fused_backward_pass. Its gradients are summed over micro-batches and averaged
over ranks, so that all ranks hold the same network. Nothing of it is in a saved checkpoint.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from sdxl_finetune.batch import TIMESTEPS, Batch
from sdxl_finetune.config import Config, LearnedWeightOptions, OptimizerOptions
from sdxl_finetune.diffusion.learned_weights import LogLoss, noise_level, uncertainty_loss
from sdxl_finetune.diffusion.objective import Objective
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.optim.meter import RANGES
from sdxl_finetune.optim.optimizer import build_optimizer, set_lr
from sdxl_finetune.optim.parameters import Group
from sdxl_finetune.training.optimizer_state import optimizer_values, restore_values

NAME = "edm2"
"""Name of the learning rate in the log, as in forks of the reference."""
SMALLEST_LOSS = 1e-4
"""Lower losses of images count as this one for the network, which bounds the weights by 10,000. A loss is 0 under a
black mask, and a contrastive loss may be negative. No weight is the inverse of either."""
POINTS = 101
"""Timesteps at which the curve is drawn."""


class LearnedWeights:
    """Weights the losses of micro-batches, and learns from them at the end of each optimizer step."""

    def __init__(self, config: Config, objective: Objective, device: torch.device, steps: int) -> None:
        """`steps` is the number of optimizer steps of the whole run. Raises UserError as `build_optimizer` does."""
        self._options, self._steps, self._objective = config, steps, objective
        self.network = LogLoss(config.edm2_loss_weighting_num_channels).to(device)
        self._groups = [_group(config, dict(self.network.named_parameters()))]
        self.optimizer = _build_optimizer(config, self._groups)
        self._weighted = torch.zeros((), device=device)
        self._curve_at = _timesteps(config, objective).to(device)
        width = TIMESTEPS // RANGES
        middles = torch.arange(RANGES, device=device) * width + width // 2
        self._names = [f"loss_weight/t{middle:03d}" for middle in middles.tolist()]
        self._middles = middles

    def weighted(self, losses: Float[Tensor, " k"], batch: Batch) -> Float[Tensor, ""]:
        """Returns the weighted loss of a micro-batch, to call backward of. Adds the gradients of the network."""
        log_losses = self.network(noise_level(self._objective, batch.timesteps))
        uncertainty_loss(losses.detach().clamp(min=SMALLEST_LOSS), log_losses, batch.weights).backward()
        loss = (losses * (-log_losses.detach()).exp() * batch.weights).sum()
        self._weighted = self._weighted + loss.detach()
        return loss

    def rate(self, step: int) -> float:
        """The learning rate of the optimizer step `step`, from 0."""
        return self._options.edm2_loss_weighting_optimizer_lr * rate_factor(self._options, step, self._steps)

    def step(self, step: int, accelerator: Accelerator) -> dict[str, Tensor]:
        """Makes the optimizer step `step`, from 0. Returns the step's weighted loss and some weights, by tag names."""
        weight = self.network.weight
        assert weight.grad is not None
        # One message between ranks holds the gradients and the loss.
        mean = accelerator.reduce(torch.cat([weight.grad, self._weighted[None]]), "mean")
        weight.grad = mean[:-1].clone()
        if self._options.non_finite_steps == "skip" and not mean.isfinite().all():
            weight.grad = None  # torch's optimizers leave out a parameter without a gradient
        elif self._options.edm2_loss_weighting_max_grad_norm:
            clip_grad_norm_([weight], self._options.edm2_loss_weighting_max_grad_norm)
        set_lr(self.optimizer, [self.rate(step)])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._weighted = torch.zeros_like(self._weighted)
        return {"loss/weighted": mean[-1], **dict(zip(self._names, self._weights(self._middles).unbind(), strict=True))}

    def curve(self) -> dict[float, float]:
        """The weight by timestep, at POINTS timesteps of those that are trained. Waits for the device."""
        return dict(zip(self._curve_at.tolist(), self._weights(self._curve_at).tolist(), strict=True))

    @torch.no_grad()
    def _weights(self, timesteps: Tensor) -> Tensor:
        return (-self.network(noise_level(self._objective, timesteps))).exp()

    def state(self) -> dict[str, Any]:
        """The network and its optimizer, as a training state holds them. The tensors are not copies."""
        return {"network": self.network.state_dict(), **optimizer_values(self.optimizer, self._groups)}

    def load(self, saved: Mapping[str, Any], *, changed: frozenset[str]) -> None:
        """Takes what `state` returned, bit for bit. Arguments in `changed` keep what the config says now."""
        self.network.load_state_dict(saved["network"])
        restore_values(saved, self.optimizer, self._groups, changed=changed)


def build_learned_weights(
    config: Config, objective: Objective, device: torch.device, steps: int
) -> LearnedWeights | None:
    """Returns the learned weights of a run of `steps` optimizer steps, or None if the options ask for none."""
    return LearnedWeights(config, objective, device, steps) if config.edm2_loss_weighting else None


def rate_factor(options: LearnedWeightOptions, step: int, total: int) -> float:
    """The factor of the learning rate in `step`, from 0, of `total` steps.

    It rises from 0 in the warm-up, stays at 1, and falls as 1 / sqrt((step / end)^scaling), where `end` is the step at
    which the fall begins. This is the schedule of forks of the reference. EDM2 has the same fall with scaling 1
    (arXiv 2312.02696, section on the learning rate).
    """
    if not options.edm2_loss_weighting_lr_scheduler:
        return 1.0
    warmup = options.edm2_loss_weighting_lr_scheduler_warmup_percent * total
    if step <= warmup:
        return step / max(1, warmup)
    end = max(1, warmup + options.edm2_loss_weighting_lr_scheduler_constant_percent * total)
    return 1 / math.sqrt(max(step / end, 1) ** options.edm2_loss_weighting_lr_scheduler_decay_scaling)


def check_learned_weights(config: Config, device: torch.device) -> None:
    """Makes one step of the optimizer of learned weights. Raises UserError if the optimizer cannot make it."""
    if not config.edm2_loss_weighting:
        return
    parameter = torch.nn.Parameter(torch.zeros(config.edm2_loss_weighting_num_channels, device=device))
    optimizer = _build_optimizer(config, [_group(config, {"weight": parameter})])
    parameter.grad = torch.ones_like(parameter)
    try:
        optimizer.step()
    except Exception as error:  # an optimizer may want matrices, or a closure
        message = f"cannot train the network of learned weights ({error}): choose another, as AdamW"
        name = config.edm2_loss_weighting_optimizer
        raise UserError(Problem(message, key="edm2_loss_weighting_optimizer", value=name)) from error


def _group(options: LearnedWeightOptions, parameters: dict[str, torch.nn.Parameter]) -> Group:
    return Group(NAME, parameters, options.edm2_loss_weighting_optimizer_lr)


def _build_optimizer(options: LearnedWeightOptions, groups: list[Group]) -> torch.optim.Optimizer:
    """Builds the optimizer. Raises UserError that names the options of learned weights."""
    asked = OptimizerOptions(
        optimizer_type=options.edm2_loss_weighting_optimizer,
        optimizer_args=options.edm2_loss_weighting_optimizer_args,
        learning_rate=options.edm2_loss_weighting_optimizer_lr,
    )
    names = {"optimizer_type": "edm2_loss_weighting_optimizer", "optimizer_args": "edm2_loss_weighting_optimizer_args"}
    try:
        return build_optimizer(asked, groups)
    except UserError as error:
        raise UserError(
            [Problem(one.message, names.get(one.key or "", one.key), one.value) for one in error.problems]
        ) from error


def _timesteps(config: Config, objective: Objective) -> Tensor:
    """POINTS timesteps of those that are trained: whole numbers, but those of a flow in float32 and above 0."""
    low, high = config.timestep_range
    if objective.kind == "flow":
        return torch.linspace(max(low, 1), high, POINTS)
    return torch.linspace(low, high - 1, POINTS).round().long()
