"""float32 values of parameters that the model holds in 16 bits: low bits and master weights.

A float32 number is a bf16 number and 16 more bits. With `u` the bits of the float32 number:

    high = top 16 bits of (u + 0x8000)        low = low 16 bits of u, as an int16        u = (high << 16) + low

All sums wrap. The formulas are exact in both directions for all 2^32 patterns. `high` is the nearest bf16 number; ties
go away from zero. A tie cannot go to the even number, because that needs low = +32768, which an int16 does not have.

fp16 has fewer exponents than float32. Its low bits are a number: the distance from `high` to the value. The unit is a
32768th of the distance between `high` and its neighbours. This is exact for values of at least 2^-14. Smaller values
are rounded to multiples of 2^-39, which is far below any update.

The model computes with `high`. The low bits are kept beside it, so a float32 value and its 16-bit copy take 4 bytes.
NaN survives both directions, but a bf16 `high` alone does not always show a NaN.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Float16, Float32, Int16, Shaped
from torch import Tensor
from torch.nn import Parameter

HALF = (torch.bfloat16, torch.float16)
"""Dtypes of parameters that low bits extend to float32."""


def split(
    value: Float32[Tensor, " *n"], dtype: torch.dtype = torch.bfloat16
) -> tuple[Shaped[Tensor, " *n"], Int16[Tensor, " *n"]]:
    """Splits a float32 tensor into `high`, which has `dtype`, and `low`."""
    high = torch.empty(value.shape, dtype=dtype, device=value.device)
    low = torch.empty(value.shape, dtype=torch.int16, device=value.device)
    split_into(value, high, low)
    return high, low


def split_into(value: Float32[Tensor, " *n"], high: Shaped[Tensor, " *n"], low: Int16[Tensor, " *n"]) -> None:
    """Splits a float32 tensor into two contiguous tensors, as `split` does, in place.

    An optimizer's step on SDXL makes some 2,500 calls, so that each kernel on the device counts: bf16 takes three.
    """
    if high.dtype == torch.float16:
        high.copy_(value)
        low.copy_(((value - high.float()) / _unit(high)).round_())
        return
    halves = value.contiguous().view(-1).view(torch.int16).view(-1, 2)  # torch's machines store the low half first
    low = low.view(-1).copy_(halves[:, 0])
    torch.sub(halves[:, 1], low >> 15, out=high.view(-1).view(torch.int16))  # -1 where the low half rounds up


def join(high: Shaped[Tensor, " *n"], low: Int16[Tensor, " *n"]) -> Float32[Tensor, " *n"]:
    """Returns the float32 tensor that `split` took apart."""
    if high.dtype == torch.float16:
        return high.float().add_(_unit(high).mul_(low))
    value = high.float()  # the bits of `high`, and then 16 zeros
    value.view(torch.int32).add_(low)
    return value


def rounded(value: Float32[Tensor, " *n"], dtype: torch.dtype = torch.bfloat16) -> Shaped[Tensor, " *n"]:
    """Rounds to the nearest number of `dtype`, with the ties of `split`."""
    return value.half() if dtype == torch.float16 else split(value)[0]


def _unit(high: Float16[Tensor, " *n"]) -> Float32[Tensor, " *n"]:
    """The weight of the lowest low bit: a 32768th of the distance between `high` and its neighbours.

    `high` has 10 bits below its highest, so the weight is 2^-25 times the power of two in `high`. Numbers below 2^-14
    have the distances of that power.
    """
    exponent = ((high.view(torch.int16).int() >> 10) & 31).clamp_(min=1)  # biased by 15; float32's is biased by 127
    return ((exponent + (127 - 15 - 25)) << 23).view(torch.float32)


def elements_of(tensor: Tensor, elements: slice | None) -> Tensor:
    """Returns a view of the flattened tensor's `elements`, or of the whole tensor in its own shape if None."""
    return tensor.detach() if elements is None else tensor.detach().view(-1)[elements]


class MasterWeights:
    """Exact values of a model's parameters. After loading, only this class writes low bits.

    For a 16-bit parameter it keeps either the low bits (int16) or the whole value (float32). A parameter for which it
    keeps nothing is exact as it is. Parameters are known by identity, so moving a model to a device must keep the
    objects.
    """

    def __init__(self) -> None:
        self._kept: dict[Parameter, Tensor] = {}

    def add(self, parameter: Parameter, low: Int16[Tensor, " *n"]) -> None:
        """Keeps the low bits of a parameter that holds the high bits."""
        self._kept[parameter] = low

    def kept(self, parameter: Parameter) -> Tensor | None:
        """Returns the low bits or the float32 value of a parameter, or None."""
        return self._kept.get(parameter)

    def has_low_bits(self, parameter: Parameter) -> bool:
        kept = self._kept.get(parameter)
        return kept is not None and kept.dtype == torch.int16

    def tensors(self) -> list[Tensor]:
        return list(self._kept.values())

    def value(self, parameter: Parameter) -> Tensor:
        """Returns the parameter's value: in float32 if low bits or a float32 value are kept, else as it is."""
        kept = self._kept.get(parameter)
        if kept is None:
            return parameter.detach()
        return join(parameter.detach(), kept.to(parameter.device)) if kept.dtype == torch.int16 else kept

    def dtype(self, parameter: Parameter) -> torch.dtype:
        """Returns the dtype of `value`, in which a file holds the parameter without loss."""
        return torch.float32 if parameter in self._kept else parameter.dtype

    def prepare(self, parameter: Parameter, *, whole: bool) -> None:
        """Puts the low bits of a parameter to be trained, or its `whole` float32 value, on the parameter's device."""
        if whole:
            self._kept[parameter] = self.value(parameter).float().to(parameter.device)
        elif parameter in self._kept:
            self._kept[parameter] = self._kept[parameter].to(parameter.device)
        else:
            self._kept[parameter] = torch.zeros_like(parameter, dtype=torch.int16)

    def read(self, parameter: Parameter, elements: slice | None) -> Float32[Tensor, " *n"]:
        """Joins the `elements` of a parameter with their low bits in a new tensor."""
        return join(elements_of(parameter, elements), elements_of(self._kept[parameter], elements))

    def write(self, parameter: Parameter, elements: slice | None, value: Float32[Tensor, " *n"]) -> None:
        """Splits new values into `elements` of the parameter and their low bits."""
        # In place, so that autograd notices if a backward pass still needs the old values.
        split_into(value, elements_of(parameter, elements), elements_of(self._kept[parameter], elements))

    def round_into(self, parameter: Parameter) -> None:
        """Rounds the parameter's float32 value, if it is kept, into the 16-bit parameter."""
        kept = self._kept.get(parameter)
        if kept is not None and kept.dtype == torch.float32:
            parameter.detach().copy_(rounded(kept, parameter.dtype))

    @contextmanager
    def replaced_by(self, values: Mapping[Parameter, Float32[Tensor, "..."]]) -> Iterator[None]:
        """Gives the parameters other float32 values within the context, and their own tensors back after it.

        It takes no memory on the device. If a new value has its parameter's dtype and device, the two tensors are
        swapped. Otherwise the old value waits in host memory.
        """
        swapped = {key for key, value in values.items() if (key.dtype, key.device) == (value.dtype, value.device)}
        originals = {key: key.data if key in swapped else key.data.to("cpu", copy=True) for key in values}
        kept = self._kept
        try:
            for parameter, value in values.items():
                is_half = parameter.dtype in HALF
                _put(parameter, rounded(value, parameter.dtype) if is_half else value, parameter in swapped)
            self._kept = kept | {key: value for key, value in values.items() if key.dtype in HALF}
            yield
        finally:
            for parameter, original in originals.items():
                _put(parameter, original, parameter in swapped)
            self._kept = kept


def _put(parameter: Parameter, value: Tensor, swap: bool) -> None:
    """Replaces the parameter's tensor, or copies the value into it."""
    if swap:
        parameter.data = value
    else:
        parameter.data.copy_(value)
