"""Training states: every optimizer goes on bit for bit, names and removals are golden, nothing damaged is trusted."""

import hashlib
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from sdxl_finetune.config import Config
from sdxl_finetune.errors import UserError
from sdxl_finetune.model.random_model import TINY, build_random_model
from sdxl_finetune.model.save import single_file_tensors
from sdxl_finetune.optim.optimizer import CLASSES, build_optimizer
from sdxl_finetune.optim.parameters import Group
from sdxl_finetune.training.optimizer_state import collect_optimizer_state, restore_optimizer_state
from sdxl_finetune.training.state import (
    FORMAT,
    MANIFEST,
    OPTIMIZER,
    STATE,
    WEIGHTS,
    TrainingState,
    interrupted_states,
    load_state,
    save_state,
)

NEEDS_CUDA = ("Paged", "AdEMAMix8bit")


@pytest.fixture(scope="module")
def tiny():
    return build_random_model(TINY, seed=0)


def groups_of(seed: int, dtype: torch.dtype) -> list[Group]:
    """Two parts of one rate; one parameter is large enough for 8-bit states, one is never given a gradient."""
    torch.manual_seed(seed)
    sizes = {"a": (96, 64), "b": (7,), "idle": (3,)}
    parts = [{name: nn.Parameter(torch.randn(size, dtype=dtype)) for name, size in sizes.items()} for _ in range(2)]
    return [Group("unet", parts[0], 1e-2), Group("text_encoder1", parts[1], 1e-2)]


def write(path: Path, tiny, optimizer: torch.optim.Optimizer, groups: list[Group], scaler=None, **values) -> None:
    state = TrainingState(**{"step": 0, "epoch": 0, **values})
    tensors = single_file_tensors(*tiny, None, exact=True)
    save_state(path, state, tensors, collect_optimizer_state(optimizer, groups, ema=None, scaler=scaler))


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
    if CLASSES[name].startswith("dadaptation.") and importlib.util.find_spec("dadaptation") is None:
        with pytest.raises(UserError, match="pip install dadaptation"):
            build_optimizer(config, groups)
        return
    optimizer = build_optimizer(config, groups)
    advance(optimizer, groups, range(4))
    write(tmp_path / "s", tiny, optimizer, groups)
    resumed = groups_of(0, dtype)
    for old, new in zip(groups, resumed, strict=True):
        for key, parameter in new.parameters.items():
            parameter.data.copy_(old.parameters[key])
    again = build_optimizer(config, resumed)
    scaler, unknown = restore_optimizer_state(tmp_path / "s" / OPTIMIZER, again, resumed, changed=frozenset())
    assert scaler is None
    assert all(one.endswith(".idle") for one in unknown)
    advance(optimizer, groups, range(4, 8))
    advance(again, resumed, range(4, 8))
    for old, new in zip(groups, resumed, strict=True):
        for key, parameter in new.parameters.items():
            assert torch.equal(parameter, old.parameters[key]), key


def save(tiny, path: Path, **values) -> Path:
    groups = groups_of(0, torch.float32)
    optimizer = build_optimizer(Config(optimizer_type="AdamW"), groups)
    advance(optimizer, groups, range(2))
    write(path, tiny, optimizer, groups, scaler={"scale": 512.0}, **values)
    return path


def test_a_state_is_read_only_if_it_agrees_with_its_manifest(tiny, tmp_path: Path) -> None:
    state = save(tiny, tmp_path / "s", step=7)
    assert load_state(state).step == 7
    for name in (WEIGHTS, OPTIMIZER, STATE):
        content = (state / name).read_bytes()
        for damaged in (content[:-1], content[:20] + bytes([content[20] ^ 4]) + content[21:]):
            (state / name).write_bytes(damaged)
            with pytest.raises(UserError, match=f"damaged: {name}"):
                load_state(state)
        (state / name).unlink()
        with pytest.raises(UserError, match=f"{name} is missing"):
            load_state(state)
        (state / name).write_bytes(content)
    assert load_state(state).step == 7
    (state / MANIFEST).write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        load_state(state)


def test_parameters_of_which_the_state_knows_nothing_begin_anew(tiny, tmp_path: Path) -> None:
    state = save(tiny, tmp_path / "s")
    groups = groups_of(1, torch.float32)
    groups[0].parameters["more"] = nn.Parameter(torch.zeros(2))
    optimizer = build_optimizer(Config(optimizer_type="AdamW", optimizer_args=["weight_decay=0.5"]), groups)
    scaler, unknown = restore_optimizer_state(state / OPTIMIZER, optimizer, groups, changed=frozenset({"weight_decay"}))
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
    write(tmp_path / "s", tiny, optimizer, groups)
    blocks = [Group(f"block{number}", dict([one]), 1e-2) for number, one in enumerate(groups[0].parameters.items())]
    again = build_optimizer(config, [*blocks, groups[1]])
    restore_optimizer_state(tmp_path / "s" / OPTIMIZER, again, [*blocks, groups[1]], changed=frozenset())
    assert [values["k"] for values in again.param_groups] == [3, 3, 3, 3]


def test_a_save_that_fails_leaves_nothing(tiny, tmp_path: Path) -> None:
    groups = groups_of(0, torch.float32)
    optimizer = build_optimizer(Config(optimizer_type="AdamW"), groups)
    with pytest.raises(TypeError):
        write(tmp_path / "s", tiny, optimizer, groups, config={("no", "text"): 1})
    assert list(tmp_path.iterdir()) == []


def test_states_of_interruptions_are_known(tmp_path: Path) -> None:
    for name, values in {
        "m-step00000004-state": {"is_interrupted": True, "step": 4},
        "m-step00000009-state": {"is_interrupted": True, "step": 9},
        "m-step00000006-state": {"is_interrupted": False, "step": 6},
        "other-step00000004-state": {"is_interrupted": True, "step": 4},
        "m-000001-state": None,
    }.items():
        (tmp_path / name).mkdir()
        text = "{" if values is None else json.dumps(TrainingState(epoch=0, **values).to_json())
        (tmp_path / name / STATE).write_text(text)
    config = Config(output_name="m", output_dir=tmp_path)
    assert [path.name for path in interrupted_states(config, before=9)] == ["m-step00000004-state"]


def test_a_training_state_survives_json() -> None:
    state = TrainingState(
        step=7,
        epoch=2,
        steps_into_epoch=1,
        seed=3,
        origin=(4, 1),
        data_order={"images": 5},
        log="20260102030405",
        checkpoint_format="diffusers",
        optimizer="AdamW",
        config={"learning_rate": 1e-5},
        is_interrupted=True,
        saved_at=12.5,
    )
    assert TrainingState.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_a_checkpoint_carries_the_position_of_its_state() -> None:
    state = TrainingState(step=7, epoch=2, steps_into_epoch=1, seed=3, origin=(4, 1), data_order={"a": 1}, log="l")
    read = TrainingState.from_metadata(step=7, epoch=2, seed=3, position=state.to_metadata(holds_ema=True))
    assert read == replace(state, holds_ema=True, saved_at=read.saved_at)
    bare = TrainingState.from_metadata(step=7, epoch=2, seed=None, position=None)
    assert (bare.origin, bare.data_order, bare.holds_ema) == ((0, 0), None, False)


def test_a_state_of_a_later_format_is_refused_with_what_to_do(tiny, tmp_path: Path) -> None:
    state = save(tiny, tmp_path / "s")
    later = json.loads((state / STATE).read_text()) | {"format": FORMAT + 1}
    (state / STATE).write_text(json.dumps(later))
    manifest = json.loads((state / MANIFEST).read_text())
    content = (state / STATE).read_bytes()
    manifest[STATE] = [len(content), hashlib.sha256(content).hexdigest()]
    (state / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"has format {FORMAT + 1}.*update the program"):
        load_state(state)
