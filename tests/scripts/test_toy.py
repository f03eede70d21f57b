"""The toy world: plain code reads its images, and the small model follows its captions."""

import random
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from scripts.benchmarks.letter_box import letter_box
from scripts.benchmarks.proof import PARTS
from scripts.benchmarks.proof_models import as_bf16, relative_error, transpose_projection
from scripts.benchmarks.proof_reads import Share, touches, write_wide
from scripts.benchmarks.proof_runs import CONFIG
from scripts.toy.judge import held_out_scenes, judge, judge_checkpoint
from scripts.toy.style import write_pictures
from scripts.toy.world import QUALITIES, STYLES, Scene, caption, draw, is_framed, is_held_out, scenes
from sdxl_finetune.batch import to_images
from sdxl_finetune.config import load_config
from sdxl_finetune.data.tokens import Tokenizer
from sdxl_finetune.diffusion.objective import build_objective
from sdxl_finetune.model.load import load_checkpoint
from sdxl_finetune.model.vae import encode
from sdxl_finetune.training.loop import train

ROOT = Path(__file__).parents[2]
TOY = ROOT / "tests" / "toy" / "toy.safetensors"


@pytest.mark.parametrize("style", STYLES)
def test_the_judge_reads_what_was_drawn(style: str) -> None:
    """Also in a frame. Scores are low if the images belong to other captions."""
    drawn = list(islice(scenes(5, for_training=True, style=style, quality="best"), 60))
    score = judge(drawn, [draw(scene, random.Random(number)) for number, scene in enumerate(drawn)])
    assert min(score.colour, score.shape, score.ground, score.count) >= 0.95 and score.framed == 0
    with_frame = [replace(scene, framed=True) for scene in drawn]
    score = judge(drawn, [draw(scene, random.Random(number)) for number, scene in enumerate(with_frame)])
    assert min(score.colour, score.shape, score.ground) >= 0.8 and score.framed == 1
    mismatched = judge(drawn, [draw(scene, random.Random(1)) for scene in drawn[1:] + drawn[:1]])
    assert max(mismatched.colour, mismatched.shape) < 0.5


def test_captions_name_the_scene_and_some_scenes_are_held_out() -> None:
    scene = Scene((("red", "star"), ("blue", "cross")), "pink", "outline", "low", framed=True)
    tags = "low quality, gallery style, outline style, two objects, red star, blue cross, pink background"
    assert caption(scene) == tags
    trained, others = (list(islice(scenes(0, for_training=training), 300)) for training in (True, False))
    assert not any(map(is_held_out, trained)) and all(map(is_held_out, others))
    assert {scene.quality for scene in trained} == set(QUALITIES) and {scene.style for scene in trained} == set(STYLES)
    sharp, rough = (
        draw(replace(scene, quality=quality, framed=False), random.Random(1)) for quality in ("best", "worst")
    )
    assert sharp.tobytes() != rough.tobytes() and not is_framed(sharp)


def test_the_model_follows_captions() -> None:
    """Random images of single objects would have 17 % of the colours and 20 % of the shapes right."""
    assert TOY.stat().st_size <= 30e6
    right = judge_checkpoint(TOY, 40)
    assert right.colour >= 0.75 and right.shape >= 0.75 and right.framed <= 0.1, right


@torch.no_grad()
def losses(model: Path, count: int) -> torch.Tensor:
    """Losses on `count` pictures of held-out scenes, each with the same noise for any model."""
    loaded, seen = load_checkpoint(model, dtype=torch.float32), held_out_scenes(count)
    pixels = [np.asarray(draw(scene, random.Random(number)).convert("RGB")) for number, scene in enumerate(seen)]
    latents = encode(loaded.vae, to_images(torch.from_numpy(np.stack(pixels)))) * loaded.vae.config.scaling_factor
    tokens = Tokenizer(max_token_length=None)([caption(scene) for scene in seen])
    objective, generator = build_objective("noise"), torch.Generator().manual_seed(0)
    size, total = torch.full((count, 2), pixels[0].shape[0]), torch.zeros(count)
    for timestep in (300, 500, 700, 900):
        noise, timesteps = torch.randn(latents.shape, generator=generator), torch.full((count,), timestep)
        noisy = objective.noisy(latents, noise, timesteps)
        prediction = loaded.model(noisy, timesteps, tokens, size, torch.zeros_like(size), size)
        total += (prediction - noise).square().mean(dim=(1, 2, 3))
    return total / 4


def test_the_model_needs_the_right_pooled_vector(tmp_path: Path) -> None:
    """Compares both on the same pictures: the wrong vector raises the loss by 8 standard errors of 100 pictures."""
    wrong = transpose_projection(TOY, tmp_path / "turned.safetensors")
    higher = losses(wrong, 100) - losses(TOY, 100)
    assert higher.mean() > 5 * higher.std() / 10


@pytest.fixture
def taught(tmp_path: Path, monkeypatch):
    """Returns a function that trains shortly on images of the new style with quickstart.toml. It returns the model."""
    write_pictures(tmp_path / "pictures", 48)

    def teach(name: str, *options: str, model: Path = TOY) -> Path:
        out = tmp_path / name
        places = ["--pretrained_model_name_or_path", str(model), "--train_data_dir", str(tmp_path / "pictures")]
        places += ["--output_dir", str(out), "--logging_dir", str(out / "logs"), "--output_name", "model"]
        quiet = ["--sample_prompts", "", "--sample_every_n_epochs", "0", "--no-sample_at_first", "--ema_half_life", ""]
        config = load_config(["--config", str(CONFIG), *places, *quiet, *options], program="sdxl-train")
        assert config is not None and train(config) == 0
        AcceleratorState._reset_state(reset_partial_state=True)
        return out / "model.safetensors"

    return teach


def test_exact_masters_keep_changes_that_rounding_to_bf16_loses(taught, tmp_path: Path) -> None:
    """Compares with float32 training from the same bf16 weights, at the learning rates of configs/style.toml."""
    start = tmp_path / "start.safetensors"
    before = as_bf16(TOY, start)
    asked = ["--max_train_epochs", "1", "--lr_warmup_steps", "0", "--save_precision", "float"]
    asked += ["--learning_rate", "3e-5", "--learning_rate_te1", "1e-6", "--learning_rate_te2", "1e-6"]
    bf16 = ["--mixed_precision", "bf16", "--full_bf16"]
    exact = load_file(taught("float32", *asked, model=start))
    masters = load_file(taught("masters", *asked, *bf16, model=start))
    rounded = load_file(taught("rounded", *asked, *bf16, "--no-exact_masters", model=start))
    for part in PARTS:
        assert relative_error(part, before, exact, masters) < 0.2, part
        assert relative_error(part, before, exact, rounded) > 0.8, part


def test_the_measurements_of_the_proof_are_right(tmp_path: Path) -> None:
    """Shares have standard errors, wide images are cut at random, and letter-box offsets are those of sd-scripts.

    docs/differences.md describes these offsets.
    """
    assert Share(100, 200).above(Share(60, 200)) and not Share(100, 200).above(Share(90, 200))
    assert 0 < Share(0, 10).error < 0.15 and str(Share(1, 4)) == "25% ± 19"
    cut = write_wide(tmp_path / "wide", tmp_path / "cut", 100)
    assert 0.35 < cut.value < 0.75 and len(list((tmp_path / "cut").glob("*.txt"))) == 100
    whole = islice(scenes(1, for_training=True, quality="best", pair_share=0.0), 50)
    assert not any(touches(draw(scene, random.Random(number))) for number, scene in enumerate(whole))
    entry = SimpleNamespace(size=(1000, 1500), bucket=SimpleNamespace(width=832, height=1216))
    assert letter_box(entry) == (0, 10)
