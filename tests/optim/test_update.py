"""Master weights take the same steps as in float32 training: whole or in slices, fused or not."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import Parameter

from sdxl_finetune.config import Config
from sdxl_finetune.errors import UserError
from sdxl_finetune.low_bits import MasterWeights, split
from sdxl_finetune.optim import update
from sdxl_finetune.optim.optimizer import build_optimizer, set_lr
from sdxl_finetune.optim.parameters import Group, TrainedParameters
from sdxl_finetune.optim.step_unit import StepUnit
from sdxl_finetune.optim.update import ExactUpdate, check_update, step_unit, total_norm

RATES = (3e-5, 1e-6)
SHAPES = {"matrix": (96, 200), "kernel": (40, 30, 3, 3), "norm": (77,), "long": (20_000,), "scale": (1,)}
STEP_UNITS = {
    "AdamW": StepUnit.ELEMENTS,
    "torch.optim.RAdam": StepUnit.ELEMENTS,
    "Adagrad": StepUnit.ELEMENTS,
    "SGDNesterov": StepUnit.ELEMENTS,
    "Lion": StepUnit.ELEMENTS,
    "AdamW8bit": StepUnit.ELEMENTS,
    "Lion8bit": StepUnit.ELEMENTS,
    "AdEMAMix8bit": StepUnit.ELEMENTS,
    "bitsandbytes.optim.AdamW32bit": StepUnit.ELEMENTS,
    "Adafactor": StepUnit.TENSOR,
    "Prodigy": StepUnit.ALL,
    "AdamWScheduleFree": StepUnit.ALL,
    "LBFGS": StepUnit.ALL,
}


class Small(nn.Module):
    """Parameters whose gradients are what `forward` is given."""

    def __init__(self, values: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, value in values.items():
            setattr(self, name, Parameter(value))

    def forward(self, gradients: dict[str, torch.Tensor]) -> torch.Tensor:
        return sum((getattr(self, name).float() * one).sum() for name, one in gradients.items())


def values(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in SHAPES.items()}


def gradients(step: int) -> dict[str, torch.Tensor]:
    """As they come in bf16."""
    return {name: one.mul(50).bfloat16().float() for name, one in values(100 + step).items()}


def groups_of(model: Small, rates=RATES) -> list[Group]:
    named = dict(model.named_parameters())
    halves = [{name: named[name] for name in names} for names in (("matrix", "norm", "scale"), ("kernel", "long"))]
    return [Group(name, half, rate) for name, half, rate in zip(("unet", "text_encoder1"), halves, rates, strict=True)]


def exact(config: Config, rates=RATES) -> tuple[Small, ExactUpdate, MasterWeights]:
    """A bf16 model with low bits, and its update."""
    halves = {name: split(value) for name, value in values().items()}
    model, masters = Small({name: high for name, (high, _) in halves.items()}), MasterWeights()
    for name, (_, low) in halves.items():
        masters.add(getattr(model, name), low)
    parameters = TrainedParameters(groups_of(model, rates), masters)
    return model, ExactUpdate(config, parameters, Accelerator(cpu=True)), masters


def options(name: str, **more) -> Config:
    given = {"optimizer_type": name, "full_bf16": True, "mixed_precision": "bf16", "learning_rate": RATES[0]}
    return Config(**given, **{"max_grad_norm": 0.0, **more})


def train(model: Small, exact_update: ExactUpdate, micros: int = 1, steps: int = 5) -> None:
    for step in range(steps):
        for micro in range(micros):
            with exact_update.accumulate(last=micro + 1 == micros, only=micros == 1):
                model(gradients(10 * step + micro)).backward()
        exact_update.step()


def plain(config: Config, rates=RATES, steps: int = 5, micros: int = 1) -> tuple[Small, torch.optim.Optimizer]:
    """Trains float32 parameters with the same optimizer and the same gradients."""
    model = Small(values())
    optimizer = build_optimizer(config, groups_of(model, rates))
    for step in range(steps):
        for micro in range(micros):
            model(gradients(10 * step + micro)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def assert_same(model: Small, masters: MasterWeights, expected: Small) -> None:
    for name, parameter in model.named_parameters():
        value = masters.value(parameter)
        assert torch.equal(value, getattr(expected, name)), name
        assert torch.equal(parameter, split(value)[0]), name
        assert not torch.equal(value, values()[name]), name


@pytest.mark.parametrize("name", STEP_UNITS)
def test_a_trial_finds_the_step_unit(name: str) -> None:
    assert step_unit(options(name), torch.device("cpu")) == STEP_UNITS[name]


def test_a_trial_finds_the_step_unit_if_only_text_encoders_are_trained() -> None:
    """A trial at the U-Net's learning rate, 0, would move nothing."""
    config = options("Adafactor", optimizer_args=["relative_step=False"]).model_copy(update={"learning_rate": 0.0})
    assert step_unit(config, torch.device("cpu")) == StepUnit.TENSOR


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", [name for name in STEP_UNITS if name != "LBFGS"])
def test_master_weights_are_bit_identical_to_float32_training(name: str, fused: bool, monkeypatch) -> None:
    """Slices are small here, so that large tensors are cut, and small ones share a call of the optimizer."""
    monkeypatch.setattr(update, "SLICE", 4096)
    rates = (1.0, 1.0) if name == "Prodigy" else RATES  # factors on its own estimate
    config = options(name, fused_backward_pass=fused)
    if fused and STEP_UNITS[name] == StepUnit.ALL:
        with pytest.raises(
            UserError, match=f"fused_backward_pass.*{name} needs all gradients at once.*remove fused_backward_pass"
        ):
            check_update(config, torch.device("cpu"))
        return
    model, exact_update, masters = exact(config, rates)
    train(model, exact_update)
    assert_same(model, masters, plain(config, rates)[0])
    kinds = {kept.dtype for kept in masters.tensors()}
    assert kinds == {torch.float32 if STEP_UNITS[name] == StepUnit.ALL else torch.int16}


@pytest.mark.parametrize(
    ("name", "argument"), [("AdamW", "foreach=True"), ("AdamW", "fused=True"), ("AdamW", "amsgrad=True")]
)
def test_master_weights_are_bit_identical_with_variants_of_adamw(name: str, argument: str, monkeypatch) -> None:
    monkeypatch.setattr(update, "SLICE", 4096)
    config = options(name, optimizer_args=[argument])
    model, exact_update, masters = exact(config)
    train(model, exact_update)
    assert_same(model, masters, plain(config)[0])


def test_weights_for_use_are_in_the_model_and_training_weights_come_back() -> None:
    """Schedule-free optimizers keep two sets of weights; the bf16 weights follow the master weights."""
    model, exact_update, masters = exact(options("AdamWScheduleFree"))
    train(model, exact_update)
    trained = {name: masters.value(one).clone() for name, one in model.named_parameters()}
    with exact_update.weights_for_use():
        for name, one in model.named_parameters():
            assert not torch.equal(masters.value(one), trained[name])
            assert torch.equal(one, split(masters.value(one))[0])
    for name, one in model.named_parameters():
        assert torch.equal(masters.value(one), trained[name]), name
        assert torch.equal(one, split(masters.value(one))[0])


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_of_micro_batches_are_summed_in_float32(fused: bool) -> None:
    config = options("AdamW", fused_backward_pass=fused)
    model, exact_update, masters = exact(config)
    train(model, exact_update, micros=3)
    assert_same(model, masters, plain(config, micros=3)[0])


def test_optimizer_states_have_the_dtypes_of_float32_training() -> None:
    """8-bit where the optimizer quantises, else float32; never bf16."""
    for name, dtypes in (("AdamW", {torch.float32}), ("AdamW8bit", {torch.float32, torch.uint8})):
        model, exact_update, _ = exact(options(name))
        train(model, exact_update)
        found = {
            value.dtype
            for state in exact_update.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        }
        assert found == dtypes


def test_gradients_are_clipped_together() -> None:
    config = options("SGD", max_grad_norm=0.5)
    model, exact_update, masters = exact(config)
    with exact_update.accumulate(last=True, only=True):
        model(gradients(0)).backward()
    norms = exact_update.step()
    other = Small(values())
    other(gradients(0)).backward()
    norm = nn.utils.clip_grad_norm_(other.parameters(), 0.5)
    assert total_norm(norms).item() == pytest.approx(norm.item(), rel=1e-6)
    optimizer = build_optimizer(config, groups_of(other))
    optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(masters.value(parameter), getattr(other, name).data, rtol=1e-6, atol=0)


def test_fused_gradients_are_clipped_tensor_by_tensor() -> None:
    model, exact_update, masters = exact(options("SGD", max_grad_norm=0.5, fused_backward_pass=True), (1.0, 1.0))
    with exact_update.accumulate(last=True, only=True):
        model(gradients(0)).backward()
    norms = exact_update.step()
    whole = torch.stack([one.norm() for one in gradients(0).values()]).norm()
    assert total_norm(norms).item() == pytest.approx(whole.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        moved = (masters.value(parameter) - values()[name]).norm().item()
        assert moved == pytest.approx(min(0.5, gradients(0)[name].norm().item()), rel=1e-3), name


def test_fused_gradients_are_freed_as_soon_as_they_are_used() -> None:
    model, exact_update, _ = exact(options("AdamW", fused_backward_pass=True))
    alive: list[int] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(one.grad is not None for one in model.parameters()))
        )
    with exact_update.accumulate(last=True, only=True):
        model(gradients(0)).backward()
    assert alive == [0] * len(SHAPES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_update_without_master_weights_steps_as_the_optimizer_alone(dtype) -> None:
    more = {"exact_masters": False, "fused_backward_pass": True}
    config = options("AdamW", **more)
    one, other = (Small({name: value.to(dtype) for name, value in values().items()}) for _ in range(2))
    parameters = TrainedParameters(groups_of(one), MasterWeights())
    train(one, ExactUpdate(config, parameters, Accelerator(cpu=True)))
    optimizer = build_optimizer(config, groups_of(other))
    for step in range(5):
        other(gradients(10 * step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, getattr(other, name)) and parameter.dtype == dtype


def test_learning_rates_of_each_step_are_used() -> None:
    config = options("SGD")
    model, exact_update, masters = exact(config)
    set_lr(exact_update.optimizer, [1.0, 0.0])
    train(model, exact_update, steps=1)
    for name, parameter in model.named_parameters():
        expected = values()[name] - (gradients(0)[name] if name in ("matrix", "norm", "scale") else 0)
        torch.testing.assert_close(masters.value(parameter), expected, rtol=1e-6, atol=1e-7)
