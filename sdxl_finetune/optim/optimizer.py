"""Builds the optimizer that the options name.

Names are the reference's, in any case of letters (tests/golden/optimizer.json). A name without dots that is none of
them is a class of torch.optim, as in the reference. Any other class is named by its dotted path. A package that only
one optimizer needs is imported when the optimizer is built. A missing package is named in the error.
"""

import difflib
import importlib
import inspect
import sys
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
PACKAGES = {
    "lion_pytorch": "lion-pytorch",
    "pytorch_optimizer": "pytorch-optimizer",
    "prodigyplus": "prodigy-plus-schedule-free",
}
"""Packages whose name differs from that of their module."""
ONE_RATE = ("prodigyopt.", "dadaptation.")
"""Modules of optimizers that estimate one learning rate. They fail at the first step if groups have different rates."""


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """Returns the class of an optimizer. Raises UserError if the class does not exist or its package is missing."""
    known = {key.lower(): path for key, path in CLASSES.items()}
    path = known.get(name.lower(), name if "." in name else f"torch.optim.{name}")
    module_name, _, class_name = path.rpartition(".")
    try:
        optimizer = getattr(importlib.import_module(module_name), class_name)
    except ModuleNotFoundError as error:
        package = (error.name or module_name).partition(".")[0]
        remedy = f"needs a package that is not installed: pip install {PACKAGES.get(package, package)}"
        raise UserError(Problem(remedy, key="optimizer_type", value=name)) from None
    except AttributeError:
        names = {known.lower(): known for known in [*torch.optim.__all__, *CLASSES]}
        begun = sorted((known for known in names if known.startswith(name.lower())), key=len)
        near = begun or difflib.get_close_matches(name.lower(), names, n=1)
        hint = f"did you mean {names[near[0]]}?" if near else "name a class of torch.optim, or the path of a class"
        raise UserError(Problem(f"no such optimizer: {hint}", key="optimizer_type", value=name)) from None
    if not (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)):
        message = f"{path} is not a torch optimizer: name a class derived from torch.optim.Optimizer"
        raise UserError(Problem(message, key="optimizer_type", value=name))
    return optimizer


def build_optimizer(options: OptimizerOptions, groups: Sequence[Group]) -> torch.optim.Optimizer:
    """Builds the optimizer of the groups, in their order, each with its own learning rate.

    Raises UserError if the optimizer does not exist, is not installed, or refuses its arguments or learning rates.
    """
    name = options.optimizer_name
    cls = optimizer_class(name)
    arguments = dict(options.optimizer_args)
    problems = _argument_problems(name, cls, arguments)
    rates = {group.lr for group in groups}
    if cls.__module__.startswith(tuple(prefix.rstrip(".") for prefix in ONE_RATE)) and len(rates) > 1:
        remedy = "set learning_rate_te1 and learning_rate_te2 to the same"
        message = f"{name} needs one learning rate for all parts, but there are {sorted(rates)}: {remedy}"
        problems.append(Problem(message, key="learning_rate"))
    if problems:
        raise UserError(problems)
    if name.lower().startswith("sgdnesterov"):
        # As in the reference: Nesterov's method needs a momentum, and the 8-bit SGD is not told to use the method.
        arguments = {"momentum": 0.9, **({"nesterov": True} if "8" not in name else {}), **arguments}
    relative_step = _relative_step(cls, arguments)
    parameters: list[dict[str, Any]] = [
        {"params": list(group.parameters.values()), "lr": None if relative_step else group.lr} for group in groups
    ]
    default = options.learning_rate or max(rates)  # a rate of 0, which no group has, is refused by some optimizers
    try:
        optimizer = cls(parameters, lr=None if relative_step else default, **arguments)  # type: ignore[call-arg]
    except (TypeError, ValueError, AssertionError) as error:
        given = {key: repr(value) for key, value in arguments.items()}
        message = f"{name} refuses these arguments: {error}"
        raise UserError(Problem(message, key="optimizer_args", value=given)) from error
    if hasattr(optimizer, "train"):
        optimizer.train()  # schedule-free optimizers refuse to step before this call
    _let_host_run_ahead(optimizer)
    return optimizer


def _let_host_run_ahead(optimizer: torch.optim.Optimizer) -> None:
    """Keeps bitsandbytes from waiting for the device after each tensor, unless the optimizer's states are paged.

    Its kernels run in torch's stream, one after the other, so that nothing needs the wait. SDXL has 2,400 tensors.
    """
    module = sys.modules.get("bitsandbytes.optim.optimizer")
    if module is not None and isinstance(optimizer, module.Optimizer8bit):
        from bitsandbytes.utils import sync_gpu

        module.sync_gpu = sync_gpu if optimizer.is_paged else _do_not_wait  # type: ignore[attr-defined]


def _do_not_wait(tensor: torch.Tensor) -> None:
    """Takes the place of bitsandbytes' sync_gpu."""


def trial_optimizer(options: OptimizerOptions, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Builds the optimizer of a few parameters, to find out how the optimizer behaves. Raises UserError as above.

    The learning rate is the U-Net's. A rate of 0 is replaced by 0.001, which moves the parameters.
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
            "set the learning rate with learning_rate, learning_rate_te1 and learning_rate_te2 instead"
            if key == "lr"
            else f"{name} has no such argument: it takes {', '.join(accepted)}",
            key="optimizer_args",
            value=f"{key}={value!r}",
        )
        for key, value in arguments.items()
        if key not in accepted
    ]


def _relative_step(cls: type, arguments: dict[str, Any]) -> bool:
    """True if Adafactor chooses its own step size (arXiv 1804.04235, section 8). It then takes no learning rate.

    As in the reference, Adafactor does so unless the arguments say otherwise. Sets the argument `relative_step`.
    """
    if cls.__name__ != "Adafactor" or not cls.__module__.startswith("transformers"):
        return False
    if arguments.get("warmup_init"):
        arguments["relative_step"] = True
    arguments.setdefault("relative_step", True)
    return bool(arguments["relative_step"])


def set_lr(optimizer: torch.optim.Optimizer, rates: Sequence[float]) -> None:
    """Sets the learning rates of the groups for a step. A group whose rate is None chooses its own step size."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], torch.Tensor):  # torchao's optimizers need a tensor
            group["lr"].fill_(rate)
        elif group["lr"] is not None:
            group["lr"] = rate


def shows_other_weights(optimizer: object) -> bool:
    """True if an optimizer, or a class of optimizers, has weights for use that differ from the weights in training."""
    return hasattr(optimizer, "train") and hasattr(optimizer, "eval")


@contextmanager
def averaged_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Returns a context in which the parameters hold the weights to save and to draw previews with.

    Only schedule-free optimizers tell them from the weights in training (arXiv 2405.15682, equation 3). The weights in
    training are copied to host memory meanwhile, because the optimizer's own way back, train(), rounds them.
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


def state_bytes(options: OptimizerOptions, dtype: torch.dtype) -> float:
    """Bytes of optimizer states for each trained element of this type, measured on a small tensor. Raises UserError."""
    parameter = torch.nn.Parameter(torch.zeros(128, 128, dtype=dtype))
    optimizer = trial_optimizer(options, [parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = [value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors if tensor.numel() > 1) / parameter.numel()
