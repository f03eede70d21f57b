"""Training with masks, and the picture of debug_dataset."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from safetensors.torch import load_file

from sdxl_finetune.commands.cache import cache
from sdxl_finetune.commands.check import check
from sdxl_finetune.config import Config, load_config
from sdxl_finetune.errors import UserError
from sdxl_finetune.output.contact_sheet import HEADING_COLORS
from sdxl_finetune.training.checks import index_images
from sdxl_finetune.training.debug_dataset import STRIPES
from sdxl_finetune.training.loop import train

OPTIONS = ["--train_data_dir", "images", "--output_dir", "out", "--logging_dir", "logs", "--resolution", "64"]
OPTIONS += ["--train_batch_size", "4", "--max_train_steps", "1", "--seed", "5", "--max_data_loader_n_workers", "0"]
OPTIONS += ["--min_bucket_reso", "32", "--bucket_reso_steps", "32", "--caption_extension", ".txt", "--enable_bucket"]
MASKED = ["--masked_loss", "--conditioning_data_dir", "masks"]


@pytest.fixture
def work(tmp_path, monkeypatch, base, write_images) -> Path:
    """Four images of one bucket, with masks that hide their left halves."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.safetensors").symlink_to(base)
    write_images(tmp_path / "images", {f"{number}.png": (64, 64) for number in range(4)})
    (tmp_path / "masks").mkdir()
    half = np.zeros((64, 64), np.uint8)
    half[:, 32:] = 255
    for path in sorted((tmp_path / "images").iterdir()):
        path.with_suffix(".txt").write_text(f"picture number {path.stem}, cat, dog")
        Image.fromarray(half).save(tmp_path / "masks" / path.name)
    return tmp_path


def config(*more: str) -> Config:
    model = [] if "--pretrained_model_name_or_path" in more else ["--pretrained_model_name_or_path", "base.safetensors"]
    built = load_config([*OPTIONS, *model, *more], program="sdxl-train")
    assert built is not None
    return built


def run(*more: str) -> float:
    """The loss of the only step."""
    before = set(Path("logs").glob("*")) if Path("logs").exists() else set()
    assert train(config(*more)) == 0
    (log,) = set(Path("logs").glob("*")) - before
    return float(json.loads((log / "metrics.jsonl").read_text().splitlines()[0])["loss"])


def weights() -> dict[str, torch.Tensor]:
    return load_file("out/last.safetensors")


def test_only_what_the_masks_show_is_trained(work) -> None:
    """Black masks give loss 0 and change no weight. Masks of one half and of the other half add up to no masks."""
    whole, right = run(), run(*MASKED)
    for path in Path("masks").iterdir():
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    left = run(*MASKED)
    assert right + left == pytest.approx(whole, rel=1e-5) and 0.2 * whole < right < 0.8 * whole
    for path in Path("masks").iterdir():
        Image.new("L", (64, 64)).save(path)
    assert (
        run(*MASKED, "--optimizer_type", "SGDNesterov", "--optimizer_args", "momentum=0.9", "--learning_rate", "1")
        == 0.0
    )
    start = load_file("base.safetensors")
    assert all(torch.equal(value.float(), start[name].float()) for name, value in weights().items())


def test_alpha_masks_and_cached_masks_give_the_losses_of_mask_files(work) -> None:
    """A run with masks finds the latents of a run without masks, and the other way round."""
    expected = run(*MASKED)
    assert cache(config("--cache_latents_to_disk")) == 0
    latents = sorted(Path("out/cache/latents").glob("*/*.latents"))
    cached = run(*MASKED, "--cache_latents_to_disk")
    assert cached == pytest.approx(expected, rel=0.01), "cached latents are other samples of the VAE's distribution"
    assert sorted(Path("out/cache/latents").glob("*/*.latents")) == latents
    assert run(*MASKED, "--cache_latents") == cached
    for path in sorted(Path("images").glob("*.png")):
        with Image.open(path) as image, Image.open(Path("masks") / path.name) as mask:
            image.putalpha(mask)
            image.save(path)
    assert run("--alpha_mask") == pytest.approx(expected, rel=1e-6), "no loss weight and no masked_loss are needed"


def test_validation_applies_the_masks(work) -> None:
    def validation(*more: str) -> float:
        options = ["--validation_split", "0.5", "--validate_every_n_steps", "1", *more]
        before = set(Path("logs").glob("*")) if Path("logs").exists() else set()
        assert train(config(*options)) == 0
        (log,) = set(Path("logs").glob("*")) - before
        rows = [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]
        return next(row["validation"]["loss"] for row in rows if "validation" in row)

    whole, masked = validation(), validation(*MASKED)
    assert 0.2 * whole < masked < 0.8 * whole


def test_unusable_masks_are_reported_by_every_program(work, capsys) -> None:
    (work / "masks" / "0.png").unlink()
    Image.new("L", (32, 32)).save(work / "masks" / "3.png")
    for program in (train, cache):
        with pytest.raises(UserError) as caught:
            program(config(*MASKED, "--cache_latents_to_disk"))
        assert [Path(problem.file).name for problem in caught.value.problems] == ["0.png", "3.png"]
    assert check(config(*MASKED)) == 2
    printed = capsys.readouterr().out
    assert "its mask is missing" in printed and "the mask has 32x32 pixels" in printed


def test_a_missing_folder_of_masks_is_one_problem(work) -> None:
    options = [*OPTIONS, "--pretrained_model_name_or_path", "base.safetensors", "--masked_loss"]
    done = subprocess.run(
        [sys.executable, "-m", "sdxl_finetune", *options, "--conditioning_data_dir", "none"],
        capture_output=True,
        text=True,
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and len(errors) == 1 and "conditioning_data_dir = 'none': no such folder" in errors[0]


def test_alpha_masks_of_opaque_images_are_remarked_once(work, caplog) -> None:
    """One image with an alpha channel is enough to be silent."""
    index_images(config("--alpha_mask"))
    (said,) = [record.getMessage() for record in caplog.records if "alpha_mask" in record.getMessage()]
    assert "none of the images looked at (4) has an alpha channel" in said
    caplog.clear()
    with Image.open("images/2.png") as image:
        image.convert("RGBA").save("images/2.png")
    index_images(config("--alpha_mask"))
    assert "alpha channel" not in caplog.text


def test_debug_dataset_draws_the_first_batches_and_loads_no_model(work) -> None:
    (work / "none.safetensors").touch()
    command = [sys.executable, "-m", "sdxl_finetune", *OPTIONS, *MASKED, "--debug_dataset", "--shuffle_caption"]
    command += ["--pretrained_model_name_or_path", "none.safetensors", "--cache_latents", "--flip_aug"]
    command += ["--train_batch_size", "3", "--max_train_steps", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the first batches are drawn in out/debug_dataset.png" in done.stdout + done.stderr
    said = done.stdout + done.stderr
    assert [said.count(f"step {number} epoch") for number in (1, 2, 3, 4)] == [1, 1, 1, 0]
    assert said.count("images/0.png, 64 x 64, nothing cut off") in (1, 2) and "picture number" in said
    assert {path.name for path in (work / "out").iterdir()} == {"cache", "debug_dataset.png"}
    assert not (work / "logs").exists()
    with Image.open("out/debug_dataset.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    (top,) = np.flatnonzero((pixels[:, 0] == ImageColor.getrgb(HEADING_COLORS[1])).all(axis=1))[:1]
    assert top > 100, "the legend stands above the first heading"
    shown = pixels[top + 50 : top + 160]  # within the first row of images
    purple = (shown[..., 2] - shown[..., 1] > 0.7 * STRIPES[1][2]) & (
        shown[..., 0] - shown[..., 1] > 0.7 * STRIPES[1][0]
    )
    assert 0.05 < purple.mean() < 0.5, "stripes over the hidden halves"
