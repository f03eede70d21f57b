"""A 16-bit number and its low bits are the float32 number: every bit pattern in bf16, and in fp16 down to 2^-14."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import Parameter

from sdxl_finetune.low_bits import MasterWeights, join, rounded, split

CORNERS = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x10000, 0x3F807FFF, 0x3F808000, 0x7F7FFFFF, 0x7F800000, 0x7FC00001]


def floats(bits: list[int]) -> torch.Tensor:
    return torch.tensor([one - (1 << 32) * (one >> 31) for one in bits], dtype=torch.int32).view(torch.float32)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_join_restores_every_bit_pattern_that_was_split(bits) -> None:
    value = floats(bits)
    assert torch.equal(join(*split(value)).view(torch.int32), value.view(torch.int32))


@pytest.mark.parametrize("exponent", [0, 1, 64, 126, 127, 128, 200, 254, 255])
def test_split_rounds_all_mantissas_of_an_exponent_to_the_nearest_bf16(exponent: int) -> None:
    """Both signs; ties go away from zero."""
    for sign in (0, 1):
        value = (torch.arange(1 << 23, dtype=torch.int32) + (exponent << 23) - (sign << 31)).view(torch.float32)
        high, low = split(value)
        assert torch.equal(join(high, low).view(torch.int32), value.view(torch.int32))
        if exponent < 254:
            near, ties = value.bfloat16(), low == -32768
            assert torch.equal(high[~ties], near[~ties])
            assert bool((high[ties].abs() >= value[ties].abs()).all())


@pytest.mark.parametrize("exponent", range(-14, 16))
def test_fp16_and_low_bits_hold_all_mantissas_of_an_exponent(exponent: int) -> None:
    """Both signs, up to the largest value that rounds to a finite number."""
    for sign in (0, 1):
        bits = torch.arange(1 << 23, dtype=torch.int32) + ((exponent + 127) << 23) - (sign << 31)
        value = bits.view(torch.float32)
        value = value[value.abs() < 65520]
        high, low = split(value, torch.float16)
        assert torch.equal(high, value.half()) and torch.equal(join(high, low), value)


def test_fp16_and_low_bits_hold_small_numbers_to_2_to_the_minus_40() -> None:
    small = torch.cat([torch.logspace(-60, -14, 100_000, base=2), torch.zeros(1)])
    for value in (small, -small):
        restored = join(*split(value, torch.float16))
        assert (restored - value).abs().max() <= 2**-40
        assert torch.equal(join(*split(restored, torch.float16)), restored), "splitting again loses nothing"
    odd = torch.tensor([math.inf, -math.inf, math.nan])
    assert torch.equal(join(*split(odd, torch.float16)).nan_to_num(), odd.nan_to_num())


def test_zeros_infinities_nan_and_ties_survive() -> None:
    value = floats(CORNERS + [one + (1 << 31) for one in CORNERS])
    assert torch.equal(join(*split(value)).view(torch.int32), value.view(torch.int32))
    assert rounded(floats([0x3F808000])).item() == 1.0078125 and rounded(floats([0xBF808000])).item() == -1.0078125


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_split_keeps_shapes_of_strided_and_empty_tensors(dtype: torch.dtype) -> None:
    value = torch.randn(4, 6, 5)
    for one in (value, value.transpose(0, 2), value[:0]):
        high, low = split(one, dtype)
        assert high.shape == low.shape == one.shape and torch.equal(join(high, low), one)
        assert high.is_contiguous() and low.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_master_weight_is_low_bits_or_a_whole_value(dtype: torch.dtype) -> None:
    value = torch.randn(3, 4)
    high, low = split(value, dtype)
    parameter, masters = Parameter(high), MasterWeights()
    assert torch.equal(masters.value(parameter), high) and masters.dtype(parameter) == dtype
    masters.add(parameter, low)
    assert torch.equal(masters.value(parameter), value) and masters.dtype(parameter) == torch.float32
    assert masters.has_low_bits(parameter)
    masters.prepare(parameter, whole=True)
    assert torch.equal(masters.value(parameter), value) and not masters.has_low_bits(parameter)
    with masters.replaced_by({parameter: value + 1}):
        assert torch.equal(masters.value(parameter), value + 1)
        assert torch.equal(parameter, rounded(value + 1, dtype)) and parameter.dtype == dtype
    assert torch.equal(parameter, high) and torch.equal(masters.value(parameter), value)


def test_new_values_of_some_elements_leave_the_others_as_they_are() -> None:
    value = torch.randn(3, 4)
    high, low = split(value)
    parameter, masters = Parameter(high), MasterWeights()
    masters.add(parameter, low)
    masters.write(parameter, slice(2, 7), torch.arange(5) / 3)
    value.view(-1)[2:7] = torch.arange(5) / 3
    assert torch.equal(masters.value(parameter), value) and torch.equal(parameter, rounded(value))
    assert torch.equal(masters.read(parameter, slice(5, 9)), value.view(-1)[5:9])
    assert torch.equal(masters.read(parameter, None), value)
