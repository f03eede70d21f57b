"""The optimizer that a config names.

Names are the reference's, without regard to case; any other class goes by its dotted path, and a bare name is
looked for in torch.optim as there (tests/golden/optimizer.json). Packages that only one optimizer needs are
imported when it is asked for, and named when they are missing.
"""

import difflib
import importlib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from sdxl_finetune.config import OptimizerOptions
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.optim.parameters import Group

CLASSES = {
    "AdamW": "torch.optim.AdamW",
    "Lion": "lion_pytorch.Lion",
    "SGDNesterov": "torch.optim.SGD",
    "Adafactor": "transformers.optimization.Adafactor",
    "AdamW8bit": "bitsandbytes.optim.AdamW8bit",
    "Adam8bit": "bitsandbytes.optim.Adam8bit",
    "AdEMAMix8bit": "bitsandbytes.optim.AdEMAMix8bit",
    "PagedAdEMAMix8bit": "bitsandbytes.optim.PagedAdEMAMix8bit",
    "Lion8bit": "bitsandbytes.optim.Lion8bit",
    "SGDNesterov8bit": "bitsandbytes.optim.SGD8bit",
    "PagedAdamW": "bitsandbytes.optim.PagedAdamW",
    "PagedAdamW8bit": "bitsandbytes.optim.PagedAdamW8bit",
    "PagedAdamW32bit": "bitsandbytes.optim.PagedAdamW32bit",
    "PagedLion8bit": "bitsandbytes.optim.PagedLion8bit",
    "Prodigy": "prodigyopt.Prodigy",
    "DAdaptation": "dadaptation.experimental.DAdaptAdamPreprint",
    "DAdaptAdamPreprint": "dadaptation.experimental.DAdaptAdamPreprint",
    "DAdaptAdaGrad": "dadaptation.DAdaptAdaGrad",
    "DAdaptAdam": "dadaptation.DAdaptAdam",
    "DAdaptAdan": "dadaptation.DAdaptAdan",
    "DAdaptAdanIP": "dadaptation.experimental.DAdaptAdanIP",
    "DAdaptLion": "dadaptation.DAdaptLion",
    "DAdaptSGD": "dadaptation.DAdaptSGD",
    "AdamWScheduleFree": "schedulefree.AdamWScheduleFree",
    "RAdamScheduleFree": "schedulefree.RAdamScheduleFree",
    "SGDScheduleFree": "schedulefree.SGDScheduleFree",
}
PACKAGES = {"lion_pytorch": "lion-pytorch", "pytorch_optimizer": "pytorch-optimizer", "prodigyopt": "prodigyopt"}
ONE_RATE = ("prodigyopt.", "dadaptation.")
"""Optimizers that estimate one learning rate for everything refuse groups of different rates at the first step."""


def optimizer_name(options: OptimizerOptions) -> str:
    """The optimizer asked for: optimizer_type, or the older flags, or AdamW."""
    if options.use_8bit_adam:
        return "AdamW8bit"
    if options.use_lion_optimizer:
        return "Lion"
    return options.optimizer_type or "AdamW"


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class behind `name`. Raises UserError for one that does not exist or is not installed."""
    known = {key.lower(): path for key, path in CLASSES.items()}
    path = known.get(name.lower(), name if "." in name else f"torch.optim.{name}")
    module_name, _, class_name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except ModuleNotFoundError as error:
        package = (error.name or module_name).partition(".")[0]
        remedy = f"needs a package that is not installed: pip install {PACKAGES.get(package, package)}"
        raise UserError(Problem(remedy, key="optimizer_type", value=name)) from None
    except AttributeError:
        near = difflib.get_close_matches(name, [*CLASSES, *torch.optim.__all__], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(Problem(f"no such optimizer{hint}", key="optimizer_type", value=name)) from None
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise UserError(Problem(f"{path} is not a torch optimizer", key="optimizer_type", value=name))
    return found


def build_optimizer(options: OptimizerOptions, groups: Sequence[Group]) -> torch.optim.Optimizer:
    """The optimizer over `groups`, in their order, each with its own learning rate."""
    name = optimizer_name(options)
    cls = optimizer_class(name)
    arguments = dict(options.optimizer_args)
    problems = _argument_problems(name, cls, arguments)
    rates = {group.lr for group in groups}
    if cls.__module__.startswith(tuple(prefix.rstrip(".") for prefix in ONE_RATE)) and len(rates) > 1:
        remedy = f"{name} works with one learning rate for all parts; given are {sorted(rates)}"
        problems.append(Problem(remedy, key="learning_rate"))
    if problems:
        raise UserError(problems)
    if name.lower().startswith("sgdnesterov"):
        # The reference passes nesterov on to torch's SGD alone, and supplies the momentum it needs.
        arguments = {"momentum": 0.9, **({"nesterov": True} if "8" not in name else {}), **arguments}
    relative_step = _relative_step(cls, arguments)
    parameters: list[dict[str, Any]] = [
        {"params": list(group.parameters.values()), "lr": None if relative_step else group.lr} for group in groups
    ]
    default = options.learning_rate or max(rates)  # some refuse 0, which no group has
    try:
        optimizer = cls(parameters, lr=None if relative_step else default, **arguments)  # type: ignore[call-arg]
    except (TypeError, ValueError, AssertionError) as error:
        given = {key: repr(value) for key, value in arguments.items()}
        raise UserError(Problem(f"{name} refuses them: {error}", key="optimizer_args", value=given)) from error
    if hasattr(optimizer, "train"):
        optimizer.train()  # the schedule-free ones refuse to step before it
    return optimizer


def trial_optimizer(options: OptimizerOptions, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The config's optimizer of a few parameters, to see how it works: at the U-Net's rate or, where that is 0, at one
    that moves them. Raises UserError.
    """
    named = {str(number): parameter for number, parameter in enumerate(parameters)}
    return build_optimizer(options, [Group("unet", named, options.learning_rate or 1e-3)])


def _argument_problems(name: str, cls: type, arguments: dict[str, Any]) -> list[Problem]:
    signature = inspect.signature(cls)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values()):
        return []
    accepted = [key for key in signature.parameters if key not in ("params", "lr")]
    return [
        Problem(
            "the learning rate is set by learning_rate, learning_rate_te1 and learning_rate_te2"
            if key == "lr"
            else f"{name} has no such argument; it takes {', '.join(accepted)}",
            key="optimizer_args",
            value=f"{key}={value!r}",
        )
        for key, value in arguments.items()
        if key not in accepted
    ]


def _relative_step(cls: type, arguments: dict[str, Any]) -> bool:
    """Whether Adafactor finds its own step size (arXiv 1804.04235, section 8), as the reference makes it do unless
    told otherwise; it then takes no learning rate. Sets the argument.
    """
    if cls.__name__ != "Adafactor" or not cls.__module__.startswith("transformers"):
        return False
    if arguments.get("warmup_init"):
        arguments["relative_step"] = True
    arguments.setdefault("relative_step", True)
    return bool(arguments["relative_step"])


def set_lr(optimizer: torch.optim.Optimizer, rates: Sequence[float]) -> None:
    """Puts this step's learning rates into the groups; one that finds its own step size keeps None."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], torch.Tensor):  # as torchao's optimizers want it
            group["lr"].fill_(rate)
        elif group["lr"] is not None:
            group["lr"] = rate


def shows_other_weights(optimizer: object) -> bool:
    """Whether an optimizer, or a class of them, keeps weights for use apart from the ones it trains."""
    return hasattr(optimizer, "train") and hasattr(optimizer, "eval")


@contextmanager
def averaged_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within it, the parameters are those to save and to draw previews with: schedule-free optimizers keep them
    apart from the ones they train (arXiv 2405.15682, equation 3); for all others nothing changes. Those that are
    trained wait in host memory, since what their train() makes of eval()'s is the same only but for rounding.
    """
    if shows_other_weights(optimizer):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        trained = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
        optimizer.eval()  # type: ignore[attr-defined]
        try:
            yield
        finally:
            optimizer.train()  # type: ignore[attr-defined]
            for parameter, value in zip(parameters, trained, strict=True):
                parameter.detach().copy_(value)
    else:
        yield
