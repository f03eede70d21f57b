"""Flows say in every format that they are flows, and with which shift, and training with another objective is remarked.

Not run here: the interfaces themselves. Their rules are those of their sources (model/interfaces.py).
"""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusionXLPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdxl_finetune.commands.model import main
from sdxl_finetune.config import FlowOptions
from sdxl_finetune.errors import UserError
from sdxl_finetune.model.declared import read_declared
from sdxl_finetune.model.load import load_checkpoint, open_checkpoint
from sdxl_finetune.training.loop import train
from sdxl_finetune.training.setup import build_run
from tests.model.test_declared import config

# 2026-11: diffusers 0.42 turns torch 2.13 tensors into numpy arrays, and numpy 2.4 warns of how torch does it.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

MARK = torch.tensor([])
FLOW, EPSILON = {"modelspec.prediction_type": "flow"}, {"modelspec.prediction_type": "epsilon"}
STATIC = {"flow_model": True, "flow_uniform_static_ratio": 2.5, "zero_terminal_snr": True}
BY_SIZE = {"flow_model": True, "flow_uniform_shift": True, "flow_uniform_base_pixels": 4096.0}


def with_config(options: dict) -> dict[str, str]:
    return FLOW | {"sdxl_finetune.config": json.dumps(options)}


@pytest.mark.parametrize(
    ("tensors", "metadata", "objective", "shift"),
    [
        ({}, FLOW, "flow", {}),
        ({}, {"prediction_type": "rectified_flow"}, "flow", {}),
        ({}, with_config(STATIC), "flow", {"flow_uniform_static_ratio": 2.5}),
        ({}, with_config(BY_SIZE), "flow", {"flow_uniform_shift": True, "flow_uniform_base_pixels": 4096.0}),
        ({}, with_config({"flow_uniform_static_ratio": -1}), "flow", {}),
        ({}, {"sdxl_finetune.config": json.dumps(STATIC)} | EPSILON, "noise", {}),
        ({"flow_model": MARK}, with_config(STATIC), "flow", {}),
        ({"flow_model": MARK, "flow_shift": torch.tensor([3.0])}, EPSILON, "flow", {"flow_uniform_static_ratio": 3.0}),
        ({"flow_model": MARK, "v_pred": MARK}, {}, "flow", {}),
        ({"v_pred": MARK}, FLOW, "velocity", {}),
    ],
)
def test_files_say_flow_and_shift(tmp_path: Path, tensors, metadata, objective, shift) -> None:
    save_file({"a": torch.ones(1), **tensors}, tmp_path / "m.safetensors", metadata)
    declared = read_declared(open_checkpoint(tmp_path / "m.safetensors")[0])
    assert declared.objective == objective and declared.flow == FlowOptions(**shift)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=2.5),
        DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.5),
    ],
)
def test_schedulers_of_diffusers_say_flow_and_shift(work, capsys, scheduler) -> None:
    main(["convert", "base.safetensors", "folder"])
    scheduler.save_config("folder/scheduler")
    declared = read_declared(open_checkpoint(Path("folder"))[0])
    assert declared.objective == "flow" and declared.flow == FlowOptions(flow_uniform_static_ratio=2.5)
    main(["info", "folder"])
    assert f"diffusers takes it for a flow with shift 2.5 ({type(scheduler).__name__}" in capsys.readouterr().out


def test_flow_and_shift_pass_through_every_format(work) -> None:
    given = ["--flow_model", "--flow_shift", "2.5"]
    main(["convert", "base.safetensors", "flow.safetensors", *given])
    previous = "flow.safetensors"
    for name in ("flow.ckpt", "folder", "old", "back.safetensors"):
        save_as = ["--save_model_as", "diffusers"] if name == "old" else []
        main(["convert", previous, name, *save_as])
        declared = load_checkpoint(Path(name), dtype=None).declared
        assert declared.objective == "flow" and declared.flow == FlowOptions(flow_uniform_static_ratio=2.5), name
        previous = name
    tensors = load_file("back.safetensors")
    assert {key for key in tensors if "." not in key} == {"flow_model", "flow_shift"}
    with safe_open("back.safetensors", "pt") as file:
        assert file.metadata()["modelspec.prediction_type"] == "flow"
    main(["convert", "flow.ckpt", "plain.ckpt", "--no-flow_model"])
    main(["convert", "plain.ckpt", "plain.safetensors"])
    assert Path("plain.safetensors").read_bytes() == Path("base.safetensors").read_bytes()
    main(["convert", "flow.ckpt", "v.ckpt", "--v_parameterization"])
    assert load_checkpoint(Path("v.ckpt"), dtype=None).declared.objective == "velocity"
    main(["convert", "v.ckpt", "again.ckpt", "--flow_model"])
    assert load_checkpoint(Path("again.ckpt"), dtype=None).declared.objective == "flow"


@torch.no_grad()
def test_diffusers_own_pipeline_draws_from_the_folder_of_a_flow(work) -> None:
    """Its scheduler finds the only image that a field of velocities leads to."""
    main(["convert", "base.safetensors", "folder", "--flow_model", "--flow_shift", "2.5"])
    pipeline = StableDiffusionXLPipeline.from_pretrained("folder")
    pipeline.set_progress_bar_config(disable=True)
    known = torch.tensor([0.7, -0.3, 0.1, -0.8]).reshape(1, 4, 1, 1)

    def velocity(latents, timestep, **_kwargs):
        return ((latents - known) / (timestep / 1000),)

    pipeline.unet.forward = velocity
    drawn = pipeline("a", num_inference_steps=20, guidance_scale=1.0, height=64, width=64, output_type="latent").images
    assert (drawn.float() - known).abs().max() < 0.02


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--flow_model", "--v_parameterization"], "Leave out --flow_model or --v_parameterization"),
        (["--flow_model", "--zero_terminal_snr"], "always ends in pure noise"),
        (["--no-flow_model", "--flow_shift", "2"], "only a flow has a shift"),
        (["--flow_shift", "2"], "only a flow has a shift. Add --flow_model"),
    ],
)
def test_options_that_contradict_each_other_are_refused(work, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(["convert", "base.safetensors", "x.safetensors", *arguments])
    assert not Path("x.safetensors").exists()
    if "--no-flow_model" not in arguments:
        with pytest.raises(UserError, match=message):
            main(["generate", "base.safetensors", "--prompt", "a", "--width", "64", "--height", "64", *arguments])


@pytest.mark.parametrize(
    ("marks", "metadata", "options", "remark"),
    [
        ({}, EPSILON, ["--flow_model"], "says that it predicts noise. Training first turns it into a flow"),
        ({"v_pred": MARK, "ztsnr": MARK}, {}, ["--flow_model"], "says that it predicts velocity. Training first turns"),
        ({}, {}, ["--flow_model"], "does not say what it predicts"),
        ({"flow_model": MARK}, {}, ["--flow_model"], None),
        (
            {"flow_model": MARK},
            {},
            [],
            "says that it is a flow, and training would slowly change that: set flow_model = t",
        ),
        ({}, with_config(STATIC), ["--v_parameterization"], "set flow_model = true and remove v_parameterization"),
    ],
)
def test_training_with_another_objective_is_remarked(work, caplog, marks, metadata, options, remark) -> None:
    save_file(load_file("base.safetensors") | marks, "marked.safetensors", metadata)
    with caplog.at_level(logging.WARNING), build_run(config(*options)):
        found = [record.getMessage() for record in caplog.records if "marked.safetensors" in record.getMessage()]
    assert len(found) == (remark is not None)
    if remark:
        assert remark in found[0] and ("docs/objectives.md" in found[0]) == ("--flow_model" in options)


def difference(one: Path, other: Path) -> float:
    """The mean difference of two pictures, in levels of 0 to 255."""
    with Image.open(one) as first, Image.open(other) as second:
        return float(np.abs(np.asarray(first, float) - np.asarray(second, float)).mean())


def test_a_flow_trains_with_previews_resumes_and_is_drawn_alike_afterwards(work, caplog, capsys) -> None:
    """The run's own preview equals the picture that `sdxl-model generate` draws with its checkpoint."""
    save_file(load_file("base.safetensors"), "marked.safetensors")
    Path("prompts.txt").write_text("a cat --w 64 --h 64 --s 3 --l 2 --d 5\na dog --w 64 --h 96 --s 2 --d 6 --ss heun\n")
    options = ["--flow_model", "--flow_uniform_static_ratio", "2.5", "--sample_prompts", "prompts.txt", "--save_state"]
    options += ["--sample_every_n_steps", "2", "--colour_check_every_n_steps", "2", "--colour_check_images", "2"]
    options += ["--save_precision", "float", "--learning_rate", "1e-4", "--lr_scheduler", "constant"]
    with caplog.at_level(logging.INFO):
        train(config(*options, "--output_name", "whole", "--max_train_steps", "2"))
    assert caplog.text.count("sampler ddim: flow models are drawn with Euler instead") == 1
    assert "no preview" not in caplog.text and "no colour check" not in caplog.text
    train(config(*options, "--output_name", "part"))
    train(config(*options, "--output_name", "part", "--max_train_steps", "2", "--resume", "out/part-state"))
    whole, resumed = load_file("out/whole.safetensors"), load_file("out/part.safetensors")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole) and whole["flow_shift"].tolist() == [2.5]
    previews = sorted(Path("out/sample").glob("whole_000002_*.png"))
    asked = ["--prompts", "prompts.txt", "--sampler", "ddim", "--precision", "float", "--max_token_length", "75"]
    asked += ["--scale", "7.5"]
    main(["generate", "out/whole.safetensors", *asked, "--output", "drawn"])
    main(["generate", "out/whole.safetensors", *asked, "--output", "unshifted", "--flow_shift", "1"])
    assert "are left out" not in caplog.text
    drawn, unshifted = (sorted(Path(folder).iterdir()) for folder in ("drawn", "unshifted"))
    for preview, alike, other in zip(previews, drawn, unshifted, strict=True):
        assert difference(preview, alike) < 0.1 and difference(preview, other) > 0.5
        with Image.open(preview) as one, Image.open(other) as two:
            assert "Schedule type: Simple" in one.text["parameters"] and "Shift: 2.5" in one.text["parameters"]
            assert "Shift: 1.0" in two.text["parameters"]
    main(["info", "out/whole.safetensors"])
    printed = capsys.readouterr().out
    assert "ComfyUI: node ModelSamplingSD3 with shift 2.5" in printed and "mode SD3, with shift 2.5" in printed
    with pytest.raises(UserError, match=r"base.safetensors: has no flow objective, but .*whole.safetensors has"):
        main(["merge", "out/whole.safetensors", "base.safetensors", "--output", "mixed.safetensors"])
