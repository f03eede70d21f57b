"""Training with several texts for each image, BREAK, protected tags and dropout groups, interrupted and resumed."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from sdxl_finetune.config import Config, load_config
from sdxl_finetune.training.debug_dataset import draw_dataset
from sdxl_finetune.training.loop import train

CONFIG = """
pretrained_model_name_or_path = "base.safetensors"
train_data_dir = "images"
output_dir = "out"
logging_dir = "logs"
resolution = 64
train_batch_size = 2
max_train_steps = 4
seed = 5
max_data_loader_n_workers = 0
optimizer_type = "SGD"
learning_rate = 0.01
train_text_encoder = true
max_token_length = 150

caption_sources = ".txt:0.5, .json#caption:0.5:whole"
caption_break = true
shuffle_caption = true
caption_tag_dropout_rate = 0.3
protected_tags_file = "protected.txt"

[caption_tag_dropout_groups]
cat = ["whiskers"]
"""


@pytest.fixture
def work(tmp_path, monkeypatch, base, write_images) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.safetensors").symlink_to(base)
    write_images(tmp_path / "images", {f"{number}.png": (64, 64) for number in range(4)})
    for number in range(4):
        (tmp_path / "images" / f"{number}.txt").write_text(f"best quality, cat, whiskers, {number} BREAK a, b, c")
        long = " ".join(["A cat sits on a chair."] * (40 if number == 0 else 1))
        (tmp_path / "images" / f"{number}.json").write_text(json.dumps({"caption": long}))
    (tmp_path / "protected.txt").write_text("best quality\n")
    (tmp_path / "c.toml").write_text(CONFIG)
    return tmp_path


def config(*more: str) -> Config:
    built = load_config(["--config", "c.toml", *more], program="sdxl-train")
    assert built is not None
    return built


def run(*more: str) -> dict[str, torch.Tensor]:
    try:
        assert train(config(*more)) == 0
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    return load_file("out/last.safetensors")


def test_a_resumed_run_draws_the_same_captions(work, caplog) -> None:
    with caplog.at_level(logging.INFO):
        whole = run("--save_every_n_steps", "2", "--save_state")
    assert "4 images; caption source .txt in 4, .json#caption in 4, none in 0" in caplog.text
    assert caplog.text.count("captions: max_token_length = 150 cuts off") == 1
    other = run("--caption_sources", ".txt", "--output_name", "last")
    assert any(not torch.equal(whole[name], other[name]) for name in whole)
    Path("out/last.safetensors").unlink()
    (state,) = Path("out").glob("*2-state")
    resumed = run("--resume", str(state))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_cached_outputs_of_several_sources_train(work) -> None:
    more = ["--cache_text_encoder_outputs", "--no-train_text_encoder", "--text_encoder_outputs_variants", "4"]
    first = run(*more, "--max_train_steps", "2")
    shutil.rmtree("out")
    again = run(*more, "--max_train_steps", "2")
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_debug_dataset_shows_the_captions_as_they_are_drawn(work, caplog) -> None:
    with caplog.at_level(logging.INFO):
        assert draw_dataset(config()) == 0
    assert Path("out/debug_dataset.png").is_file()
    drawn = [record.getMessage() for record in caplog.records if ".png, " in record.getMessage()]
    sentences = [text for text in drawn if "A cat sits on a chair." in text]
    assert 0 < len(sentences) < len(drawn)
    for text in set(drawn) - set(sentences):
        assert "best quality" in text and "BREAK" in text
        assert "whiskers" not in text or "cat" in text
