"""The moving average of the weights: its formula, its precision, and that training does not notice it."""

import math

import pytest
import torch
from torch.nn import Parameter

from sdxl_finetune.config import Config
from sdxl_finetune.low_bits import exact_value, split
from sdxl_finetune.optim.ema import build_average
from sdxl_finetune.optim.parameters import Group


def groups_of(value: float, dtype: torch.dtype = torch.float32) -> list[Group]:
    return [Group("unet", {"a": Parameter(torch.full((3,), value, dtype=dtype))}, 1e-3)]


def test_without_an_option_there_is_none() -> None:
    assert build_average(groups_of(1.0), {}, Config()) is None


@pytest.mark.parametrize("on_cpu", [False, True])
def test_it_follows_its_formula(on_cpu: bool) -> None:
    groups = groups_of(0.0)
    average = build_average(groups, {}, Config(ema_decay=0.7, ema_on_cpu=on_cpu))
    expected = 0.0
    for step in range(40):
        groups[0].parameters["a"].data.fill_(math.sin(step))
        average.update(step, 5)
        decay = min(0.7, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * math.sin(step)
        assert average.averages["unet.a"].tolist() == pytest.approx([expected] * 3, abs=1e-6)


@pytest.mark.parametrize("images", [1, 8, 64])
def test_a_half_life_is_counted_in_images(images: int) -> None:
    """After 640 images a jump of the weights is half in the average, whatever the batch size."""
    groups = groups_of(0.0)
    average = build_average(groups, {}, Config(ema_half_life=640))
    groups[0].parameters["a"].data.fill_(1.0)
    for step in range(10_000, 10_000 + 640 // images):
        average.update(step, images)
    assert average.averages["unet.a"].tolist() == pytest.approx([0.5] * 3, abs=1e-4)


def test_bf16_weights_have_a_float32_average() -> None:
    groups = groups_of(1.0, torch.bfloat16)
    average = build_average(groups, {}, Config(ema_decay=0.9999))
    groups[0].parameters["a"].data.fill_(2.0)
    for step in range(10**6, 10**6 + 100):
        average.update(step, 1)
    assert average.averages["unet.a"].tolist() == pytest.approx([2 - 0.9999**100] * 3, rel=1e-5)
    parameter, masters = groups[0].parameters["a"], average._masters
    with average.in_place():
        assert parameter.dtype == torch.bfloat16 and torch.equal(
            exact_value(parameter, masters), average.averages["unet.a"]
        )
    assert not masters and torch.equal(parameter, torch.full((3,), 2.0, dtype=torch.bfloat16))


def test_the_average_is_of_masters() -> None:
    """Steps that bf16 does not show reach the average, and the low bits come back after it was shown."""
    groups = groups_of(1.0, torch.bfloat16)
    parameter = groups[0].parameters["a"]
    masters = {parameter: split(torch.full((3,), 1.0005))[1]}
    average = build_average(groups, masters, Config(ema_decay=0.5))
    assert average.averages["unet.a"].tolist() == pytest.approx([1.0005] * 3, rel=1e-7)
    masters[parameter] += 1000
    average.update(100, 1)
    expected = exact_value(parameter, masters)
    assert average.averages["unet.a"].tolist() == pytest.approx(((expected + 1.0005) / 2).tolist(), rel=1e-7)
    with average.in_place():
        assert torch.equal(exact_value(parameter, masters), average.averages["unet.a"])
    assert torch.equal(exact_value(parameter, masters), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_showing_it_takes_no_second_copy_on_the_device(dtype: torch.dtype) -> None:
    """What is shown stands where the weights stood, or is the average itself."""
    groups = groups_of(1.0, dtype)
    parameter = groups[0].parameters["a"]
    average = build_average(groups, {}, Config(ema_decay=0.5))
    parameter.data.fill_(3.0)
    places = {parameter.data_ptr(), average.averages["unet.a"].data_ptr()}
    with average.in_place():
        assert parameter.data_ptr() in places and parameter.tolist() == [1.0] * 3
    assert parameter.tolist() == [3.0] * 3 and average.averages["unet.a"].tolist() == [1.0] * 3


def test_training_gets_its_own_tensors_back() -> None:
    groups = groups_of(1.0)
    parameter = groups[0].parameters["a"]
    average = build_average(groups, {}, Config(ema_decay=0.5))
    parameter.data.fill_(3.0)
    before = parameter.data_ptr()
    with pytest.raises(ZeroDivisionError), average.in_place():
        assert parameter.tolist() == [1.0] * 3
        raise ZeroDivisionError
    assert parameter.data_ptr() == before and parameter.tolist() == [3.0] * 3
