"""The EMA of the weights: its formula, its precision, and that training stays as it is."""

import math

import pytest
import torch
from torch.nn import Parameter

from sdxl_finetune.config import EmaOptions
from sdxl_finetune.low_bits import MasterWeights, split
from sdxl_finetune.optim.ema import build_ema
from sdxl_finetune.optim.parameters import Group, TrainedParameters


def one_parameter(value: float, dtype: torch.dtype = torch.float32) -> tuple[Parameter, TrainedParameters]:
    parameter = Parameter(torch.full((3,), value, dtype=dtype))
    return parameter, TrainedParameters([Group("unet", {"a": parameter}, 1e-3)], MasterWeights())


def test_without_an_option_there_is_no_ema() -> None:
    assert build_ema(one_parameter(1.0)[1], EmaOptions()) is None


@pytest.mark.parametrize("on_cpu", [False, True])
def test_the_ema_follows_its_formula(on_cpu: bool) -> None:
    parameter, parameters = one_parameter(0.0)
    ema = build_ema(parameters, EmaOptions(ema_decay=0.7, ema_on_cpu=on_cpu))
    expected = 0.0
    for step in range(40):
        parameter.data.fill_(math.sin(step))
        ema.update(step, 5)
        decay = min(0.7, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * math.sin(step)
        assert ema.averages["unet.a"].tolist() == pytest.approx([expected] * 3, abs=1e-6)


@pytest.mark.parametrize("images", [1, 8, 64])
def test_the_half_life_is_counted_in_images(images: int) -> None:
    """After 640 images the average has made half of a jump of the weights, whatever the batch size."""
    parameter, parameters = one_parameter(0.0)
    ema = build_ema(parameters, EmaOptions(ema_half_life=640))
    parameter.data.fill_(1.0)
    for step in range(10_000, 10_000 + 640 // images):
        ema.update(step, images)
    assert ema.averages["unet.a"].tolist() == pytest.approx([0.5] * 3, abs=1e-4)


def test_the_ema_of_bf16_weights_is_float32() -> None:
    parameter, parameters = one_parameter(1.0, torch.bfloat16)
    ema = build_ema(parameters, EmaOptions(ema_decay=0.9999))
    parameter.data.fill_(2.0)
    for step in range(10**6, 10**6 + 100):
        ema.update(step, 1)
    assert ema.averages["unet.a"].tolist() == pytest.approx([2 - 0.9999**100] * 3, rel=1e-5)
    with ema.in_place():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameters.value(parameter), ema.averages["unet.a"])
    assert not parameters.masters.tensors() and torch.equal(parameter, torch.full((3,), 2.0, dtype=torch.bfloat16))


def test_the_ema_is_of_exact_values() -> None:
    """Steps that bf16 does not show reach the EMA, and the low bits come back after the EMA was in place."""
    parameter, parameters = one_parameter(1.0, torch.bfloat16)
    low = split(torch.full((3,), 1.0005))[1]
    parameters.masters.add(parameter, low)
    ema = build_ema(parameters, EmaOptions(ema_decay=0.5))
    assert ema.averages["unet.a"].tolist() == pytest.approx([1.0005] * 3, rel=1e-7)
    low += 1000
    ema.update(100, 1)
    expected = parameters.value(parameter)
    assert ema.averages["unet.a"].tolist() == pytest.approx(((expected + 1.0005) / 2).tolist(), rel=1e-7)
    with ema.in_place():
        assert torch.equal(parameters.value(parameter), ema.averages["unet.a"])
    assert torch.equal(parameters.value(parameter), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ema_in_place_takes_no_second_copy_on_the_device(dtype: torch.dtype) -> None:
    """The parameter keeps its memory, or has that of the EMA."""
    parameter, parameters = one_parameter(1.0, dtype)
    ema = build_ema(parameters, EmaOptions(ema_decay=0.5))
    parameter.data.fill_(3.0)
    places = {parameter.data_ptr(), ema.averages["unet.a"].data_ptr()}
    with ema.in_place():
        assert parameter.data_ptr() in places and parameter.tolist() == [1.0] * 3
    assert parameter.tolist() == [3.0] * 3 and ema.averages["unet.a"].tolist() == [1.0] * 3


def test_after_an_error_training_gets_its_own_tensors_back() -> None:
    parameter, parameters = one_parameter(1.0)
    ema = build_ema(parameters, EmaOptions(ema_decay=0.5))
    parameter.data.fill_(3.0)
    before = parameter.data_ptr()
    with pytest.raises(ZeroDivisionError), ema.in_place():
        assert parameter.tolist() == [1.0] * 3
        raise ZeroDivisionError
    assert parameter.data_ptr() == before and parameter.tolist() == [3.0] * 3
