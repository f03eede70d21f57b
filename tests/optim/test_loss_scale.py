"""Gradients of a scaled loss train as those of the loss itself, and a step whose gradients overflow changes nothing."""

import math

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import Parameter

from sdxl_finetune.config import Config
from sdxl_finetune.low_bits import MasterWeights, split
from sdxl_finetune.optim.loss_scale import GROWTH_INTERVAL, START, LossScale
from sdxl_finetune.optim.optimizer import build_optimizer
from sdxl_finetune.optim.parameters import Group, TrainedParameters
from sdxl_finetune.optim.update import Update, build_update, total_norm

SHAPES = {"matrix": (40, 30), "bias": (17,)}
KINDS = {
    "mixed precision": {},
    "full_fp16": {"full_fp16": True},
    "full_fp16, optimizer of all tensors": {"full_fp16": True, "optimizer_type": "AdamWScheduleFree"},
}


class Small(nn.Module):
    """A model whose gradients are what `forward` is given."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in values.items():
            setattr(self, name, Parameter(value))

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        return torch.stack([(getattr(self, name).float() * one).sum() for name, one in gradients.items()]).sum()


def drawn(seed: int) -> dict[str, Tensor]:
    """Numbers of which 65536 times as much is a float16 number."""
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=generator) * 0.02).half().float() for name, shape in SHAPES.items()}


def build(**options) -> tuple[Small, Update, MasterWeights]:
    config = Config(**{"mixed_precision": "fp16", "learning_rate": 1e-3, **options})
    masters, values = MasterWeights(), {name: value + 1e-5 for name, value in drawn(0).items()}
    model = Small(values)
    if config.full_fp16:
        halves = {name: split(value, torch.float16) for name, value in values.items()}
        model = Small({name: high for name, (high, _) in halves.items()})
        for name, (_, low) in halves.items() if config.exact_masters else ():
            masters.add(getattr(model, name), low)
    parameters = TrainedParameters([Group("unet", dict(model.named_parameters()), config.learning_rate)], masters)
    return model, build_update(config, parameters, model, Accelerator(cpu=True))[1], masters


def step(model: Small, update: Update, *gradients: dict[str, Tensor]) -> float:
    """Makes a step of so many micro-batches, and returns the norm of the gradients."""
    scale = update.loss_scale
    assert scale is not None
    for number, one in enumerate(gradients, 1):
        with update.accumulate(last=number == len(gradients), only=len(gradients) == 1):
            scale.scaled(model(one)).backward()
    return float(total_norm(update.step()))


def expected(steps: int, **options) -> tuple[Small, list[float]]:
    """Float32 training with the same gradients and optimizer, without a scale."""
    config = Config(**{"learning_rate": 1e-3, **options, "full_fp16": False})
    model = Small({name: value + 1e-5 for name, value in drawn(0).items()})
    optimizer = build_optimizer(config, [Group("unet", dict(model.named_parameters()), 1e-3)])
    norms = []
    for number in range(steps):
        for one in (drawn(10 + number), drawn(20 + number)):
            model(one).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf).item())
        optimizer.step()
        optimizer.zero_grad()
    return model, norms


@pytest.mark.parametrize("max_norm", [0.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_with_a_scale_are_those_of_float32_training(kind: str, max_norm: float) -> None:
    options = {**KINDS[kind], "max_grad_norm": max_norm}
    model, update, masters = build(**options)
    norms = [step(model, update, drawn(10 + number), drawn(20 + number)) for number in range(4)]
    other, other_norms = expected(4, **options)
    assert norms == pytest.approx(other_norms, rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(masters.value(parameter), getattr(other, name).data, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "broken"),
    # 1e4 is finite, but not 65536 times as much in float16.
    [*((kind, broken) for kind in KINDS for broken in (math.inf, math.nan)), ("full_fp16", 1e4)],
)
def test_a_step_whose_gradients_overflow_changes_only_the_scale(kind: str, broken: float) -> None:
    model, update, masters = build(**KINDS[kind])
    step(model, update, drawn(10), drawn(20))
    before = {name: masters.value(one).clone() for name, one in model.named_parameters()}
    gradients = drawn(11)
    gradients["bias"][3] = broken
    assert not math.isfinite(step(model, update, gradients, drawn(21)))
    for name, parameter in model.named_parameters():
        assert torch.equal(masters.value(parameter), before[name]) and parameter.grad is None
    assert update.loss_scale is not None and update.loss_scale.value == START / 2
    for number in (1, 2, 3):
        step(model, update, drawn(10 + number), drawn(20 + number))
    other, _ = expected(4, **KINDS[kind])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(masters.value(parameter), getattr(other, name).data, rtol=1e-6, atol=1e-9)


def test_gradients_below_the_range_of_float16_train_master_weights() -> None:
    """2^-30 is zero in float16, and 65536 times as much is not."""
    model, update, masters = build(full_fp16=True, optimizer_type="SGD", learning_rate=1024.0, max_grad_norm=0.0)
    before = {name: masters.value(one).clone() for name, one in model.named_parameters()}
    assert torch.tensor(2.0**-30).half() == 0
    step(model, update, {name: torch.full(shape, 2.0**-30) for name, shape in SHAPES.items()})
    for name, parameter in model.named_parameters():
        moved = before[name].double() - masters.value(parameter).double()
        torch.testing.assert_close(moved, torch.full_like(moved, 2.0**-20), rtol=2e-3, atol=0)


def test_the_scale_grows_after_many_steps_and_is_saved() -> None:
    scale = LossScale(torch.device("cpu"))
    one, broken = torch.tensor(1.0), torch.tensor(math.inf)
    assert all(scale.accepts(one) for _ in range(GROWTH_INTERVAL - 1)) and scale.value == START
    resumed = LossScale(torch.device("cpu"))
    resumed.load_state_dict(scale.state_dict())
    for each in (scale, resumed):
        assert each.accepts(one) and each.value == 2 * START
        assert not each.accepts(broken) and each.value == START
        assert all(each.accepts(one) for _ in range(GROWTH_INTERVAL - 1)) and each.value == START, "counts anew"
