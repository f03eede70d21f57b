"""Compares the weights of all ranks. Data-parallel training relies on all ranks making the same step.

A checksum of each parameter is compared on the devices. The result is read from the device some steps later, with the
scalars of the step. Nothing waits for it.
"""

from collections.abc import Mapping

import torch
import torch.distributed
from accelerate import Accelerator
from jaxtyping import Float, Int64
from torch import Tensor

from sdxl_finetune.config import NumbersOptions
from sdxl_finetune.optim.parameters import TrainedParameters
from sdxl_finetune.output.watch import RANK_DIFFERENCES

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of the size of each kind of number, in bytes."""


class RankCheck:
    """Compares the weights of all ranks every `rank_check_every_n_steps` steps, if there are several ranks."""

    def __init__(self, options: NumbersOptions, parameters: TrainedParameters, accelerator: Accelerator) -> None:
        self._every = options.rank_check_every_n_steps if accelerator.num_processes > 1 else 0
        self._parameters = parameters

    def after(self, step: int) -> Mapping[str, Float[Tensor, " p"]]:
        """Compares the weights if it is due after so many steps. All ranks call it at the same steps.

        The vector has 1 for each trained parameter that differs between ranks, and 0 for all others.
        """
        if not self._every or step % self._every:
            return {}
        return {RANK_DIFFERENCES: differing_ranks(checksums(self._parameters))}


@torch.no_grad()
def checksums(parameters: TrainedParameters) -> Int64[Tensor, " p"]:
    """The sum of the bits of each parameter and of its master weight, read as integers. Any change of one weight shows.

    The sums wrap. Only changes of several weights can cancel out.
    """
    sums = []
    for _, parameter in parameters.named():
        kept = parameters.masters.kept(parameter)
        sums.append(_sum(parameter) if kept is None else _sum(parameter) + 3 * _sum(kept))
    return torch.stack(sums)


def differing_ranks(values: Int64[Tensor, " p"]) -> Float[Tensor, " p"]:
    """1 for each element that is not the same on all ranks, else 0."""
    # ~value falls as value rises and never overflows, so one message finds both the largest and the smallest value.
    largest = torch.cat([values, ~values])
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    highest, lowest = largest[: len(values)], ~largest[len(values) :]
    return (highest != lowest).float()


def _sum(tensor: Tensor) -> Int64[Tensor, ""]:
    return tensor.detach().view(INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)
