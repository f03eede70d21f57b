"""The learning rate as a pure function of the optimizer step.

Schedules and their names are the reference's (tests/golden/lr.json.gz), which builds transformers' schedulers. A step
is an optimizer step, whatever the number of processes. The reference steps its scheduler once per process, which
divides a warm-up given in steps by their number. Nothing here has state to save: even a scheduler class of torch is
replayed from step 0 when a run resumes.
"""

import importlib
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, cast

import torch
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import assert_never

from sdxl_finetune.config import Config
from sdxl_finetune.config.fields import ScheduleName
from sdxl_finetune.config.rules import LR_END, step_rules
from sdxl_finetune.errors import Problem, UserError

Shape = Literal["linear", "cosine", "1-sqrt"]
"""Shape of a rise or fall of warmup_stable_decay."""
Rate = Callable[[int, float], float]
"""(optimizer step, counted from 0; base rate of a parameter group) -> the group's learning rate in that step."""


def build_lr(config: Config, total_steps: int) -> Rate:
    """Builds the learning rate of a run of `total_steps` optimizer steps.

    The options have passed `config.rules.schedule_problems`. Raises UserError if a class of `lr_scheduler_type` does
    not exist or does not work. A schedule-free optimizer has a constant rate. An Adafactor with relative steps ignores
    base rates and schedules; its rate is that of `relative_step`.
    """
    if config.is_schedule_free:
        return lambda _step, base: base
    if config.is_relative_step:
        warmup_init = bool(config.optimizer_args.get("warmup_init"))
        return lambda step, _base: relative_step(step + 1, warmup_init=warmup_init)
    if config.lr_scheduler_type:
        return Replay(config.lr_scheduler_type, config.lr_scheduler_args, base=config.learning_rate, steps=total_steps)
    if config.lr_scheduler.startswith("adafactor"):
        initial = float(config.lr_scheduler.partition(":")[2])
        return lambda _step, _base: initial
    return lambda step, base: base * lr_factor(config, step, total_steps)


def steps_of(steps: int | float, total: int) -> int:
    """Returns a number of steps. A float is a share of `total`, rounded down as in the reference."""
    return int(steps * total) if isinstance(steps, float) else steps


def relative_step(steps: int, *, warmup_init: bool) -> float:
    """Returns the relative step size of Adafactor's step number `steps`, from 1.

    It is the learning rate, or with `scale_parameter` the size of an update as a share of the tensor's own size.
    Source: Shazeer and Stern, arXiv 1804.04235, sections 8 and 9; the limits are those of transformers' Adafactor.
    """
    return min(1e-6 * steps if warmup_init else 1e-2, 1 / math.sqrt(steps))


def used_rates(optimizer: torch.optim.Optimizer, rates: Mapping[str, float]) -> dict[str, float]:
    """Returns the rates that the optimizer used in its last step, given those of the schedule by group.

    Prodigy and D-Adaptation multiply the rate by their estimate d. The product has the reference's name, `d*lr/unet`
    for the group unet. Adafactor may have made fewer steps than the run, after a resume from a checkpoint.
    """
    used = dict(rates)
    for name, group in zip(rates, optimizer.param_groups, strict=True):
        if {"d", "k"} <= group.keys():
            used[f"d*lr/{name}"] = float(group["d"] * group["lr"])
        if group.get("relative_step"):
            states = (optimizer.state[parameter] for parameter in group["params"] if parameter in optimizer.state)
            if state := next(states, None):
                used[name] = relative_step(state["step"], warmup_init=group["warmup_init"])
    return used


def lr_factor(config: Config, step: int, total: int) -> float:
    """Returns the factor of the base rate in `step` of `total` optimizer steps.

    The warm-up is a straight line from 0. constant and piecewise_constant have none, warmup_stable_decay has its own.
    """
    name, arguments = cast(ScheduleName, config.lr_scheduler), config.lr_scheduler_args
    warmup, decay = steps_of(config.lr_warmup_steps, total), steps_of(config.lr_decay_steps, total)
    cycles = config.lr_scheduler_num_cycles
    floor = config.lr_scheduler_min_lr_ratio or 0.0
    if step < warmup and name not in ("constant", "piecewise_constant", "warmup_stable_decay"):
        return step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    match name:
        case "linear":
            return max(0.0, 1 - progress)
        case "cosine":
            return cosine(progress, arguments.get("num_cycles", 0.5))
        case "cosine_with_min_lr":
            if "min_lr" in arguments:
                floor = arguments["min_lr"] / config.learning_rate
            return cosine(progress, cycles / 2, floor)
        case "cosine_with_restarts":
            if progress >= 1:
                return floor
            cycle, progress_in_cycle = divmod(cycles * progress, 1)
            highest = max(floor, config.lr_scheduler_cycle_decay**cycle)
            return floor + (highest - floor) * cosine(progress_in_cycle)
        case "polynomial":
            # The end is a share of learning_rate, also for a group with another base rate, as in the reference.
            # With learning_rate 3e-5, a group of 1e-6 ends at 3.3e-9.
            end = arguments.get("lr_end", LR_END) / config.learning_rate
            return end + (1 - end) * max(0.0, 1 - progress) ** config.lr_scheduler_power
        case "inverse_sqrt":
            # Vaswani et al., Attention Is All You Need, arXiv 1706.03762, equation 3.
            timescale = config.lr_scheduler_timescale or warmup or 10_000
            return math.sqrt(timescale / (timescale + step - warmup))
        case "piecewise_constant":
            return next(factor for end, factor in step_rules(arguments["step_rules"]) if step < end)
        case "warmup_stable_decay":
            return warmup_stable_decay(step, total, warmup, decay, cycles / 2, floor, **arguments)
        case "constant" | "constant_with_warmup":
            return 1.0
        case _:
            assert_never(name)


def cosine(progress: float, cycles: float = 0.5, floor: float = 0.0) -> float:
    """Returns the value at `progress`, 0 to 1, of `cycles` cosine waves that start at 1 and fall to `floor`.

    Half a cycle is one fall. Source: Loshchilov and Hutter, SGDR, arXiv 1608.03983, equation 5.
    """
    return floor + (1 - floor) * 0.5 * (1 + math.cos(2 * math.pi * cycles * progress))


def warmup_stable_decay(
    step: int,
    total: int,
    warmup: int,
    decay: int,
    cycles: float,
    floor: float,
    warmup_type: Shape = "linear",
    decay_type: Shape = "cosine",
) -> float:
    """Rises from `floor` to 1 in `warmup` steps, stays at 1, and falls to `floor` in the last `decay` steps.

    Source: Hu et al., MiniCPM, arXiv 2404.06395, section 4.
    """
    if step < warmup:
        return floor + (1 - floor) * _fall(warmup_type, 1 - step / warmup)
    if step < total - decay:
        return 1.0
    if step < total:
        return floor + (1 - floor) * _fall(decay_type, (step - total + decay) / decay, cycles)
    return floor


def _fall(kind: Shape, progress: float, cycles: float = 0.5) -> float:
    """Falls from 1 at `progress` 0 to 0 at `progress` 1. Only the cosine uses `cycles`."""
    match kind:
        case "linear":
            return 1 - progress
        case "1-sqrt":
            return 1 - math.sqrt(progress)
        case "cosine":
            return cosine(progress, cycles)
        case _:
            assert_never(kind)


class Replay:
    """Turns a scheduler class of torch into a function of the step.

    A stand-in optimizer with one group of the asked base rate is stepped onwards from the last asked step, or again
    from 0. The constructor tries the whole run, so that nothing fails later.

    Classes that also change momentum or betas are no function of the step alone, and ReduceLROnPlateau needs a metric.
    Such a class, and arguments that the class refuses, raise UserError.
    """

    def __init__(self, name: str, arguments: Mapping[str, Any], *, base: float, steps: int) -> None:
        module, _, class_name = name.rpartition(".")
        remedy = "name a class of torch.optim.lr_scheduler, or the path of a class derived from its LRScheduler"
        try:
            scheduler_class = getattr(importlib.import_module(module or "torch.optim.lr_scheduler"), class_name)
        except (ImportError, AttributeError) as error:
            raise UserError(
                Problem(f"no such class ({error}): {remedy}", key="lr_scheduler_type", value=name)
            ) from None
        if not (isinstance(scheduler_class, type) and issubclass(scheduler_class, LRScheduler)):
            raise UserError(Problem(f"not a scheduler: {remedy}", key="lr_scheduler_type", value=name))
        self._build: Callable[[torch.optim.Optimizer], LRScheduler] = partial(scheduler_class, **arguments)
        self._running: dict[float, tuple[int, LRScheduler]] = {}
        try:
            self(steps, base)
        except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
            message = f"{name} fails with these arguments: {error}. Change lr_scheduler_args, or choose another class"
            raise UserError(Problem(message, key="lr_scheduler_args", value=dict(arguments))) from error

    def __call__(self, step: int, base: float) -> float:
        reached, scheduler = self._running.get(base, (step + 1, None))
        if scheduler is None or reached > step:
            # Adagrad has neither momentum nor betas, so a class that would change them fails instead of being ignored.
            optimizer = torch.optim.Adagrad([torch.zeros(1, requires_grad=True)], lr=base)
            reached, scheduler = 0, self._build(optimizer)
            optimizer.step()  # torch warns when a scheduler steps first
        for _ in range(step - reached):
            scheduler.step()
        self._running[base] = (step, scheduler)
        return float(scheduler.optimizer.param_groups[0]["lr"])
