"""Training states: every optimizer goes on bit for bit, names and removals are golden, nothing damaged is trusted."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from sdxl_finetune.config import Config
from sdxl_finetune.errors import UserError
from sdxl_finetune.model.initial import TINY, build_initial
from sdxl_finetune.optim.optimizer import CLASSES, build_optimizer
from sdxl_finetune.optim.parameters import Group
from sdxl_finetune.training.state import (
    ABOUT,
    MANIFEST,
    OPTIMIZER,
    WEIGHTS,
    final_state,
    interrupted_states,
    load_optimizer,
    read_state,
    save_state,
    states_due,
)

KEYS = "checkpoint_keys.json.gz"
NEEDS_CUDA = ("Paged", "AdEMAMix8bit")


@pytest.fixture(scope="module")
def tiny():
    return build_initial(TINY, seed=0)


def groups_of(seed: int, dtype: torch.dtype) -> list[Group]:
    """Two parts of one rate; one parameter is large enough for 8-bit states, one is never given a gradient."""
    torch.manual_seed(seed)
    sizes = {"a": (96, 64), "b": (7,), "idle": (3,)}
    parts = [{name: nn.Parameter(torch.randn(size, dtype=dtype)) for name, size in sizes.items()} for _ in range(2)]
    return [Group("unet", parts[0], 1e-2), Group("text_encoder1", parts[1], 1e-2)]


def advance(optimizer: torch.optim.Optimizer, groups: list[Group], steps: range) -> None:
    for step in steps:
        torch.manual_seed(100 + step)
        for group in groups:
            for name, parameter in group.parameters.items():
                if name != "idle":
                    parameter.grad = torch.randn_like(parameter)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in CLASSES if not name.startswith("Paged")])
def test_every_optimizer_goes_on_bit_for_bit(tiny, tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    config = Config(optimizer_type=name, learning_rate=1e-2)
    groups = groups_of(0, dtype)
    try:
        optimizer = build_optimizer(config, groups)
        advance(optimizer, groups, range(1))
    except UserError as error:
        pytest.skip(str(error))
    except (RuntimeError, ValueError, NotImplementedError) as error:
        pytest.skip(f"{name} does not run here in {dtype}: {error}")
    advance(optimizer, groups, range(1, 4))
    save_state(tmp_path / "s", *tiny, optimizer, groups, average=None, scaler=None, about={})
    resumed = groups_of(0, dtype)
    for old, new in zip(groups, resumed, strict=True):
        for key, parameter in new.parameters.items():
            parameter.data.copy_(old.parameters[key])
    again = build_optimizer(config, resumed)
    scaler, unknown = load_optimizer(tmp_path / "s", again, resumed, changed=frozenset())
    assert scaler is None
    assert all(one.endswith(".idle") for one in unknown)
    advance(optimizer, groups, range(4, 8))
    advance(again, resumed, range(4, 8))
    for old, new in zip(groups, resumed, strict=True):
        for key, parameter in new.parameters.items():
            assert torch.equal(parameter, old.parameters[key]), key


def save(tiny, path: Path, **about) -> Path:
    groups = groups_of(0, torch.float32)
    optimizer = build_optimizer(Config(optimizer_type="AdamW"), groups)
    advance(optimizer, groups, range(2))
    save_state(path, *tiny, optimizer, groups, average=None, scaler={"scale": 512.0}, about=about)
    return path


def test_a_state_is_read_only_if_it_agrees_with_its_manifest(tiny, tmp_path: Path) -> None:
    state = save(tiny, tmp_path / "s", step=7)
    assert read_state(state)["step"] == 7
    for name in (WEIGHTS, OPTIMIZER, ABOUT):
        content = (state / name).read_bytes()
        for damaged in (content[:-1], content[:20] + bytes([content[20] ^ 4]) + content[21:]):
            (state / name).write_bytes(damaged)
            with pytest.raises(UserError, match=f"damaged: {name}"):
                read_state(state)
        (state / name).unlink()
        with pytest.raises(UserError, match=f"{name} is missing"):
            read_state(state)
        (state / name).write_bytes(content)
    assert read_state(state)["step"] == 7
    (state / MANIFEST).write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        read_state(state)


def test_parameters_of_which_the_state_knows_nothing_begin_anew(tiny, tmp_path: Path) -> None:
    state = save(tiny, tmp_path / "s")
    groups = groups_of(1, torch.float32)
    groups[0].parameters["more"] = nn.Parameter(torch.zeros(2))
    optimizer = build_optimizer(Config(optimizer_type="AdamW", optimizer_args=["weight_decay=0.5"]), groups)
    scaler, unknown = load_optimizer(state, optimizer, groups, changed=frozenset({"weight_decay"}))
    assert scaler == {"scale": 512.0}
    assert unknown == ["unet.idle", "unet.more", "text_encoder1.idle"]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.5]
    assert set(optimizer.state) == {groups[number].parameters[name] for number in (0, 1) for name in "ab"}


def test_what_a_group_knows_survives_block_lr(tiny, tmp_path: Path) -> None:
    """Groups then have other names, and the parameters the same."""
    pytest.importorskip("schedulefree")
    config, groups = Config(optimizer_type="AdamWScheduleFree"), groups_of(0, torch.float32)
    optimizer = build_optimizer(config, groups)
    advance(optimizer, groups, range(3))
    save_state(tmp_path / "s", *tiny, optimizer, groups, average=None, scaler=None, about={})
    blocks = [Group(f"block{number}", dict([one]), 1e-2) for number, one in enumerate(groups[0].parameters.items())]
    again = build_optimizer(config, [*blocks, groups[1]])
    load_optimizer(tmp_path / "s", again, [*blocks, groups[1]], changed=frozenset())
    assert [values["k"] for values in again.param_groups] == [3, 3, 3, 3]


def test_a_save_that_fails_leaves_nothing(tiny, tmp_path: Path) -> None:
    groups = groups_of(0, torch.float32)
    optimizer = build_optimizer(Config(optimizer_type="AdamW"), groups)
    with pytest.raises(TypeError):
        save_state(tmp_path / "s", *tiny, optimizer, groups, average=None, scaler=None, about={("no", "text"): 1})
    assert list(tmp_path.iterdir()) == []


def test_states_of_whole_runs_are_golden(golden) -> None:
    runs = [run for run in golden(KEYS)["save_runs"] if any("save_state" in option for option in run["cli"])]
    assert len(runs) == 6
    for run in runs:
        pairs = " ".join(run["cli"]).replace("--", "").split()
        flags = {name: True for name in pairs if name in ("save_state", "save_state_on_train_end")}
        counts = {pairs[at - 1]: int(value) for at, value in enumerate(pairs) if value.isdecimal()}
        config = Config(output_name="my_model", **flags, **counts)
        states: set[str] = set()
        for entry in run["log"]:
            last = final_state(config)
            if entry.get("at_train_end"):
                due = [last] if last else []
            elif run["mode"] == "epochs":
                epoch = entry["end_of_epoch_index"] + 1
                due = states_due(config, epoch=epoch, step=10 * epoch, epochs=run["num_train_epochs"])
            else:
                due = states_due(config, epoch=None, step=entry["global_step"], epochs=run["num_train_epochs"])
            for one in due:
                states = (states | {one.name}) - {one.replaces or ""}
            assert sorted(states) == [name for name in entry["files"] if name.endswith("-state")], run["cli"]


def test_states_of_interruptions_are_known(tmp_path: Path) -> None:
    for name, about in {
        "m-step00000004-state": {"interrupted": True, "step": 4},
        "m-step00000009-state": {"interrupted": True, "step": 9},
        "m-step00000006-state": {"interrupted": False, "step": 6},
        "other-step00000004-state": {"interrupted": True, "step": 4},
        "m-000001-state": None,
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / ABOUT).write_text("{" if about is None else json.dumps(about))
    config = Config(output_name="m", output_dir=tmp_path)
    assert [path.name for path in interrupted_states(config, before=9)] == ["m-step00000004-state"]
