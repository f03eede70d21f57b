"""Every learning rate is the reference's, step by step. Options that the reference refuses are refused."""

import ast
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers.optimization import get_wsd_schedule

from sdxl_finetune.config import Config
from sdxl_finetune.config.fields import LR_SCHEDULES, expected
from sdxl_finetune.config.rules import find_remarks, schedule_problems
from sdxl_finetune.errors import UserError
from sdxl_finetune.optim.lr import build_lr, steps_of, used_rates
from sdxl_finetune.optim.optimizer import build_optimizer
from sdxl_finetune.optim.parameters import Group

CASES = 92
BASE = 3e-5
ADAFACTOR, ADAFACTOR_WITH_ANOTHER_OPTIMIZER = 82, 83
INTEGER_WARMUP_ON_TWO_PROCESSES = (63, 65, 67, 68)
WITHOUT_WARMUP = "does not require `num_warmup_steps`"
SCHEMA = "must be one of constant, .*adafactor:RATE"
REMEDIES = {
    "cosine_with_min_lr": "lr_scheduler_min_lr_ratio",
    "piecewise_constant": "1:100",
    "cosine_with_restarts": "remove num_cycles; cycles, power and lowest rate are options of their own",
    "reduce_lr_on_plateau": SCHEMA,
    "nonsense": SCHEMA,
    "adafactor": 'optimizer_type = "Adafactor"',
    "adafactor:3e-05": 'optimizer_type = "Adafactor"',
    "cosine_warmup_with_min_lr": SCHEMA,
}


def config(**options) -> Config:
    return Config.model_construct(**{"learning_rate": BASE, **options})


def golden_config(case: dict, number: int) -> Config:
    """The options of a golden case: as parsed, and the arguments of its command line."""
    options = {**case["parsed"], "lr_scheduler": case["lr_scheduler"]}
    words = iter(case["cli"])
    for word in words:
        if word == "--lr_scheduler_type":
            options["lr_scheduler_type"] = next(words)
        elif word == "--lr_scheduler_args":
            pairs = (pair.partition("=") for pair in words)
            options["lr_scheduler_args"] = {key: ast.literal_eval(value) for key, _, value in pairs}
    for key, value in case.get("set_after_parsing", {}).items():
        options[key] = ast.literal_eval(value)
    if number == ADAFACTOR:
        options["optimizer_type"] = "Adafactor"
    return config(**options)


def refusals(options: Config) -> list[str]:
    """The messages of the schema and the rules against the options of the learning-rate schedule."""
    try:
        Config(lr_scheduler=options.lr_scheduler)
    except ValidationError:
        return ["must be " + expected(Config.model_fields["lr_scheduler"])]
    return [message for _, message in schedule_problems(options)]


@pytest.mark.parametrize("number", range(CASES))
def test_golden_learning_rates_are_the_reference_s(golden, number: int) -> None:
    data = golden("lr.json.gz")
    assert len(data["cases"]) == CASES
    case, (first_base, second_base, third_base) = data["cases"][number], data["group_base_lrs"]
    assert first_base == BASE
    assert second_base == third_base
    options, total, processes = golden_config(case, number), case["max_train_steps"], case["num_processes"]
    messages = refusals(options)
    if "raised" in case and options.lr_warmup_steps and WITHOUT_WARMUP in case["raised"][1]:
        # docs/differences.md: a remark says that the warm-up has no effect.
        assert not messages and "lr_warmup_steps" in [name for name, _ in find_remarks(options)]
        lr = build_lr(options, total)
        assert options.lr_scheduler_type or [lr(step, BASE) for step in range(total)] == [BASE] * total
        return
    if "raised" in case:
        assert re.search(REMEDIES[case["lr_scheduler"]], "\n".join(messages))
        return
    assert not messages
    lr = build_lr(options, total)
    # accelerate steps the reference's scheduler once for each process, so ours has every second of its rates.
    first, second = case["group0_lr"][::processes], case.get("group1_and_2_lr", [])[::processes]
    if number in INTEGER_WARMUP_ON_TWO_PROCESSES:
        # docs/differences.md: a warm-up in steps is in optimizer steps on any number of processes. The
        # reference's of 20 is over after 10 of them.
        assert first[10] == max(first)
        options = options.model_copy(update={"lr_warmup_steps": 10})
        assert lr(10, BASE) == pytest.approx(BASE / 2)
        assert lr(20, BASE) == BASE
        lr = build_lr(options, total)
    if number == ADAFACTOR:
        # The reference shows the rate of the step before, times the size of one tensor. Its tensor holds ones, and
        # loses 1 % in each step.
        for step, shown in enumerate(first[1:]):
            assert lr(step, first_base) * 0.99**step == pytest.approx(shown, rel=1e-5), step
        return
    for step, (one, other) in enumerate(zip(first, second, strict=True)):
        assert lr(step, first_base) == pytest.approx(one, rel=1e-9, abs=1e-19), step
        assert lr(step, second_base) == pytest.approx(other, rel=1e-9, abs=1e-19), step


NAMES = sorted(set(LR_SCHEDULES) - {"piecewise_constant"})


@given(
    name=st.sampled_from(NAMES),
    total=st.integers(1, 500),
    warmup=st.one_of(st.integers(0, 300), st.floats(0, 1)),
    decay=st.integers(0, 100),
    cycles=st.integers(1, 5),
    step=st.integers(0, 600),
)
def test_rates_are_proportional_finite_and_within_bounds(name, total, warmup, decay, cycles, step) -> None:
    lr = build_lr(
        config(
            lr_scheduler=name,
            lr_warmup_steps=0 if name == "constant" else warmup,
            lr_decay_steps=decay,
            lr_scheduler_num_cycles=cycles,
            lr_scheduler_min_lr_ratio=0.1,
        ),
        total,
    )
    rate = lr(step, BASE)
    assert math.isfinite(rate)
    assert 0 <= rate <= BASE * (1 + 1e-12)
    assert lr(step, 7 * BASE) == pytest.approx(7 * rate)
    assert lr(step, BASE) == rate


@pytest.mark.parametrize("warmup_type", ["linear", "cosine", "1-sqrt"])
@pytest.mark.parametrize("decay_type", ["linear", "cosine", "1-sqrt"])
def test_shapes_of_warmup_stable_decay_are_those_of_transformers(warmup_type, decay_type) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=BASE)
    shapes = {"warmup_type": warmup_type, "decay_type": decay_type}
    theirs = get_wsd_schedule(optimizer, 10, 20, num_training_steps=50, min_lr_ratio=0.2, **shapes)
    ours = build_lr(
        config(
            lr_scheduler="warmup_stable_decay",
            lr_warmup_steps=10,
            lr_decay_steps=20,
            lr_scheduler_min_lr_ratio=0.2,
            lr_scheduler_args=shapes,
        ),
        50,
    )
    for step in range(60):
        assert ours(step, BASE) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_the_lowest_learning_rate_may_be_given_as_an_argument() -> None:
    lowest = {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_args": {"min_lr": 3e-6}}
    assert build_lr(config(**lowest), 100)(100, BASE) == pytest.approx(3e-6)
    end = {"lr_scheduler": "polynomial", "lr_scheduler_args": {"lr_end": 3e-6}}
    assert build_lr(config(**end), 100)(100, BASE) == pytest.approx(3e-6)
    assert build_lr(config(**end), 100)(50, BASE) == pytest.approx(1.65e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_scheduler": "piecewise_constant", "lr_scheduler_args": {"step_rules": "1:ten,0.1"}}, "1:100"),
        ({"lr_scheduler": "piecewise_constant", "lr_scheduler_args": {"step_rules": "1:10,0.5:20"}}, "1:100"),
        ({"lr_scheduler": "piecewise_constant", "lr_scheduler_args": {"step_rules": 0.1}}, "1:100"),
        ({"lr_scheduler": "polynomial", "learning_rate": 1e-8}, "must be higher"),
        ({"lr_scheduler": "polynomial", "lr_scheduler_args": {"lr_end": "low"}}, "must be numbers"),
        ({"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_args": {"min_lr": 1.0}}, "must be higher"),
        (
            {
                "lr_scheduler": "cosine_with_min_lr",
                "lr_scheduler_args": {"min_lr": 0.0},
                "learning_rate": 0.0,
            },
            "must be higher",
        ),
        ({"lr_scheduler": "warmup_stable_decay", "lr_scheduler_args": {"decay_type": "log"}}, "1-sqrt"),
        ({"lr_scheduler": "linear", "lr_scheduler_args": {"last_epoch": 5}}, "linear takes no arguments"),
        ({"lr_scheduler": "cosine:3"}, SCHEMA),
        ({"lr_scheduler": "adafactor:...", "optimizer_type": "adafactor"}, SCHEMA),
        ({"lr_scheduler": "adafactor:inf", "optimizer_type": "adafactor"}, SCHEMA),
    ],
)
def test_options_that_contradict_the_schedule_are_refused(options, message) -> None:
    assert re.search(message, "\n".join(refusals(config(**options))))


def test_a_schedule_free_optimizer_has_a_constant_rate_and_accepts_any_schedule() -> None:
    options = config(optimizer_type="AdamWScheduleFree", lr_scheduler="cosine_with_min_lr", lr_warmup_steps=5)
    assert not refusals(options)
    assert {build_lr(options, 100)(step, BASE) for step in range(100)} == {BASE}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_scheduler_type": "NoSuchLR"}, "no such class"),
        ({"lr_scheduler_type": "no.such.module.LR"}, "no such class"),
        ({"lr_scheduler_type": "math.sin"}, "not a scheduler"),
        ({"lr_scheduler_type": "StepLR"}, "step_size"),
        ({"lr_scheduler_type": "ReduceLROnPlateau"}, "metrics"),
        (
            {"lr_scheduler_type": "CyclicLR", "lr_scheduler_args": {"base_lr": 1e-6, "max_lr": 1e-4}},
            "cycle_momentum",
        ),
        (
            {
                "lr_scheduler_type": "OneCycleLR",
                "lr_scheduler_args": {"max_lr": 1e-4, "total_steps": 20, "cycle_momentum": False},
            },
            "20",
        ),
    ],
)
def test_scheduler_classes_that_do_not_work_are_refused(options, message) -> None:
    with pytest.raises(UserError, match=message):
        build_lr(config(**options), 100)


def test_a_scheduler_class_gives_the_same_rates_in_any_order_of_steps() -> None:
    options = config(lr_scheduler_type="StepLR", lr_scheduler_args={"step_size": 10, "gamma": 0.5})
    forwards, anyhow = build_lr(options, 40), build_lr(options, 40)
    expected = {step: forwards(step, BASE) for step in range(40)}
    for step in (39, 0, 25, 25, 10, 9, 30):
        assert anyhow(step, BASE) == expected[step]
        assert anyhow(step, 1e-6) == pytest.approx(expected[step] / 30)


def test_restarts_have_a_floor_and_a_decay() -> None:
    options = {"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 3, "lr_scheduler_min_lr_ratio": 0.2}
    lr = build_lr(config(**options, lr_scheduler_cycle_decay=0.5), 300)
    rates = [lr(step, 1.0) for step in range(301)]
    assert [rates[step] for step in (0, 100, 200, 300)] == pytest.approx([1.0, 0.5, 0.25, 0.2])
    assert rates[50] == pytest.approx(0.6) and rates[150] == pytest.approx(0.35) and min(rates) == 0.2
    even = build_lr(config(**options), 300)
    assert [even(step, 1.0) for step in (0, 50, 100, 299)] == pytest.approx([1.0, 0.6, 1.0, 0.2], abs=1e-3)
    floored = build_lr(config(**options, lr_scheduler_cycle_decay=0.1), 300)
    assert {floored(step, 1.0) for step in range(200, 300)} == {0.2}, "a cycle is never below the floor"


@pytest.mark.parametrize("arguments", [[], ["warmup_init=True"], ["scale_parameter=False"]])
def test_the_rates_of_adafactor_are_those_that_it_uses(arguments: list[str]) -> None:
    """Without scale_parameter, a weight of constant gradient moves by the rate."""
    asked = Config(optimizer_type="Adafactor", optimizer_args=arguments, learning_rate=1e-12)
    weight = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = build_optimizer(asked, [Group("unet", {"weight": weight}, 1e-12)])
    lr = build_lr(asked, 100)
    for step in range(5):
        before = weight.detach().clone()
        weight.grad = torch.full_like(weight, 0.1)
        optimizer.step()
        used = used_rates(optimizer, {"unet": 1e-12})
        assert used == {"unet": lr(step, 1e-12)}
        scale = 1.0 if "scale_parameter=False" in arguments else before.square().mean().sqrt().item()
        assert (before - weight).mean().item() == pytest.approx(used["unet"] * scale, rel=0.05)
    assert lr(100_000, 1.0) == pytest.approx(1 / math.sqrt(100_001))


def test_given_rates_move_weights_as_much_as_they_say() -> None:
    """The measurement of docs/differences.md: relative steps move weights by 1 %, rates of 1e-5 by 1e-5."""
    for arguments, moved in ([], 0.01), (["relative_step=False", "scale_parameter=False"], 1e-5):
        weight = torch.nn.Parameter(torch.ones(4, 4))
        asked = Config(optimizer_type="Adafactor", optimizer_args=arguments, learning_rate=1e-5)
        optimizer = build_optimizer(asked, [Group("unet", {"weight": weight}, 1e-5)])
        weight.grad = torch.full_like(weight, 0.1)
        optimizer.step()
        assert (1 - weight).mean().item() == pytest.approx(moved, rel=1e-2)
        assert used_rates(optimizer, {"unet": 1e-5})["unet"] == pytest.approx(moved)


def test_prodigy_s_estimate_times_the_rate_is_logged() -> None:
    groups = [Group(name, {name: torch.nn.Parameter(torch.ones(4))}, 1.0) for name in ("unet", "text_encoder1")]
    optimizer = build_optimizer(Config(optimizer_type="Prodigy", learning_rate=1.0), groups)
    for _ in range(5):
        for group in groups:
            for parameter in group.parameters.values():
                parameter.grad = torch.full_like(parameter, 0.1)
        optimizer.step()
    used = used_rates(optimizer, {"unet": 1.0, "text_encoder1": 1.0})
    assert used["unet"] == 1.0 and used["d*lr/unet"] == optimizer.param_groups[0]["d"] > 1e-6
    assert used.keys() == {"unet", "text_encoder1", "d*lr/unet", "d*lr/text_encoder1"}
    other = build_optimizer(Config(optimizer_type="torch.optim.Adafactor"), groups)
    assert used_rates(other, {"unet": 1.0, "text_encoder1": 1.0}) == {"unet": 1.0, "text_encoder1": 1.0}


def test_a_share_of_steps_is_rounded_down() -> None:
    assert steps_of(20, 200) == 20
    assert steps_of(0.1, 200) == 20
    assert steps_of(1.0, 200) == 200
    assert steps_of(0.0, 200) == 0
    assert steps_of(0.29, 100) == 28, "rounded down, as in the reference"
