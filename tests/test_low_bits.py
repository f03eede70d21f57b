"""bf16 and low bits are float32, for every pattern."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import Parameter

from sdxl_finetune.low_bits import exact_value, join, rounded, split

CORNERS = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x10000, 0x3F807FFF, 0x3F808000, 0x7F7FFFFF, 0x7F800000, 0x7FC00001]


def floats(bits: list[int]) -> torch.Tensor:
    return torch.tensor([one - (1 << 32) * (one >> 31) for one in bits], dtype=torch.int32).view(torch.float32)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_any_pattern_survives(bits) -> None:
    value = floats(bits)
    assert torch.equal(join(*split(value)).view(torch.int32), value.view(torch.int32))


@pytest.mark.parametrize("exponent", [0, 1, 64, 126, 127, 128, 200, 254, 255])
def test_patterns_of_an_exponent(exponent: int) -> None:
    """All mantissas, both signs; the high half is the nearest bf16 number, ties away from zero."""
    for sign in (0, 1):
        value = (torch.arange(1 << 23, dtype=torch.int32) + (exponent << 23) - (sign << 31)).view(torch.float32)
        high, low = split(value)
        assert torch.equal(join(high, low).view(torch.int32), value.view(torch.int32))
        if exponent < 254:
            near, ties = value.bfloat16(), low == -32768
            assert torch.equal(high[~ties], near[~ties])
            assert bool((high[ties].abs() >= value[ties].abs()).all())


def test_rounding_of_ties_and_corners() -> None:
    value = floats(CORNERS + [one + (1 << 31) for one in CORNERS])
    assert torch.equal(join(*split(value)).view(torch.int32), value.view(torch.int32))
    assert rounded(floats([0x3F808000])).item() == 1.0078125 and rounded(floats([0xBF808000])).item() == -1.0078125


def test_shapes_and_strides() -> None:
    value = torch.randn(4, 6, 5)
    for one in (value, value.transpose(0, 2), value[:0]):
        high, low = split(one)
        assert high.shape == low.shape == one.shape and torch.equal(join(high, low), one)


def test_a_master_is_low_bits_or_a_whole_value() -> None:
    value = torch.randn(3, 4)
    high, low = split(value)
    parameter = Parameter(high)
    assert torch.equal(exact_value(parameter, {}), high)
    assert torch.equal(exact_value(parameter, {parameter: low}), value)
    assert torch.equal(exact_value(parameter, {parameter: value}), value)
