"""Exact float32 values of parameters that the model holds in bf16.

A float32 number is a bf16 number and sixteen more bits. With u the float32's bits,

    high = top 16 bits of (u + 0x8000)        low = low 16 bits of u, as an int16        u = (high << 16) + low

which is exact both ways for all 2^32 patterns, if sums wrap; `high` is u rounded to the nearest bf16, ties away from
zero (to the even one would need low = +32768, which an int16 does not have). So `high` is the parameter, that the model
computes with, and `low` is kept beside it: 4 bytes for a float32 weight and its bf16 copy. Undefined numbers (NaN)
survive the way back and forth, but `high` alone does not always show them.
"""

from typing import TypeAlias

import torch
from jaxtyping import BFloat16, Float32, Int16
from torch import Tensor
from torch.nn import Parameter

Masters: TypeAlias = dict[Parameter, Tensor]
"""What makes a bf16 parameter exact: its low bits (int16), or all of its value (float32)."""


def split(value: Float32[Tensor, " *n"]) -> tuple[BFloat16[Tensor, " *n"], Int16[Tensor, " *n"]]:
    """`high` and `low` of a float32 tensor."""
    halves = value.contiguous().view(-1).view(torch.int16).view(-1, 2)  # low half first: all machines of torch's do so
    low = halves[:, 0].clone()
    high = low >> 15  # -1 where the low half rounds up
    torch.sub(halves[:, 1], high, out=high)
    return high.view(torch.bfloat16).view(value.shape), low.view(value.shape)


def join(high: BFloat16[Tensor, " *n"], low: Int16[Tensor, " *n"]) -> Float32[Tensor, " *n"]:
    """The float32 tensor that `split` has taken apart."""
    halves = torch.empty(high.numel(), 2, dtype=torch.int16, device=high.device)
    halves[:, 0] = low.reshape(-1)
    torch.add(high.reshape(-1).view(torch.int16), halves[:, 0] >> 15, out=halves[:, 1])
    return halves.view(torch.float32).view(high.shape)


def rounded(value: Float32[Tensor, " *n"]) -> BFloat16[Tensor, " *n"]:
    """What the model holds of a master: the nearest bf16 number, as `split` rounds."""
    return split(value)[0]


def exact_value(parameter: Parameter, masters: Masters) -> Tensor:
    """The parameter's value: in float32 if there is a master, else as it is."""
    kept = masters.get(parameter)
    if kept is None:
        return parameter.detach()
    if kept.dtype == torch.int16:
        return join(parameter.detach(), kept.to(parameter.device))
    return kept
