"""Masters take the very steps of float32 training, whole or in pieces, at once or within the backward pass."""

import importlib.util

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import Parameter

from sdxl_finetune.config import Config
from sdxl_finetune.errors import UserError
from sdxl_finetune.low_bits import Masters, exact_value, split
from sdxl_finetune.optim import update
from sdxl_finetune.optim.optimizer import build_optimizer, set_lr
from sdxl_finetune.optim.parameters import Group
from sdxl_finetune.optim.stepping import Reach
from sdxl_finetune.optim.update import ExactUpdate, check_update, reach_of, total_norm

RATES = (3e-5, 1e-6)
SHAPES = {"matrix": (96, 200), "kernel": (40, 30, 3, 3), "norm": (77,), "long": (20_000,), "scale": (1,)}
REACHES = {
    "AdamW": Reach.ELEMENTS,
    "torch.optim.RAdam": Reach.ELEMENTS,
    "Adagrad": Reach.ELEMENTS,
    "SGDNesterov": Reach.ELEMENTS,
    "Lion": Reach.ELEMENTS,
    "AdamW8bit": Reach.ELEMENTS,
    "Lion8bit": Reach.ELEMENTS,
    "AdEMAMix8bit": Reach.ELEMENTS,
    "bitsandbytes.optim.AdamW32bit": Reach.ELEMENTS,
    "Adafactor": Reach.TENSOR,
    "Prodigy": Reach.ALL,
    "AdamWScheduleFree": Reach.ALL,
    "LBFGS": Reach.ALL,
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
    own = dict(model.named_parameters())
    halves = [{name: own[name] for name in names} for names in (("matrix", "norm", "scale"), ("kernel", "long"))]
    return [Group(name, half, rate) for name, half, rate in zip(("unet", "text_encoder1"), halves, rates, strict=True)]


def exact(config: Config, rates=RATES) -> tuple[Small, ExactUpdate, Masters]:
    parts = {name: split(one) for name, one in values().items()}
    model = Small({name: high for name, (high, _) in parts.items()})
    masters = {getattr(model, name): low for name, (_, low) in parts.items()}
    return model, ExactUpdate(config, groups_of(model, rates), masters, Accelerator(cpu=True)), masters


def options(name: str, **more) -> Config:
    given = {"optimizer_type": name, "full_bf16": True, "mixed_precision": "bf16", "learning_rate": RATES[0]}
    return Config(**given, **{"max_grad_norm": 0.0, **more})


def train(model: Small, step_with, micros: int = 1, steps: int = 5) -> None:
    for step in range(steps):
        for micro in range(micros):
            with step_with.gradients(last=micro + 1 == micros, alone=micros == 1):
                model(gradients(10 * step + micro)).backward()
        step_with.step(0.0)


def plain(config: Config, rates=RATES, steps: int = 5, micros: int = 1) -> tuple[Small, torch.optim.Optimizer]:
    """The same optimizer on float32 parameters, with the same gradients."""
    model = Small(values())
    optimizer = build_optimizer(config, groups_of(model, rates))
    for step in range(steps):
        for micro in range(micros):
            model(gradients(10 * step + micro)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def assert_same(model: Small, masters: Masters, expected: Small) -> None:
    for name, parameter in model.named_parameters():
        value = exact_value(parameter, masters)
        assert torch.equal(value, getattr(expected, name)), name
        assert torch.equal(parameter, split(value)[0]), name
        assert not torch.equal(value, values()[name]), name


def skip_if_missing(name: str) -> None:
    package = {"Prodigy": "prodigyopt", "AdamWScheduleFree": "schedulefree"}.get(name)
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


@pytest.mark.parametrize("name", REACHES)
def test_what_is_stepped_on_together_is_tried_out(name: str) -> None:
    skip_if_missing(name)
    assert reach_of(options(name), torch.device("cpu")) == REACHES[name]


def test_it_is_tried_out_where_only_text_encoders_are_trained() -> None:
    """At the U-Net's rate, 0, nothing would move."""
    config = options("Adafactor", optimizer_args=["relative_step=False"]).model_copy(update={"learning_rate": 0.0})
    assert reach_of(config, torch.device("cpu")) == Reach.TENSOR


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", [name for name in REACHES if name != "LBFGS"])
def test_masters_take_the_steps_of_float32(name: str, fused: bool, monkeypatch) -> None:
    """Pieces are small here, so that tensors are cut, and small ones go together."""
    skip_if_missing(name)
    monkeypatch.setattr(update, "PIECE", 4096)
    rates = (1.0, 1.0) if name == "Prodigy" else RATES  # of its own estimate
    config = options(name, fused_backward_pass=fused)
    if fused and REACHES[name] == Reach.ALL:
        with pytest.raises(UserError, match="steps on all tensors at once"):
            check_update(config, torch.device("cpu"))
        return
    model, stepping, masters = exact(config, rates)
    train(model, stepping)
    assert_same(model, masters, plain(config, rates)[0])
    kinds = {kept.dtype for kept in masters.values()}
    assert kinds == {torch.float32 if REACHES[name] == Reach.ALL else torch.int16}


@pytest.mark.parametrize(
    ("name", "argument"), [("AdamW", "foreach=True"), ("AdamW", "fused=True"), ("AdamW", "amsgrad=True")]
)
def test_variants_of_adamw(name: str, argument: str, monkeypatch) -> None:
    monkeypatch.setattr(update, "PIECE", 4096)
    config = options(name, optimizer_args=[argument])
    model, stepping, masters = exact(config)
    train(model, stepping)
    assert_same(model, masters, plain(config)[0])


def test_weights_for_use_are_shown_and_put_back() -> None:
    """Schedule-free optimizers hold them apart; what the model computes with follows."""
    skip_if_missing("AdamWScheduleFree")
    model, stepping, masters = exact(options("AdamWScheduleFree"))
    train(model, stepping)
    trained = {name: exact_value(one, masters).clone() for name, one in model.named_parameters()}
    with stepping.shown():
        for name, one in model.named_parameters():
            assert not torch.equal(exact_value(one, masters), trained[name])
            assert torch.equal(one, split(exact_value(one, masters))[0])
    for name, one in model.named_parameters():
        assert torch.equal(exact_value(one, masters), trained[name]), name
        assert torch.equal(one, split(exact_value(one, masters))[0])


@pytest.mark.parametrize("fused", [False, True])
def test_micro_batches_add_up_in_float32(fused: bool) -> None:
    config = options("AdamW", fused_backward_pass=fused)
    model, stepping, masters = exact(config)
    train(model, stepping, micros=3)
    assert_same(model, masters, plain(config, micros=3)[0])


def test_states_are_those_of_float32_in_size_and_kind() -> None:
    """8-bit where the optimizer quantises, else float32: no moments in bf16."""
    for name, dtypes in (("AdamW", {torch.float32}), ("AdamW8bit", {torch.float32, torch.uint8})):
        model, stepping, _ = exact(options(name))
        train(model, stepping)
        found = {
            value.dtype
            for state in stepping.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        }
        assert found == dtypes


def test_clipping_is_of_all_gradients_together() -> None:
    config = options("SGD", max_grad_norm=0.5)
    model, stepping, masters = exact(config)
    with stepping.gradients(last=True, alone=True):
        model(gradients(0)).backward()
    norms = stepping.step(0.5)
    other = Small(values())
    other(gradients(0)).backward()
    norm = nn.utils.clip_grad_norm_(other.parameters(), 0.5)
    assert total_norm(norms).item() == pytest.approx(norm.item(), rel=1e-6)
    optimizer = build_optimizer(config, groups_of(other))
    optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(exact_value(parameter, masters), getattr(other, name).data, rtol=1e-6, atol=0)


def test_fused_clipping_is_of_each_tensor() -> None:
    model, stepping, masters = exact(options("SGD", max_grad_norm=0.5, fused_backward_pass=True), (1.0, 1.0))
    with stepping.gradients(last=True, alone=True):
        model(gradients(0)).backward()
    norms = stepping.step(0.5)
    whole = torch.stack([one.norm() for one in gradients(0).values()]).norm()
    assert total_norm(norms).item() == pytest.approx(whole.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        moved = (exact_value(parameter, masters) - values()[name]).norm().item()
        assert moved == pytest.approx(min(0.5, gradients(0)[name].norm().item()), rel=1e-3), name


def test_fused_gradients_are_gone_as_soon_as_they_are_used() -> None:
    model, stepping, _ = exact(options("AdamW", fused_backward_pass=True))
    alive: list[int] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(one.grad is not None for one in model.parameters()))
        )
    with stepping.gradients(last=True, alone=True):
        model(gradients(0)).backward()
    assert alive == [0] * len(SHAPES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_without_masters_steps_as_the_optimizer_alone(dtype) -> None:
    more = {"exact_masters": False, "fused_backward_pass": True}
    config = options("AdamW", **more)
    one, other = (Small({name: value.to(dtype) for name, value in values().items()}) for _ in range(2))
    stepping = ExactUpdate(config, groups_of(one), {}, Accelerator(cpu=True))
    train(one, stepping)
    optimizer = build_optimizer(config, groups_of(other))
    for step in range(5):
        other(gradients(10 * step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, getattr(other, name)) and parameter.dtype == dtype


def test_learning_rates_of_each_step_are_used() -> None:
    config = options("SGD")
    model, stepping, masters = exact(config)
    set_lr(stepping.optimizer, [1.0, 0.0])
    train(model, stepping, steps=1)
    for name, parameter in model.named_parameters():
        expected = values()[name] - (gradients(0)[name] if name in ("matrix", "norm", "scale") else 0)
        torch.testing.assert_close(exact_value(parameter, masters), expected, rtol=1e-6, atol=1e-7)
