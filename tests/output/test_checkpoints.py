"""When weights are saved, under which names and in whose place: golden; and that nothing is lost on the way."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from sdxl_finetune.config import Config
from sdxl_finetune.model.initial import TINY, build_initial
from sdxl_finetune.model.load import load_checkpoint
from sdxl_finetune.output.checkpoints import (
    Due,
    epoch_name,
    epochs_between_saves,
    final_weights,
    kind_to_save,
    path_of,
    replaced_epoch,
    replaced_step,
    save_weights,
    step_name,
    weights_due,
)

KEYS = "checkpoint_keys.json.gz"


@pytest.fixture(scope="module")
def tiny():
    return build_initial(TINY, seed=0)


def save(tiny, due: Due, folder: Path, **options) -> Path:
    config = Config(**options)
    kind = kind_to_save(config, "safetensors")
    return save_weights(due, config, *tiny, directory=folder, kind=kind, metadata={"a": "b"}, epoch=1, step=2)


def weights_of(options: list[str]) -> dict[str, int]:
    """The options of a golden command line that are about weights; those about states have no part in them."""
    values = [option.removeprefix("--") for option in options if option != "--save_state"]
    pairs = zip(values[::2], values[1::2], strict=False)
    return {name: int(value) for name, value in pairs if not name.endswith("_state")}


def test_names_are_golden(golden) -> None:
    for case in golden(KEYS)["names"]:
        config = Config(output_name=case["output_name"])
        here = Path()
        assert path_of(here, epoch_name(config, 1), "safetensors").name == case["epoch_1"]
        assert path_of(here, epoch_name(config, 123), "ckpt").name == case["epoch_123"]
        assert path_of(here, step_name(config, 500), "safetensors").name == case["step_500"]
        assert path_of(here, step_name(config, 1234567), "safetensors").name == case["step_1234567"]
        assert path_of(here, final_weights(config).name, "safetensors").name == case["last"]
        assert path_of(here, epoch_name(config, 1), "diffusers").suffix == ""


def test_removals_are_golden(golden) -> None:
    removal = golden(KEYS)["removal"]
    for case in removal["get_remove_epoch_no"]:
        for epoch, old in case["by_epoch"].items():
            assert replaced_epoch(int(epoch), case["every"], case["last"]) == old
    for case in removal["get_remove_step_no"]:
        for step, old in case["by_step"].items():
            assert replaced_step(int(step), case["every"], case["last"]) == old


def test_saved_files_of_whole_runs_are_golden(golden) -> None:
    runs = golden(KEYS)["save_runs"]
    assert len(runs) == 19
    for run in runs:
        config = Config(output_name="my_model", **weights_of(run["cli"]))
        suffix = ".safetensors" if run["stable_diffusion_format"] else ""
        files: set[str] = set()
        for entry in run["log"]:
            if entry.get("at_train_end"):
                due = [final_weights(config)]
                if not run["stable_diffusion_format"]:
                    continue  # the recorder of the golden run kept no folder at the end
            elif run["mode"] == "epochs":
                epoch = entry["end_of_epoch_index"] + 1
                due = weights_due(config, epoch=epoch, step=10 * epoch, epochs=run["num_train_epochs"])
            else:
                due = weights_due(config, epoch=None, step=entry["global_step"], epochs=run["num_train_epochs"])
            for one in due:
                files = (files | {one.name + suffix}) - {f"{one.replaces}{suffix}"}
            assert sorted(files) == [name for name in entry["files"] if not name.endswith("-state")], run["cli"]


def test_a_ratio_asks_for_so_many_files() -> None:
    assert epochs_between_saves(Config(save_n_epoch_ratio=5, save_every_n_epochs=1), 20) == 4
    assert epochs_between_saves(Config(save_n_epoch_ratio=5), 3) == 1
    assert epochs_between_saves(Config(save_every_n_epochs=3), 3) == 3


def test_step_and_epoch_can_be_due_together() -> None:
    config = Config(output_name="m", save_every_n_steps=10, save_every_n_epochs=1)
    assert [due.name for due in weights_due(config, epoch=2, step=20, epochs=3)] == ["m-step00000020", "m-000002"]
    assert weights_due(config, epoch=None, step=21, epochs=3) == []


@given(step=st.integers(1, 10_000), every=st.integers(1, 100), keep=st.integers(1, 1000))
def test_what_is_replaced_was_saved_and_is_old_enough(step: int, every: int, keep: int) -> None:
    step *= every
    old = replaced_step(step, every, keep)
    if old is None:
        assert step <= keep
    else:
        assert old % every == 0 and keep < step - old <= keep + every
    assert replaced_epoch(step, every, keep) in (None, step - every * keep)


@pytest.mark.parametrize(
    ("options", "loaded", "kind"),
    [
        ({}, "safetensors", "safetensors"),
        ({}, "ckpt", "ckpt"),
        ({"use_safetensors": True}, "ckpt", "safetensors"),
        ({}, "diffusers", "diffusers_safetensors"),
        ({"save_model_as": "ckpt"}, "safetensors", "ckpt"),
        ({"save_model_as": "ckpt", "use_safetensors": True}, "diffusers", "safetensors"),
        ({"save_model_as": "diffusers"}, "safetensors", "diffusers"),
        ({"save_model_as": "diffusers", "use_safetensors": True}, "safetensors", "diffusers_safetensors"),
        ({"save_model_as": "safetensors"}, "diffusers", "safetensors"),
    ],
)
def test_the_kind_of_file(options: dict, loaded: str, kind: str) -> None:
    """differences.md: The kind of saved files when none is asked for."""
    assert kind_to_save(Config(**options), loaded) == kind


def test_saved_weights_replace_older_ones_and_load(tiny, tmp_path: Path) -> None:
    first = save(tiny, Due(name="m-000001"), tmp_path, save_precision="fp16")
    second = save(tiny, Due(name="m-000002", replaces="m-000001"), tmp_path, save_precision="fp16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m-000002.safetensors"]
    assert not first.exists()
    with safe_open(second, framework="pt") as file:
        assert file.metadata()["a"] == "b"
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}  # noqa: SIM118
    loaded = load_checkpoint(second, dtype=torch.float32)
    name, weight = next(tiny[0].named_parameters())
    torch.testing.assert_close(loaded.model.get_parameter(name), weight.half().float(), rtol=0, atol=0)


def test_folders_replace_folders(tiny, tmp_path: Path) -> None:
    options = {"save_model_as": "diffusers_safetensors", "save_precision": "bf16"}
    save(tiny, Due(name="m-000001"), tmp_path, **options)
    path = save(tiny, Due(name="m-000002", replaces="m-000001"), tmp_path, **options)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m-000002"]
    assert json.loads((path / "model_index.json").read_text())["_class_name"] == "StableDiffusionXLPipeline"


def test_a_save_that_fails_removes_nothing(tiny, tmp_path: Path) -> None:
    model = tiny[0]
    (tmp_path / "m-000001.safetensors").write_text("old")
    (tmp_path / "m-000002.safetensors").write_text("older save of the same name")
    unused, model.unused = model.unused, {"not a tensor of SDXL": torch.zeros(1)}
    try:
        with pytest.raises(Exception, match=r"not a tensor"):
            save(tiny, Due(name="m-000002", replaces="m-000001"), tmp_path)
    finally:
        model.unused = unused
    assert {path.name: path.read_text()[:3] for path in tmp_path.iterdir()} == {
        "m-000001.safetensors": "old",
        "m-000002.safetensors": "old",
    }


def test_weights_beyond_float16_are_saved_in_float32(tiny, tmp_path: Path, caplog) -> None:
    parameter = tiny[0].unet.conv_out.bias
    before = parameter.detach().clone()
    (tmp_path / "m-000001-float.safetensors").write_text("old")
    try:
        with torch.no_grad():
            parameter[0] = 70_000.0
        path = save(tiny, Due(name="m-000002", replaces="m-000001"), tmp_path, save_precision="fp16")
    finally:
        with torch.no_grad():
            parameter.copy_(before)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m-000002-float.safetensors"] == [path.name]
    assert "unet.conv_out.bias" in caplog.text
    loaded = load_checkpoint(path, dtype=torch.float32)
    assert loaded.model.unet.conv_out.bias[0] == 70_000.0
