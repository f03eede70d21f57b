"""Validation: a function of weights and held out images alone, which training does not notice."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sdxl_finetune.config import Config, load_config, load_datasets
from sdxl_finetune.data.hold_out import hold_out
from sdxl_finetune.data.index import build_index
from sdxl_finetune.training.loop import train
from sdxl_finetune.training.setup import build_run

DATA = """
[[datasets]]
resolution = 64
batch_size = 2
  [[datasets.subsets]]
  image_dir = "images"
  shuffle_caption = true
  caption_dropout_rate = 0.5

[[datasets]]
resolution = 96
batch_size = 2
validation_split = 1.0
  [[datasets.subsets]]
  image_dir = "others"
"""


@pytest.fixture
def work(tmp_path, monkeypatch, base, write_images) -> Path:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", {f"{number}.png": (64, 64) for number in range(8)})
    write_images(tmp_path / "others", {f"{number}.png": (96, 96) for number in range(3)}, seed=50)
    for path in (tmp_path / "images").iterdir():
        path.with_suffix(".caption").write_text(f"{path.stem}, cat, dog, tree")
    (tmp_path / "data.toml").write_text(DATA)
    return tmp_path


def config(base: Path, *options: str) -> Config:
    places = ["--output_dir", "out", "--logging_dir", "logs", "--pretrained_model_name_or_path", str(base)]
    small = ["--min_bucket_reso", "64", "--max_train_steps", "6", "--seed", "5", "--max_data_loader_n_workers", "0"]
    built = load_config([*places, *small, *options], program="sdxl-train")
    assert built is not None
    return built


def run(base: Path, *options: str) -> list[dict]:
    """The rows of metrics.jsonl that validations wrote."""
    before = set(Path("logs").glob("*")) if Path("logs").exists() else set()
    try:
        assert train(config(base, *options)) == 0
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    (log,) = set(Path("logs").glob("*")) - before
    rows = [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]
    log.rename(log.with_name(f"{len(before)}"))
    return [row for row in rows if "validation" in row]


FOLDER = ["--train_data_dir", "images", "--resolution", "64", "--train_batch_size", "2"]


def test_the_share_asked_for_is_held_out(base, work) -> None:
    with build_run(config(base, *FOLDER, "--validation_split", "0.25")) as built:
        index = built.dataset.index
        assert index.held_out.sum() == 2 and (index.repeats[index.held_out] == 0).all()
        used = {int(row) for batch in built.timeline.plan.micro_batches(0, 6) for row in batch.rows}
        assert used == set(np.flatnonzero(~index.held_out).tolist())
        assert "2 held out for validation" in index.describe()


def test_what_is_held_out_stays_when_others_come() -> None:
    def chosen(names: list[bytes], **options) -> set[bytes]:
        return {names[place] for place in hold_out(names, **{"share": 0.1, "seed": 0, **options})}

    names = [f"some/where/{number}.png".encode() for number in range(400)]
    first, more = chosen(names[:200]), chosen(names)
    assert len(first) == 20 and len(more) == 40
    assert len(first & more) >= 12
    assert chosen(names[:200], seed=1) != first
    assert chosen([f"else/{name.decode()}".encode() for name in names[:200]]) == {b"else/" + name for name in first}
    assert len(chosen(names[:3], share=0.01)) == 1


def test_the_share_is_of_all_folders_but_those_of_regularisation(base, work, write_images) -> None:
    """Not one image at least of each folder: an artist's four would soon be three."""
    for folder in range(20):
        write_images(
            work / "artists" / f"1_artist{folder}", {f"{at}.png": (64, 64) for at in range(4)}, seed=4 * folder
        )
    write_images(work / "regular" / "1_girl", {f"{at}.png": (64, 64) for at in range(8)}, seed=90)
    options = ["--train_data_dir", "artists", "--reg_data_dir", "regular", "--validation_split", "0.05"]
    index = build_index(load_datasets(config(base, *options, "--resolution", "64")), work / "cache", "stop")
    held = [index[int(row)].path.parent.name for row in np.flatnonzero(index.held_out)]
    assert len(held) == 4 and len(set(held)) > 1 and "1_girl" not in held


@pytest.mark.parametrize("cache", [["--cache_latents"], []])
def test_training_does_not_notice(base, work, cache: list[str]) -> None:
    """Bit for bit; and a validation may come after every step or only at the end, its figures are the same."""
    often = [*FOLDER, *cache, "--validation_split", "0.25", "--validate_every_n_steps", "1", "--flip_aug"]
    every = run(base, *often)
    first = load_file("out/last.safetensors")
    ends = run(base, *often[:-3], "--validate_every_n_steps", "100", "--flip_aug")
    second = load_file("out/last.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [row["step"] for row in every] == list(range(7)) and [row["step"] for row in ends] == [0, 6]
    assert [every[0], every[6]] == ends
    assert len({row["validation"]["loss"] for row in every}) == 7


def test_figures_can_be_compared_between_runs(base, work) -> None:
    """Other seeds, noise, loss weights and batch sizes of the training give the same figure of the same weights."""
    asked = [*FOLDER, "--cache_latents", "--validation_split", "0.25", "--max_train_steps", "1", "--shuffle_caption"]
    plain = run(base, *asked)[0]["validation"]
    changed = ["--seed", "9", "--noise_offset", "0.1", "--min_snr_gamma", "5", "--caption_dropout_rate", "0.5"]
    changed += ["--multires_noise_iterations", "3", "--train_batch_size", "1", "--loss_type", "huber", "--flip_aug"]
    changed += ["--edm2_loss_weighting", "--loss_multiplier", "2"]
    assert run(base, *asked, *changed)[0]["validation"] == pytest.approx(plain, rel=1e-5)
    assert run(base, *asked, "--validation_seed", "1")[0]["validation"]["loss"] != plain["loss"]
    assert plain.keys() == {"loss", "loss/t125", "loss/t375", "loss/t625", "loss/t875"}
    assert plain["loss"] == pytest.approx(np.mean([plain[f"loss/t{at}"] for at in (125, 375, 625, 875)]))


def test_a_dataset_of_its_own(base, work) -> None:
    rows = run(base, "--dataset_config", "data.toml", "--validation_split", "0.25", "--validation_timesteps", "2")
    values = rows[0]["validation"]
    assert values.keys() == {"loss", "loss/t250", "loss/t750", "loss/dataset0", "loss/dataset1"}
    expected = (2 * values["loss/dataset0"] + 3 * values["loss/dataset1"]) / 5
    assert values["loss"] == pytest.approx(expected, rel=1e-6)
    assert [row["step"] for row in rows] == [0, 3, 6], "after each epoch, if nothing else is asked for"
    log = EventAccumulator("logs/0/finetuning").Reload()
    assert [one.step for one in log.Scalars("validation/loss")] == [0, 3, 6]
    limited = run(base, "--dataset_config", "data.toml", "--validation_split", "0.25", "--max_validation_steps", "1")
    assert {name for name in limited[0]["validation"] if "dataset" in name} == set()


def test_the_average_is_validated_unless_told_otherwise(base, work) -> None:
    asked = [*FOLDER, "--cache_latents", "--validation_split", "0.25", "--learning_rate", "1e-3"]
    plain = run(base, *asked)[-1]
    slow = run(base, *asked, "--ema_half_life", "100000")[-1]
    weights = run(base, *asked, "--ema_half_life", "100000", "--no-ema_validation")[-1]
    assert weights == plain != slow
