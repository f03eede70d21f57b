"""Checkpoints say their objective in several ways, and training with another one is remarked."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdxl_finetune.commands.model import main
from sdxl_finetune.config import load_config
from sdxl_finetune.errors import UserError
from sdxl_finetune.model.declared import read_declared
from sdxl_finetune.model.load import load_checkpoint, open_checkpoint
from sdxl_finetune.training.loop import train
from sdxl_finetune.training.setup import build_run

V, EPSILON = {"modelspec.prediction_type": "v"}, {"modelspec.prediction_type": "epsilon"}
WITH_CONFIG = {"sdxl_finetune.config": json.dumps({"zero_terminal_snr": True})}
MARK = torch.tensor([])


@pytest.mark.parametrize(
    ("tensors", "metadata", "said"),
    [
        ({}, {}, (None, None)),
        ({}, V, ("velocity", None)),
        ({}, EPSILON, ("noise", None)),
        ({}, {"prediction_type": "v_prediction"}, ("velocity", None)),
        ({}, {"modelspec.predict_key": "v"}, ("velocity", None)),
        ({}, {"modelspec.prediction_type": "?", "sdxl_finetune.config": "{"}, (None, None)),
        ({"v_pred": MARK}, EPSILON, ("velocity", None)),
        ({"v_pred": MARK, "ztsnr": MARK}, {}, ("velocity", True)),
        ({}, V | WITH_CONFIG, ("velocity", True)),
    ],
)
def test_files_say_their_objective(tmp_path: Path, tensors, metadata, said) -> None:
    save_file({"a": torch.ones(1), **tensors}, tmp_path / "m.safetensors", metadata)
    declared = read_declared(open_checkpoint(tmp_path / "m.safetensors")[0])
    assert (declared.objective, declared.zero_terminal_snr) == said


def test_diffusers_folders_say_their_objective_and_conversions_keep_it(work) -> None:
    save_file(load_file("base.safetensors") | {"v_pred": MARK}, "v.safetensors")
    main(["convert", "v.safetensors", "folder"])
    config = Path("folder/scheduler/scheduler_config.json")
    assert json.loads(config.read_text())["prediction_type"] == "v_prediction"
    main(["convert", "folder", "back.safetensors"])
    assert load_checkpoint(Path("back.safetensors"), dtype=None).declared.objective == "velocity"
    config.write_text(json.dumps({"prediction_type": "epsilon", "rescale_betas_zero_snr": True}))
    declared = read_declared(open_checkpoint(Path("folder"))[0])
    assert declared.zero_terminal_snr is True and declared.objective == "velocity", "metadata of the weights wins"


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
        ({}, {}, [], []),
    ],
)
def test_training_with_another_objective_is_remarked(work, caplog, marks, metadata, options, remarks) -> None:
    save_file(load_file("base.safetensors") | marks, "marked.safetensors", metadata)
    with caplog.at_level(logging.WARNING), build_run(config(*options)):
        assert all(f"set {remark}" in caplog.text for remark in remarks)
        assert caplog.text.count("says that it") == len(remarks)


@pytest.mark.parametrize(
    ("marks", "remark"),
    [
        ({}, "marked.safetensors does not say what it predicts"),
        ({"edm_vpred.sigma_max": torch.ones(1)}, "trained on EDM's noise levels"),
    ],
)
def test_velocity_is_remarked_if_the_checkpoint_may_predict_something_else(work, caplog, marks, remark) -> None:
    save_file(load_file("base.safetensors") | marks, "marked.safetensors")
    with caplog.at_level(logging.WARNING), build_run(config("--v_parameterization", "--zero_terminal_snr")):
        assert [remark in record.message for record in caplog.records].count(True) == 1


def test_checkpoints_and_states_of_a_run_have_the_markers_of_its_objective(work) -> None:
    """A run of noise prediction drops the markers of its base, because what it saves predicts noise."""
    save_file(load_file("base.safetensors") | {"v_pred": MARK}, "marked.safetensors")
    objective = ["--v_parameterization", "--zero_terminal_snr"]
    train(config(*objective, "--save_state", "--output_name", "v"))
    train(config("--output_name", "eps"))
    for path, keys in (("v.safetensors", {"v_pred", "ztsnr"}), ("eps.safetensors", set())):
        assert {key for key in load_file(f"out/{path}") if "." not in key} == keys
    state = config(*objective, "--output_name", "w", "--max_train_steps", "2", "--resume", "out/v-state")
    train(state)
    assert {key for key in load_file("out/w.safetensors") if "." not in key} == {"v_pred", "ztsnr"}


def test_convert_adds_and_removes_markers(work, capsys) -> None:
    main(["convert", "base.safetensors", "v.safetensors", "--v_parameterization", "--zero_terminal_snr"])
    assert load_checkpoint(Path("v.safetensors"), dtype=None).declared.zero_terminal_snr
    main(["convert", "v.safetensors", "eps.ckpt", "--no-v_parameterization", "--no-zero_terminal_snr"])
    main(["convert", "eps.ckpt", "back.safetensors"])
    assert Path("back.safetensors").read_bytes() == Path("base.safetensors").read_bytes()
    save_file(load_file("base.safetensors") | {"edm_mean": MARK}, "edm.safetensors")
    with pytest.raises(UserError, match="an EDM model"):
        main(["convert", "edm.safetensors", "x.safetensors", "--v_parameterization"])


@pytest.mark.parametrize(
    ("tensors", "metadata", "lines"),
    [
        ([], {}, {"ComfyUI": "noise prediction (no tensor v_pred)", "Forge": "noise prediction (no tensor v_pred)"}),
        (
            ["v_pred", "ztsnr"],
            {},
            dict.fromkeys(
                ("ComfyUI", "Forge", "reForge"), "v-prediction (tensor v_pred), zero terminal SNR (tensor ztsnr)"
            )
            | {"AUTOMATIC1111": "(tensor ztsnr; releases up to 1.10 need a .yaml file beside it)"},
        ),
        (
            ["ztsnr"],
            {},
            {
                "ComfyUI": "noise prediction (no tensor v_pred, without which ztsnr counts for nothing)",
                "Forge": "noise prediction (no tensor v_pred), zero terminal SNR (tensor ztsnr)",
            },
        ),
        (["edm_vpred.sigma_max"], {}, {"ComfyUI": "an EDM model (tensor edm_vpred.sigma_max)"}),
        ([], V, {"ComfyUI": "noise prediction", "its metadata says more": "sdxl-model convert adds v_pred"}),
    ],
)
def test_info_says_what_interfaces_take_a_file_for(work, capsys, tensors, metadata, lines) -> None:
    save_file(load_file("base.safetensors") | dict.fromkeys(tensors, MARK), "m.safetensors", metadata)
    main(["info", "m.safetensors"])
    printed = capsys.readouterr().out.splitlines()
    for start, text in lines.items():
        assert [text in line for line in printed if line.startswith(start)] == [True]
    Path("m.yaml").touch()
    main(["info", "m.safetensors"])
    assert "Forge takes it for what m.yaml beside it says" in capsys.readouterr().out.splitlines()


def test_info_says_what_diffusers_takes_a_folder_for(work, capsys) -> None:
    main(["convert", "base.safetensors", "folder", "--v_parameterization", "--zero_terminal_snr"])
    main(["info", "folder"])
    kind = "v-prediction (prediction_type), zero terminal SNR (rescale_betas_zero_snr)"
    assert f"diffusers takes it for {kind}" in capsys.readouterr().out.splitlines()
