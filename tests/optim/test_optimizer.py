"""Each optimizer name builds the reference's optimizer (golden optimizer.json), or a clear error."""

import importlib.util
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter

from sdxl_finetune.config import Config
from sdxl_finetune.errors import UserError
from sdxl_finetune.optim.optimizer import averaged_weights, build_optimizer, optimizer_class, set_lr, trial_optimizer
from sdxl_finetune.optim.parameters import Group

RATES = (3e-5, 1e-6, 1e-6)
FLAGS = {"--use_8bit_adam": "use_8bit_adam", "--use_lion_optimizer": "use_lion_optimizer"}
INSTALLED = ("torch", "transformers", "bitsandbytes", "lion_pytorch")


def build(config: Config, rates=RATES, value: float = 1.0):
    names = ("unet", "text_encoder1", "text_encoder2")
    groups = [
        Group(name, {name: Parameter(torch.full((64, 64), value))}, rate)
        for name, rate in zip(names, rates, strict=False)
    ]
    return groups, build_optimizer(config, groups)


def config_of(case) -> Config:
    cli = case["cli"]
    options = {FLAGS[flag]: True for flag in cli if flag in FLAGS}
    if "--learning_rate" in cli:
        options["learning_rate"] = float(cli[cli.index("--learning_rate") + 1])
    return Config(optimizer_type=case["optimizer_type"] or "", optimizer_args=list(case["optimizer_args"]), **options)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_optimizers_and_their_first_step_are_the_reference_s(golden) -> None:
    compared = 0
    for case in golden("optimizer.json")["cases"]:
        name = case.get("returned_name")
        one_string = isinstance(case["optimizer_args"], str)
        fused = "--fused_backward_pass" in case["cli"]
        if name is None or one_string or fused or case["one_step_ok"] is not True or "set_after_parsing" in case:
            continue
        if len(case["param_groups"]) != len(RATES):
            continue  # a bare list of parameters, which we never build
        package = name.partition(".")[0]
        if importlib.util.find_spec(package) is None:
            assert package not in INSTALLED
            with pytest.raises(UserError, match=f"pip install {package}"):
                optimizer_class(case["optimizer_type"])
            continue
        rates = (1.0, 1.0, 1.0) if "--learning_rate" in case["cli"] else RATES
        groups, optimizer = build(config_of(case), rates)
        kind = type(optimizer)
        assert f"{kind.__module__}.{kind.__name__}" == name, case["optimizer_type"]
        for group, expected in zip(optimizer.param_groups, case["param_groups"], strict=True):
            for key, value in expected.items():
                actual = group[key]
                assert actual == (tuple(value) if isinstance(actual, tuple) else value), (name, key)
        for group in groups:
            for parameter in group.parameters.values():
                parameter.grad = torch.full_like(parameter, 0.1)
        optimizer.step()
        values = [next(iter(group.parameters.values()))[0, 0].item() for group in groups]
        for value, expected in zip(values, case["param_after_one_step_grad_0.1"], strict=True):
            assert math.isclose(value, expected, abs_tol=2e-7), (case["optimizer_type"], case["optimizer_args"])
        compared += 1
    assert compared >= 45


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer_type": "adam8bits"}, "did you mean AdamW8bit|did you mean Adam8bit"),
        ({"optimizer_type": "adamw8"}, "did you mean AdamW8bit"),
        ({"optimizer_type": "AdamX"}, "did you mean Adam"),
        ({"optimizer_type": "no.such.Class"}, "pip install no"),
        ({"optimizer_type": "prodigyplus.ProdigyPlusScheduleFree"}, "pip install prodigy-plus-schedule-free"),
        ({"optimizer_type": "torch.nn.Linear"}, "not a torch optimizer"),
        ({"optimizer_args": ["nonsense=1"]}, "no such argument: it takes betas"),
        ({"optimizer_args": ["lr=1e-3"]}, "set the learning rate with learning_rate"),
        ({"optimizer_args": ["betas=2.0,0.9"]}, "AdamW refuses these arguments"),
        ({"optimizer_args": ["weight_decay='x'"]}, "AdamW refuses these arguments"),
    ],
)
def test_mistakes_are_reported(options, message) -> None:
    with pytest.raises(UserError, match=message):
        build(Config(**options))


@pytest.mark.parametrize("name", ["Lion", "AdamW", "Prodigy"])
def test_a_learning_rate_of_0_freezes_the_unet_with_any_optimizer(name: str) -> None:
    """Some optimizers refuse a default rate of 0, although no group has this rate."""
    _, optimizer = build(Config(optimizer_type=name, learning_rate=0.0), (1e-6, 1e-6))
    assert [group["lr"] for group in optimizer.param_groups] == [1e-6, 1e-6]
    trial = trial_optimizer(Config(optimizer_type=name, learning_rate=0.0), [Parameter(torch.ones(2))])
    assert trial.param_groups[0]["lr"] > 0


def test_learning_rates_reach_the_groups() -> None:
    _, optimizer = build(Config())
    set_lr(optimizer, [1.0, 2.0, 3.0])
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 2.0, 3.0]


def test_learning_rates_that_are_tensors_stay_tensors() -> None:
    _, optimizer = build(Config())
    tensors = [torch.zeros(()) for _ in optimizer.param_groups]
    for group, tensor in zip(optimizer.param_groups, tensors, strict=True):
        group["lr"] = tensor
    set_lr(optimizer, [1.0, 2.0, 3.0])
    assert [tensor.item() for tensor in tensors] == [1.0, 2.0, 3.0]
    assert all(group["lr"] is tensor for group, tensor in zip(optimizer.param_groups, tensors, strict=True))


def test_adafactor_has_no_learning_rate_unless_relative_step_is_off() -> None:
    _, own = build(Config(optimizer_type="Adafactor"))
    set_lr(own, RATES)
    assert [group["lr"] for group in own.param_groups] == [None, None, None]
    _, given = build(Config(optimizer_type="adafactor", optimizer_args=["relative_step=False"]))
    set_lr(given, RATES)
    assert [group["lr"] for group in given.param_groups] == list(RATES)


def test_averaged_weights_changes_nothing_for_a_plain_optimizer() -> None:
    groups, optimizer = build(Config())
    before = [parameter.clone() for group in groups for parameter in group.parameters.values()]
    with averaged_weights(optimizer):
        after = [parameter for group in groups for parameter in group.parameters.values()]
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("name", "waits"), [("AdamW8bit", False), ("Lion8bit", False), ("PagedAdamW8bit", True), ("AdEMAMix8bit", False)]
)
def test_bitsandbytes_waits_for_the_device_only_if_its_states_are_paged(name: str, waits: bool, monkeypatch) -> None:
    from bitsandbytes.optim import optimizer as library

    monkeypatch.setattr(library, "sync_gpu", library.sync_gpu)  # the test leaves the library as it was
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(name))
    build(Config(optimizer_type=name))
    with FakeTensorMode():
        library.sync_gpu(torch.empty(1, device="cuda"))
    assert bool(waited) == waits
