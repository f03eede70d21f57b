"""How far an optimizer can be asked to step on a part of the parameters alone.

Whether its terms reach across elements or across tensors is tried out and not listed, so that it is known of any class
that a user names: the same gradients are given to it for all at once and for parts in turn, and must end in the
same bits.
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


class Reach(IntEnum):
    """What an optimizer has to see together."""

    ELEMENTS = 0
    """Nothing: parts of a tensor may be stepped on one after the other, blocks of BLOCK elements where it quantises."""
    TENSOR = 1
    """A tensor, as for factored moments (Adafactor) and norms (LAMB)."""
    ALL = 2
    """All parameters, as for an estimated learning rate (Prodigy); or it counts its steps for a whole group."""


BLOCK = 256
"""Elements that 8-bit optimizers quantise together."""
STEPS = 6
TOGETHER = ("prodigyopt", "dadaptation")
"""Packages of classes whose terms reach across tensors so weakly at first that a trial might not show it."""


def find_reach(build: Build, cls: type, device: torch.device) -> Reach:
    """Of optimizers that `build` makes of a list of parameters, all of class `cls`."""
    if cls.__module__.startswith(TOGETHER):
        return Reach.ALL
    if shows_other_weights(cls):  # it changes parameters between steps, too
        return Reach.ALL
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, 64, 2 * BLOCK, generator=generator).to(device)
    # Mostly of one sign, so that what is estimated from the direction of several steps grows.
    gradients = (torch.randn(STEPS, 2, 64, 2 * BLOCK, generator=generator) + 1).to(device)
    halves = 2, 64 * BLOCK
    try:
        whole = _trial(build, start, gradients, each=False)
        if not torch.equal(whole, _trial(build, start, gradients, each=True)):
            return Reach.ALL
        parts = gradients[:, 0].reshape(STEPS, *halves)
        if torch.equal(whole[0].reshape(halves), _trial(build, start[0].reshape(halves), parts, each=True)):
            return Reach.ELEMENTS
    except UserError:
        raise
    except Exception:  # one that wants a closure, tensors of some shape, or another device
        return Reach.ALL
    return Reach.TENSOR


def _trial(build: Build, start: Tensor, gradients: Tensor, *, each: bool) -> Tensor:
    """The tensors of `start` after these gradients, given for all at once, or for `each` in turn."""
    parameters = [Parameter(one.clone()) for one in start]
    optimizer = build(parameters)
    for step in gradients:
        for part in [[one] for one in parameters] if each else [parameters]:
            with only(optimizer, [part]):
                for parameter in part:
                    at = next(number for number, one in enumerate(parameters) if one is parameter)
                    parameter.grad = step[at].clone()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    return torch.stack([one.detach() for one in parameters])


@contextmanager
def only(optimizer: torch.optim.Optimizer, parameters: Sequence[Sequence[Parameter]]) -> Iterator[None]:
    """Within it, the optimizer knows of each of its groups only these parameters, and no group without any."""
    groups, known = optimizer.param_groups, [group["params"] for group in optimizer.param_groups]
    for group, wanted in zip(groups, parameters, strict=True):
        group["params"] = list(wanted)
    optimizer.param_groups = [group for group in groups if group["params"]]
    try:
        yield
    finally:
        optimizer.param_groups = groups
        for group, all_ in zip(groups, known, strict=True):
            group["params"] = all_
