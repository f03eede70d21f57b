"""Models of other latent spaces are adapted, trained, resumed, drawn and converted like SDXL's."""

import json
from pathlib import Path

import numpy as np
import pytest
import tomllib
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from sdxl_finetune.commands.model import main as model_tool
from sdxl_finetune.config import VaeOptions
from sdxl_finetune.errors import UserError
from sdxl_finetune.model.load import load_checkpoint
from sdxl_finetune.training.loop import train
from tests.training.toy_runs import config, losses

UNET = "model.diffusion_model."
CHANNELS = [4, 16, 32]


def new_vae(folder: Path, channels: int) -> Path:
    """A small VAE with random weights, as a folder of diffusers. That of 16 channels has no quant_conv."""
    torch.manual_seed(channels)
    quant_conv = channels != 16
    vae = AutoencoderKL(
        block_out_channels=[32, 32, 32, 32],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=channels,
        scaling_factor=0.5,
        latents_mean=None if channels == 16 else torch.linspace(-0.5, 0.5, channels).tolist(),
        latents_std=None if channels == 16 else torch.linspace(0.5, 2, channels).tolist(),
        shift_factor=0.25 if channels == 16 else None,
        use_quant_conv=quant_conv,
        use_post_quant_conv=quant_conv,
    )
    vae.save_pretrained(folder / f"vae{channels}")
    return folder / f"vae{channels}"


def adapted(work: Path, channels: int, *more: str) -> Path:
    """The folder's base model for another VAE. The base model in the folder is replaced by it."""
    path = work / "adapted.safetensors"
    vae = new_vae(work, channels)
    assert model_tool(["adapt-latents", "base.safetensors", str(path), "--vae", str(vae), *more]) == 0
    (work / "base.safetensors").unlink()
    path.rename(work / "base.safetensors")
    return work / "base.safetensors"


def run(*more: str) -> list[float]:
    try:
        assert train(config(*more)) == 0
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    newest = max(Path("logs").glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    return losses([json.loads(line) for line in newest.read_text().splitlines()])


@pytest.mark.parametrize("channels", CHANNELS)
def test_a_run_in_another_latent_space_resumes_draws_and_converts(work: Path, channels: int) -> None:
    model = adapted(work, channels)
    scale = load_checkpoint(model, dtype=None).model.architecture.latent_scale
    assert scale is not None
    assert scale.scale == (
        (0.5,) if channels == 16 else pytest.approx([0.5 / s for s in np.linspace(0.5, 2, channels)])
    )
    (work / "prompts.txt").write_text("a photo --w 64 --h 64 --s 2 --d 1\n")
    options = ["--cache_latents_to_disk", "--vae_reflection_padding", "--max_train_steps", "2"]
    drawing = ["--sample_prompts", "prompts.txt", "--sample_every_n_steps", "2"]
    whole = run(*options, *drawing, "--save_every_n_steps", "1", "--save_state")
    assert np.isfinite(whole).all() and len(whole) == 2
    (preview,) = (work / "out" / "sample").glob("*.png")
    with Image.open(preview) as image:
        assert image.size == (64, 64)

    last = work / "out" / "last.safetensors"
    expected = load_file(last)
    assert expected[f"{UNET}input_blocks.0.0.weight"].shape[1] == expected[f"{UNET}out.2.weight"].shape[0] == channels
    with safe_open(last, "pt") as file:
        said = json.loads(file.metadata()["sdxl_finetune.latents"])
    assert said == {
        "channels": channels,
        "shift": list(scale.shift),
        "scale": list(scale.scale),
        "padding": "reflect",
    }
    # A state holds scale and padding as well, and the shards of the first run are found again.
    (state,) = (work / "out").glob("at-step00000001-state")
    shards = sorted((work / "out" / "cache").rglob("*.latents"))
    last.unlink()
    run(*options, "--resume", str(state))
    assert shards and sorted((work / "out" / "cache").rglob("*.latents")) == shards
    again = load_file(last)
    assert all(torch.equal(again[key], tensor) for key, tensor in expected.items())

    paths = [last]
    for name in ("folder", "model.ckpt", "back.safetensors"):
        assert model_tool(["convert", str(paths[-1]), str(work / name)]) == 0
        paths.append(work / name)
        converted = load_checkpoint(work / name, dtype=None).model.architecture
        assert converted.vae_reflection_padding and converted.latent_channels == channels
        assert converted.latent_scale is not None
        assert converted.latent_scale.scale == pytest.approx(scale.scale, rel=1e-12)
        assert converted.latent_scale.shift == pytest.approx(scale.shift, rel=1e-12)
    back = load_file(paths[-1])
    assert all(torch.allclose(tensor, expected[key]) for key, tensor in back.items())

    small = ["--width", "64", "--height", "64", "--steps", "2", "--seed", "3", "--prompt", "a cat"]
    for path in (last, work / "folder"):
        assert model_tool(["generate", str(path), "--output", f"{path}.images", *small]) == 0
    first, second = (
        np.asarray(Image.open(next(Path(f"{path}.images").glob("*.png")))) for path in (last, work / "folder")
    )
    assert np.abs(first.astype(int) - second).max() <= 1


def test_a_vae_of_other_channels_is_refused_with_the_command_that_helps(work: Path) -> None:
    vae = new_vae(work, 16)
    message = r"latents of 4 channels, but the VAE .*vae16 has 16: .*sdxl-model adapt-latents"
    with pytest.raises(UserError, match=message):
        load_checkpoint(work / "base.safetensors", dtype=None, vae_path=vae)
    with pytest.raises(UserError, match=message):
        train(config("--vae", str(vae)))


def test_latent_stats_prints_options_that_normalise_the_latents(work: Path, capsys: pytest.CaptureFixture) -> None:
    vae = new_vae(work, 32)
    data = ["--config", "data.toml", "--vae", str(vae), "--images", "6"]
    Path("data.toml").write_text(
        'pretrained_model_name_or_path = "base.safetensors"\ntrain_data_dir = "images"\nresolution = "64"\n'
        'output_dir = "out"\ncaption_extension = ".txt"\nseed = 5\n'
    )
    assert model_tool(["latent-stats", *data]) == 0
    printed = tomllib.loads(capsys.readouterr().out)
    options = VaeOptions(**printed)
    assert options.vae_custom_scale is not None and len(options.vae_custom_scale) == 32
    assert options.vae_custom_shift is not None and len(options.vae_custom_shift) == 32
    AcceleratorState._reset_state(reset_partial_state=True)
    assert model_tool(["latent-stats", *data, "--vae_custom_scale", "7"]) == 0  # a scale changes nothing
    assert tomllib.loads(capsys.readouterr().out) == printed
