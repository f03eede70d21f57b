"""Checkpoints say their objective in several ways, and training with another one is remarked."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdxl_finetune.commands.model import main
from sdxl_finetune.config import load_config
from sdxl_finetune.model.declared import read_declared
from sdxl_finetune.model.load import load_checkpoint, open_checkpoint
from sdxl_finetune.training.setup import build_run

V, EPSILON = {"modelspec.prediction_type": "v"}, {"modelspec.prediction_type": "epsilon"}
WITH_CONFIG = {"sdxl_finetune.config": json.dumps({"zero_terminal_snr": True})}
MARK = torch.tensor([])


@pytest.mark.parametrize(
    ("tensors", "metadata", "said"),
    [
        ({}, {}, (None, None)),
        ({}, V, (True, None)),
        ({}, EPSILON, (False, None)),
        ({}, {"prediction_type": "v_prediction"}, (True, None)),
        ({}, {"modelspec.prediction_type": "?", "sdxl_finetune.config": "{"}, (None, None)),
        ({"v_pred": MARK}, EPSILON, (True, None)),
        ({"v_pred": MARK, "ztsnr": MARK}, {}, (True, True)),
        ({}, V | WITH_CONFIG, (True, True)),
    ],
)
def test_files_say_their_objective(tmp_path: Path, tensors, metadata, said) -> None:
    save_file({"a": torch.ones(1), **tensors}, tmp_path / "m.safetensors", metadata)
    declared = read_declared(open_checkpoint(tmp_path / "m.safetensors")[0])
    assert (declared.v_prediction, declared.zero_terminal_snr) == said


def test_diffusers_folders_say_their_objective_and_conversions_keep_it(work) -> None:
    save_file(load_file("base.safetensors") | {"v_pred": MARK}, "v.safetensors")
    main(["convert", "v.safetensors", "folder"])
    config = Path("folder/scheduler/scheduler_config.json")
    assert json.loads(config.read_text())["prediction_type"] == "v_prediction"
    main(["convert", "folder", "back.safetensors"])
    assert load_checkpoint(Path("back.safetensors"), dtype=None).declared.v_prediction
    config.write_text(json.dumps({"prediction_type": "epsilon", "rescale_betas_zero_snr": True}))
    declared = read_declared(open_checkpoint(Path("folder"))[0])
    assert declared.zero_terminal_snr is True and declared.v_prediction is True, "metadata of the weights wins"


def config(*options: str):
    words = ["--pretrained_model_name_or_path", "marked.safetensors", "--train_data_dir", "images", "--seed", "1"]
    words += ["--output_dir", "out", "--resolution", "64", "--max_train_steps", "1", *options]
    loaded = load_config(words, program="sdxl-train")
    assert loaded is not None
    return loaded


@pytest.mark.parametrize(
    ("marks", "metadata", "options", "remarks"),
    [
        ({"v_pred": MARK}, {}, [], ["v_parameterization = true"]),
        ({"v_pred": MARK, "ztsnr": MARK}, {}, [], ["v_parameterization = true", "zero_terminal_snr = true"]),
        ({"v_pred": MARK}, {}, ["--v_parameterization"], []),
        ({}, EPSILON, ["--v_parameterization"], ["v_parameterization = false"]),
        ({}, EPSILON, [], []),
        ({}, {}, ["--v_parameterization", "--zero_terminal_snr"], []),
    ],
)
def test_training_with_another_objective_is_remarked(work, caplog, marks, metadata, options, remarks) -> None:
    save_file(load_file("base.safetensors") | marks, "marked.safetensors", metadata)
    with caplog.at_level(logging.WARNING), build_run(config(*options)):
        assert all(f"set {remark}" in caplog.text for remark in remarks)
        assert caplog.text.count("says that it") == len(remarks)
