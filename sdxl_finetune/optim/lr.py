"""The learning rate, a pure function of the optimizer step.

Schedules and their names are the reference's (tests/golden/lr.json.gz), which builds transformers'
schedulers. Steps are optimizer steps on however many processes: the reference steps its scheduler once per
process, which divides a warm-up given in steps by their number. Nothing here has state to save: even a class
of torch is replayed from step 0 when a run resumes.
"""

import difflib
import importlib
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from sdxl_finetune.config import Config
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.optim.optimizer import optimizer_name

Rate = Callable[[int, float], float]
"""(optimizer step, counted from 0; a parameter group's base rate) -> its rate in that step."""

ARGUMENTS = {
    "constant": (),
    "constant_with_warmup": (),
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": (),
    "cosine_with_min_lr": ("min_lr",),
    "polynomial": ("lr_end",),
    "inverse_sqrt": (),
    "warmup_stable_decay": ("warmup_type", "decay_type"),
    "piecewise_constant": ("step_rules",),
}
"""The schedules, and what lr_scheduler_args may hold for each."""
WITHOUT_WARMUP = ("constant", "piecewise_constant", "adafactor")
FALLS = ("linear", "cosine", "1-sqrt")
LR_END = 1e-7


def build_lr(config: Config, total_steps: int) -> Rate:
    """The learning rate of a run of `total_steps` optimizer steps.

    Raises UserError for a schedule that does not exist or that the other options contradict. Schedule-free
    optimizers have a constant rate; `adafactor:RATE` gives RATE, what the logs show while Adafactor sizes its
    own steps.
    """
    if optimizer_name(config).lower().endswith("schedulefree"):
        return lambda _step, base: base
    if problems := _problems(config, steps_of(config.lr_warmup_steps, total_steps)):
        raise UserError(problems)
    if config.lr_scheduler_type:
        return Replay(config.lr_scheduler_type, config.lr_scheduler_args, base=config.learning_rate, steps=total_steps)
    if config.lr_scheduler.startswith("adafactor"):
        initial = float(config.lr_scheduler.partition(":")[2])
        return lambda _step, _base: initial
    return lambda step, base: base * lr_factor(config, step, total_steps)


def steps_of(steps: int | float, total: int) -> int:
    """A number of steps as it is; a float is the share of `total`, rounded down."""
    return int(steps * total) if isinstance(steps, float) else steps


def _problems(config: Config, warmup: int) -> list[Problem]:
    name, _, rate = config.lr_scheduler.partition(":")
    chosen = config.lr_scheduler_type or name
    arguments = config.lr_scheduler_args
    problems = []
    if warmup and (config.lr_scheduler_type or name in WITHOUT_WARMUP):
        hint = "; constant_with_warmup has one" if chosen == "constant" else ""
        message = f"{chosen} has no warm-up: set it to 0{hint}"
        problems.append(Problem(message, key="lr_warmup_steps", value=config.lr_warmup_steps))
    if config.lr_scheduler_type:
        return problems
    if name == "adafactor":
        if not optimizer_name(config).lower().endswith("adafactor"):
            message = "this schedule is only for optimizer_type = Adafactor"
            problems.append(Problem(message, key="lr_scheduler", value=config.lr_scheduler))
        if not re.fullmatch(r"\d*\.?\d+(e-?\d+)?", rate):
            message = "give the rate as well, as in adafactor:3e-5"
            problems.append(Problem(message, key="lr_scheduler", value=config.lr_scheduler))
    elif name not in ARGUMENTS or rate:
        near = difflib.get_close_matches(name, ARGUMENTS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(ARGUMENTS)}"
        problems.append(Problem(f"no such schedule; {hint}", key="lr_scheduler", value=config.lr_scheduler))
    elif unknown := sorted(set(arguments) - set(ARGUMENTS[name])):
        takes = f"takes only {', '.join(ARGUMENTS[name])}" if ARGUMENTS[name] else "takes none"
        message = f"{name} {takes}; cycles, power and lowest rate have options of their own, lr_scheduler_..."
        problems.append(Problem(message, key="lr_scheduler_args", value=unknown))
    elif problem := _argument_problem(config, name):
        problems.append(Problem(problem))
    return problems


def _argument_problem(config: Config, name: str) -> str | None:
    arguments = config.lr_scheduler_args
    match name:
        case "warmup_stable_decay":
            if not all(value in FALLS for value in arguments.values()):
                return f"warmup_stable_decay: warmup_type and decay_type are one of {', '.join(FALLS)}"
            return None
        case "piecewise_constant":
            try:
                step_rules(arguments["step_rules"])
            except (KeyError, AttributeError, TypeError, ValueError):
                example = "lr_scheduler_args = [\"step_rules='1:100,0.5:200,0.1'\"]"
                return f"piecewise_constant needs factors, the step each ends at, and a last factor: {example}"
            return None
    if not all(isinstance(value, (int, float)) for value in arguments.values()):
        return f"{name}: the values of lr_scheduler_args are numbers here, not {arguments}"
    if name == "cosine_with_min_lr" and (config.lr_scheduler_min_lr_ratio is None) == ("min_lr" not in arguments):
        return "cosine_with_min_lr: set lr_scheduler_min_lr_ratio, as 0.1 for a tenth, or pass min_lr"
    lowest = arguments.get("lr_end", LR_END) if name == "polynomial" else arguments.get("min_lr")
    if lowest is not None and config.learning_rate <= lowest:
        return f"{name} ends at {lowest}: learning_rate, now {config.learning_rate}, must be higher"
    return None


def lr_factor(config: Config, step: int, total: int) -> float:
    """What the base rate is multiplied with in `step` of `total`. All warm-ups but that of
    warmup_stable_decay are a straight line from 0.
    """
    name, arguments = config.lr_scheduler, config.lr_scheduler_args
    warmup, decay = steps_of(config.lr_warmup_steps, total), steps_of(config.lr_decay_steps, total)
    cycles = config.lr_scheduler_num_cycles
    floor = config.lr_scheduler_min_lr_ratio or 0.0
    if step < warmup and name != "warmup_stable_decay":
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
            return cosine(cycles * progress % 1) if progress < 1 else 0.0
        case "polynomial":
            # Relative to learning_rate whatever a group's own base rate is, as in the reference: beside 3e-5,
            # a group of 1e-6 ends at 3.3e-9.
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
        case _:
            return 1.0


def cosine(progress: float, cycles: float = 0.5, floor: float = 0.0) -> float:
    """`cycles` waves between 1 and `floor`, of which half a wave is one fall: Loshchilov and Hutter, SGDR,
    arXiv 1608.03983, equation 5.
    """
    return floor + (1 - floor) * 0.5 * (1 + math.cos(2 * math.pi * cycles * progress))


def warmup_stable_decay(
    step: int,
    total: int,
    warmup: int,
    decay: int,
    cycles: float,
    floor: float,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
) -> float:
    """Rises from `floor` to 1, stays, falls to `floor` in the last `decay` steps: Hu et al., MiniCPM, arXiv
    2404.06395, section 4.
    """
    if step < warmup:
        return floor + (1 - floor) * _fall(warmup_type, 1 - step / warmup)
    if step < total - decay:
        return 1.0
    if step < total:
        return floor + (1 - floor) * _fall(decay_type, (step - total + decay) / decay, cycles)
    return floor


def _fall(kind: str, progress: float, cycles: float = 0.5) -> float:
    """From 1 at `progress` 0 to 0 at 1; `cycles` are of the cosine."""
    match kind:
        case "linear":
            return 1 - progress
        case "1-sqrt":
            return 1 - math.sqrt(progress)
        case _:
            return cosine(progress, cycles)


def step_rules(text: str) -> list[tuple[float, float]]:
    """`1:100,0.5:200,0.1` as (step it ends at, factor), ordered; the last factor has no end. Raises
    ValueError or TypeError for any other form.
    """
    *timed, last = (rule.split(":") for rule in text.split(","))
    return [*sorted((float(end), float(factor)) for factor, end in timed), (math.inf, float(*last))]


class Replay:
    """A scheduler class of torch as a function of the step: it is stepped on a stand-in optimizer with one
    group of the asked base rate, onwards from the last step asked for, or again from 0. The whole run is
    tried at once, so that nothing fails later.

    Classes that also move momentum or betas, and ReduceLROnPlateau, which wants a metric, are no such
    function and are refused with UserError, like arguments that the class refuses.
    """

    def __init__(self, name: str, arguments: Mapping[str, Any], *, base: float, steps: int) -> None:
        module, _, class_name = name.rpartition(".")
        try:
            found = getattr(importlib.import_module(module or "torch.optim.lr_scheduler"), class_name)
        except (ImportError, AttributeError) as error:
            raise UserError(Problem(f"no such class: {error}", key="lr_scheduler_type", value=name)) from None
        if not (isinstance(found, type) and issubclass(found, LRScheduler)):
            message = "this is not a scheduler of torch.optim.lr_scheduler, nor a class derived from one"
            raise UserError(Problem(message, key="lr_scheduler_type", value=name))
        self._build: Callable[[torch.optim.Optimizer], LRScheduler] = partial(found, **arguments)
        self._running: dict[float, tuple[int, LRScheduler]] = {}
        try:
            self(steps, base)
        except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
            message = f"{name} fails with these arguments: {error}"
            raise UserError(Problem(message, key="lr_scheduler_args", value=dict(arguments))) from error

    def __call__(self, step: int, base: float) -> float:
        reached, scheduler = self._running.get(base, (step + 1, None))
        if scheduler is None or reached > step:
            # Adagrad has neither momentum nor betas, so that a schedule of those is refused and not lost.
            optimizer = torch.optim.Adagrad([torch.zeros(1, requires_grad=True)], lr=base)
            reached, scheduler = 0, self._build(optimizer)
            optimizer.step()  # torch warns when a scheduler steps first
        for _ in range(step - reached):
            scheduler.step()
        self._running[base] = (step, scheduler)
        return float(scheduler.optimizer.param_groups[0]["lr"])
