"""Checkpoints: golden names, formats and metadata, and writing that loses nothing."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sdxl_finetune.config import Config
from sdxl_finetune.model.load import load_checkpoint
from sdxl_finetune.model.random_model import TINY, build_random_model
from sdxl_finetune.output.checkpoints import (
    Save,
    checkpoint_path,
    epoch_name,
    final_name,
    format_to_save,
    name_and_precision,
    remove,
    replaced,
    step_name,
    write_checkpoint,
)

KEYS = "checkpoint_keys.json.gz"


@pytest.fixture(scope="module")
def tiny():
    return build_random_model(TINY, seed=0)


def save(tiny, due: Save, folder: Path, **options) -> Path:
    config = Config(output_dir=folder, **options)
    save_as = format_to_save(config, "safetensors")
    name, precision = name_and_precision(due, config, *tiny)
    path = checkpoint_path(folder, name, save_as)
    write_checkpoint(path, precision, *tiny, save_as=save_as, metadata={"a": "b"}, epoch=1, step=2)
    for old in replaced(due, folder, save_as):
        remove(old)
    return path


def test_names_are_golden(golden) -> None:
    for case in golden(KEYS)["names"]:
        config = Config(output_name=case["output_name"])
        here = Path()
        assert checkpoint_path(here, epoch_name(config, 1), "safetensors").name == case["epoch_1"]
        assert checkpoint_path(here, epoch_name(config, 123), "ckpt").name == case["epoch_123"]
        assert checkpoint_path(here, step_name(config, 500), "safetensors").name == case["step_500"]
        assert checkpoint_path(here, step_name(config, 1234567), "safetensors").name == case["step_1234567"]
        assert checkpoint_path(here, final_name(config), "safetensors").name == case["last"]
        assert checkpoint_path(here, epoch_name(config, 1), "diffusers").suffix == ""


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
    assert format_to_save(Config(**options), loaded) == kind


def test_saved_weights_replace_older_ones_and_load(tiny, tmp_path: Path) -> None:
    first = save(tiny, Save(name="m-000001"), tmp_path, save_precision="fp16")
    second = save(tiny, Save(name="m-000002", replaces="m-000001"), tmp_path, save_precision="fp16")
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
    save(tiny, Save(name="m-000001"), tmp_path, **options)
    path = save(tiny, Save(name="m-000002", replaces="m-000001"), tmp_path, **options)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m-000002"]
    assert json.loads((path / "model_index.json").read_text())["_class_name"] == "StableDiffusionXLPipeline"


def test_a_save_that_fails_removes_nothing(tiny, tmp_path: Path) -> None:
    model = tiny[0]
    (tmp_path / "m-000001.safetensors").write_text("old")
    (tmp_path / "m-000002.safetensors").write_text("older save of the same name")
    unused, model.unused = model.unused, {"not a tensor of SDXL": torch.zeros(1)}
    try:
        with pytest.raises(Exception, match=r"not a tensor"):
            save(tiny, Save(name="m-000002", replaces="m-000001"), tmp_path)
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
        path = save(tiny, Save(name="m-000002", replaces="m-000001"), tmp_path, save_precision="fp16")
    finally:
        with torch.no_grad():
            parameter.copy_(before)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m-000002-float.safetensors"] == [path.name]
    assert "unet.conv_out.bias" in caplog.text
    loaded = load_checkpoint(path, dtype=torch.float32)
    assert loaded.model.unet.conv_out.bias[0] == 70_000.0
