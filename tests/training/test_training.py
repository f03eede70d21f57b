"""Whole runs on real photographs: the users' own config, and what must hold for any run."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sdxl_finetune.commands.cache import cache
from sdxl_finetune.config import load_config
from sdxl_finetune.diffusion.image_loss import image_losses
from sdxl_finetune.diffusion.noise import draw_noise
from sdxl_finetune.model.vae import batch_latents
from sdxl_finetune.training.hooks import preview_if_due
from sdxl_finetune.training.loop import train
from sdxl_finetune.training.setup import build_run

STYLE = Path(__file__).parents[2] / "configs" / "style.toml"
SMALL = ["--resolution", "96", "--min_bucket_reso", "64", "--max_bucket_reso", "128"]
FLOAT32 = ["--mixed_precision", "no", "--no-full_bf16"]
UNET, TE1, TE2, VAE = "model.diffusion_model.", "conditioner.embedders.0.", "conditioner.embedders.1.", "first_stage"


@pytest.fixture
def work(work) -> Path:
    """With prompts too."""
    (work / "prompts.txt").write_text("a cat, photo --w 64 --h 64 --s 3 --d 7\nrocket --w 96 --h 64 --s 3 --l 4\n")
    return work


def arguments(*more: str) -> list[str]:
    """The users' file, with only what a small machine needs changed."""
    return ["--config", str(STYLE), *SMALL, "--output_dir", "out", "--max_data_loader_n_workers", "0", *more]


def run(*more: str) -> int:
    config = load_config(arguments("--seed", "5", *more), program="sdxl-train")
    assert config is not None
    return train(config)


def command(*more: str) -> list[str]:
    return [sys.executable, "-m", "sdxl_finetune", *arguments(*FLOAT32, *more)]


def evaluate(path: str | Path) -> float:
    """Mean loss on fixed images, captions, noise and timesteps."""
    options = ["--pretrained_model_name_or_path", str(path), "--logging_dir", "", "--log_with", "", "--seed", "99"]
    config = load_config(arguments(*FLOAT32, *options), program="sdxl-train")
    assert config is not None
    with build_run(config) as built, torch.no_grad():
        losses = []
        for batch, _ in zip(built.batches(), range(12), strict=False):
            latents = batch_latents(batch, built.learner.vae)
            losses.append(image_losses(built.learner.model, batch, latents, built.learner.objective, config))
    return float(torch.cat(losses).mean())


def metrics(work: Path) -> list[dict]:
    (log,) = work.glob("logs/*/metrics.jsonl")
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_adaptive_noise_scale_sees_the_latents_that_the_model_sees(work) -> None:
    """The latents are multiplied by the VAE's scaling factor, as in the reference."""
    options = ["--adaptive_noise_scale", "0.5", "--noise_offset", "0.1", "--multires_noise_iterations", "0"]
    config = load_config(arguments(*FLOAT32, *options, "--cache_latents", "--seed", "5"), program="sdxl-train")
    assert config is not None
    with build_run(config) as built:
        batch = next(built.batches())
        latents = batch_latents(batch, built.learner.vae)
        expected, _ = draw_noise(config, 5, batch.position, tuple(latents.shape), latents)
        unscaled, _ = draw_noise(config, 5, batch.position, tuple(latents.shape), batch.latents)
    torch.testing.assert_close(batch.noise, expected)
    assert (batch.noise - unscaled).abs().max() > 1e-3


def test_the_users_config_teaches(work) -> None:
    """The file as it is, but for resolution, bucket sizes, epochs and output_dir; in float32."""
    assert run(*FLOAT32, "--max_train_epochs", "12") == 0
    saved = sorted(path.name for path in Path("out").glob("*.safetensors"))
    assert saved == [*(f"style-{epoch:06d}.safetensors" for epoch in range(2, 12, 2)), "style.safetensors"]
    rows = metrics(work)
    per_epoch = len(rows) // 12
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert [row["epoch"] for row in rows] == [1 + step // per_epoch for step in range(len(rows))]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    assert rows[0]["lr"] == {"unet": 3e-5, "text_encoder1": 1e-6, "text_encoder2": 1e-6}
    before, after = evaluate("base.safetensors"), evaluate("out/style.safetensors")
    assert after < 0.97 * before
    with safe_open("out/style.safetensors", "pt") as file:
        header = file.metadata()
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}  # noqa: SIM118
    assert header["modelspec.resolution"] == "96x96" and header["sdxl_finetune.step"] == str(len(rows))
    previews = sorted(path.name for path in Path("out/sample").iterdir())
    assert len(previews) == 24 and previews[0].startswith("style_e000001_00_")
    with Image.open(Path("out/sample") / previews[1]) as image:
        assert image.size == (96, 64) and "rocket" in image.text["parameters"]
    (events,) = work.glob("logs/*/*/events.*")
    board = EventAccumulator(str(events.parent), size_guidance={"scalars": 0, "images": 0}).Reload()
    assert {"loss", "loss/epoch", "lr/unet", "lr/text_encoder1", "lr/text_encoder2"} <= set(board.Tags()["scalars"])
    assert len(board.Scalars("loss")) == len(rows) and board.Tags()["images"]


def test_full_bf16_runs(work) -> None:
    """Two steps of the users' precision; a CPU computes bf16 convolutions slowly."""
    assert run("--max_train_steps", "2", "--max_train_epochs", "", "--sample_every_n_epochs", "0") == 0
    assert [math.isfinite(row["loss"]) for row in metrics(work)] == [True, True]


def test_the_same_seed_gives_the_same_bits_with_and_without_previews_and_workers(work) -> None:
    steps = [*FLOAT32, "--max_train_epochs", "", "--max_train_steps", "4", "--flip_aug"]
    assert run(*steps, "--output_name", "one", "--sample_every_n_epochs", "", "--sample_every_n_steps", "1") == 0
    others = ["--output_name", "two", "--sample_prompts", "", "--max_data_loader_n_workers", "2"]
    assert run(*steps, *others) == 0
    one, two = load_file("out/one.safetensors"), load_file("out/two.safetensors")
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_what_is_not_trained_stays_as_it_was(work) -> None:
    steps = [*FLOAT32, "--max_train_epochs", "", "--max_train_steps", "3", "--sample_prompts", ""]
    steps += ["--save_precision", "float"]
    assert run(*steps, "--learning_rate_te2", "0", "--gradient_accumulation_steps", "2") == 0
    before, after = load_file("base.safetensors"), load_file("out/style.safetensors")
    assert before.keys() == after.keys()
    same = {key for key in before if torch.equal(before[key].float(), after[key])}
    assert {key for key in before if key.startswith((TE2, VAE))} <= same
    assert any(key.startswith(TE1) for key in before.keys() - same)
    moved = {key for key in before.keys() - same if key.startswith(UNET)}
    assert len(moved) > 0.9 * sum(key.startswith(UNET) for key in before)


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "not cached"])
def test_single_blocks_are_trained(work, cached: bool) -> None:
    """A norm as the first trained module: torch's backward pass crashes there for input in channels_last."""
    rates = ["0"] * 23
    rates[5] = "1e-3"
    steps = [*FLOAT32, "--max_train_epochs", "", "--max_train_steps", "2", "--sample_prompts", ""]
    steps += ["--block_lr", ",".join(rates), "--no-train_text_encoder", "--save_precision", "float"]
    done = subprocess.run(
        command(*steps, *([] if cached else ["--no-cache_latents_to_disk", "--no-cache_latents"]), "--seed", "5"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    before, after = load_file("base.safetensors"), load_file("out/style.safetensors")
    moved = {key for key in before if not torch.equal(before[key].float(), after[key])}
    assert moved and all(key.startswith(f"{UNET}input_blocks.4.") for key in moved)
    assert metrics(work)[0]["lr"] == {"block5": 1e-3}


def test_images_are_encoded_as_they_come_without_a_cache(work) -> None:
    Path("images/broken.jpg").write_bytes(Path("images/chelsea.jpg").read_bytes()[:9000])
    steps = [*FLOAT32, "--max_train_epochs", "2", "--sample_prompts", "", "--no-cache_latents_to_disk"]
    assert run(*steps, "--no-cache_latents", "--random_crop", "--on_bad_image", "skip") == 0
    assert all(math.isfinite(row["loss"]) for row in metrics(work))


def test_prompts_may_be_edited_during_a_run(work, caplog) -> None:
    options = [*FLOAT32, "--sample_every_n_epochs", "", "--sample_every_n_steps", "1", "--seed", "5"]
    config = load_config(arguments(*options), program="sdxl-train")
    assert config is not None
    with build_run(config) as built:
        Path("prompts.txt").write_text("one prompt --w 64 --h 64 --s 2 --d 1\n")
        preview_if_due(built, built.timeline.after(1))
        assert [path.name.split("_")[2] for path in Path("out/sample").iterdir()] == ["00"]
        Path("prompts.txt").write_text("broken --w many\n")
        preview_if_due(built, built.timeline.after(2))
    assert len(list(Path("out/sample").iterdir())) == 3 and "prompts.txt:1" in caplog.text


def test_signals_end_the_run_after_a_step(work) -> None:
    with subprocess.Popen(command("--sample_prompts", ""), stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 300
        while not any(path.stat().st_size for path in work.glob("logs/*/metrics.jsonl")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        errors = process.communicate(timeout=300)[1]
    assert process.returncode == 143 and "Traceback" not in errors
    (ended,) = work.glob("logs/*/ended.json")
    assert json.loads(ended.read_text())["reason"].endswith("stopped by SIGTERM")


def test_mistakes_of_the_user_are_told_together(work) -> None:
    Path("images/empty.png").write_bytes(b"")
    done = subprocess.run(command(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "empty.png" in done.stderr and "Traceback" not in done.stderr
    wrong = ["--learnign_rate", "1", "--resolution", "-3", "--train_data_dir", "nowhere"]
    done = subprocess.run(command(*wrong), capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for part in ("did you mean learning_rate", "resolution", "nowhere"):
        assert part in done.stderr


def test_a_loss_that_is_not_a_number_ends_the_run_and_saves_nothing(work, capsys) -> None:
    tensors = load_file("base.safetensors")
    tensors[f"{UNET}out.2.bias"][0] = math.nan
    save_file(tensors, "bad.safetensors")
    options = ["--pretrained_model_name_or_path", "bad.safetensors", "--save_every_n_steps", "1"]
    assert run(*FLOAT32, *options) == 1
    assert "the loss of step 1 is nan" in capsys.readouterr().err
    assert not list(Path("out").glob("*.safetensors"))


def test_running_out_of_memory_names_the_batch_and_the_remedies(work) -> None:
    start = """
import pathlib, resource, sys
import sdxl_finetune.training.loop
from sdxl_finetune.cli import train
used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (5 << 27),) * 2)
train()
"""
    large = ["--resolution", "512", "--max_bucket_reso", "512", "--train_batch_size", "8", "--sample_prompts", ""]
    asked = arguments(*FLOAT32, *large)
    config = load_config(asked, program="sdxl-cache")
    assert config is not None and cache(config) == 0
    done = subprocess.run([sys.executable, "-c", start, *asked], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: out of memory in step 1: ") and "of bucket 512x512" in last
    assert "gradient_checkpointing = true" in last and "train_batch_size = 1" in last
