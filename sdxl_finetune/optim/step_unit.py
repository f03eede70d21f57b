"""The smallest part of the parameters on which an optimizer can step alone.

A trial finds it, not a list, so that it is known for any class that a user names. The trial gives the optimizer the
same gradients twice: for all parameters at once, and for one part after the other. Both must end in the same bits.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum

import torch
from torch import Tensor
from torch.nn import Parameter

from sdxl_finetune.errors import UserError
from sdxl_finetune.optim.optimizer import shows_other_weights

Build = Callable[[Sequence[Parameter]], torch.optim.Optimizer]


class StepUnit(IntEnum):
    """The smallest part of the parameters on which an optimizer can step alone."""

    ELEMENTS = 0
    """Some elements of a tensor, in whole blocks of BLOCK elements: the optimizer is element-wise."""
    TENSOR = 1
    """A whole tensor, because of factored moments (Adafactor) or norms (LAMB)."""
    ALL = 2
    """All parameters, because of an estimated learning rate (Prodigy) or a count of steps for a whole group."""


BLOCK = 256
"""Elements that 8-bit optimizers quantise together."""
STEPS = 6
"""Steps of the trial: enough for an estimated learning rate to change."""
NEEDS_ALL = ("prodigyopt", "dadaptation")
"""Packages whose optimizers need all parameters. At first the effect is so weak that a trial might miss it."""


def find_step_unit(build: Build, cls: type, device: torch.device) -> StepUnit:
    """Tries out an optimizer of class `cls`, which `build` makes for a list of parameters.

    Raises UserError if the optimizer cannot be built.
    """
    if cls.__module__.startswith(NEEDS_ALL) or shows_other_weights(cls):  # the latter change weights between steps
        return StepUnit.ALL
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, 64, 2 * BLOCK, generator=generator).to(device)
    # Most gradients have one sign, so that an estimate from the direction of several steps grows.
    gradients = (torch.randn(STEPS, 2, 64, 2 * BLOCK, generator=generator) + 1).to(device)
    try:
        whole = _trial(build, start, gradients, together=True)
        if not torch.equal(whole, _trial(build, start, gradients, together=False)):
            return StepUnit.ALL
        first = gradients[:, 0].reshape(STEPS, 2, -1)
        halves = _trial(build, start[0].reshape(2, -1), first, together=False)
    except UserError:
        raise
    except Exception:  # the optimizer wants a closure, tensors of some shape, or another device
        return StepUnit.ALL
    return StepUnit.ELEMENTS if torch.equal(whole[0].reshape(2, -1), halves) else StepUnit.TENSOR


def _trial(build: Build, start: Tensor, gradients: Tensor, *, together: bool) -> Tensor:
    """Returns the tensors of `start` after steps with these gradients, for all tensors `together` or one by one."""
    parameters = [Parameter(tensor.clone()) for tensor in start]
    optimizer = build(parameters)
    numbers = range(len(parameters))
    for gradient in gradients:
        for chosen in [numbers] if together else [[number] for number in numbers]:
            with restricted_to(optimizer, [[parameters[number] for number in chosen]]):
                for number in chosen:
                    parameters[number].grad = gradient[number].clone()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    return torch.stack([parameter.detach() for parameter in parameters])


@contextmanager
def restricted_to(optimizer: torch.optim.Optimizer, parameters: Sequence[Sequence[Parameter]]) -> Iterator[None]:
    """Hides from the optimizer all parameters but these, given for each of its groups, and groups without any."""
    groups, hidden = optimizer.param_groups, [group["params"] for group in optimizer.param_groups]
    for group, shown in zip(groups, parameters, strict=True):
        group["params"] = list(shown)
    optimizer.param_groups = [group for group in groups if group["params"]]
    try:
        yield
    finally:
        optimizer.param_groups = groups
        for group, all_parameters in zip(groups, hidden, strict=True):
            group["params"] = all_parameters
