"""What sdxl-check says of memory is what a step then takes."""

import time
from pathlib import Path

import pytest

from scripts.benchmarks.memory import GRID, build_config, compare
from sdxl_finetune.commands.memory_estimate import BatchShape, estimate
from sdxl_finetune.commands.memory_report import GiB, fits
from sdxl_finetune.config import Config
from sdxl_finetune.model.architecture import FULL
from sdxl_finetune.model.random_model import TINY, build_random_model

NEEDS = {"train_text_encoder": True, "cache_latents": True, "learning_rate": 1e-5}
LEAST = {
    "full_bf16": True,
    "mixed_precision": "bf16",
    "optimizer_type": "AdamW8bit",
    "fused_backward_pass": True,
    "gradient_checkpointing": True,
}


@pytest.mark.parametrize(
    "name", ["float32 AdamW", "float32 activations", "float32 activations checkpointing", "bf16 AdamW8bit fused"]
)
def test_what_the_allocator_gives_out(name: str, tmp_path: Path) -> None:
    foretold, measured = compare(build_config(tmp_path, *GRID[name]))
    assert foretold == pytest.approx(measured, rel=0.1)


def test_the_full_size() -> None:
    """20.0 GiB of private memory was the peak of a process that trained SDXL, U-Net and both encoders, with these
    settings on a CPU: tensors, and what Python and the libraries take besides. Nothing of that size is allocated here.
    """
    started = time.process_time()
    found = estimate(Config(**NEEDS, **LEAST), FULL, BatchShape(1, 128, 128), cuda=False)
    assert found.total == pytest.approx(20.0 * GiB, rel=0.1)
    parameters = 2_567_463_684 + 115_561_728 + 694_659_840
    kept = found.parts["weights"] + found.parts["masters"] + found.parts["optimizer states"]
    assert kept / parameters == pytest.approx(6.03, rel=0.01)
    assert time.process_time() - started < 60


def test_settings_save_what_they_promise() -> None:
    shape, usual = BatchShape(2, 256, 256), Config(**NEEDS)
    most = estimate(usual, TINY, shape, cuda=True)
    parameters = most.parts["weights"] // 4
    states = most.parts["optimizer states"] / 2
    assert most.parts["weights"] == pytest.approx(states, rel=0.01)
    less = estimate(usual.model_copy(update=LEAST), TINY, shape, cuda=True)
    for part in ("weights", "masters"):
        assert less.parts[part] == pytest.approx(2 * parameters, rel=0.01)
    assert less.total < 0.7 * most.total
    kept = estimate(usual.model_copy(update={"gradient_checkpointing": True}), TINY, BatchShape(8, 256, 256), cuda=True)
    assert kept.total < estimate(usual, TINY, BatchShape(8, 256, 256), cuda=True).total


def test_cached_text_encoder_outputs_take_the_encoders_off_a_gpu() -> None:
    shape, plain = BatchShape(1, 64, 64), Config(cache_latents=True, learning_rate=1e-5)
    cached = plain.model_copy(update={"cache_text_encoder_outputs": True})
    model = build_random_model(TINY, seed=0)[0]
    encoders = 4 * sum(parameter.numel() for part in (model.te1, model.te2) for parameter in part.parameters())
    saved = {
        cuda: estimate(plain, TINY, shape, cuda=cuda).parts["weights"]
        - estimate(cached, TINY, shape, cuda=cuda).parts["weights"]
        for cuda in (True, False)
    }
    assert saved[True] == pytest.approx(encoders, rel=0.01) and saved[False] == 0, "a CPU run keeps them in its memory"


def test_a_card_that_is_too_small_is_told_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, config = BatchShape(2, 256, 256), Config(**NEEDS)
    monkeypatch.setattr("sdxl_finetune.commands.memory_report.CARDS", (0.001, 1.35, 80))
    said = list(fits(config, TINY, shape, estimate(config, TINY, shape, cuda=True), 1))
    assert said[0] == "fits a card of 80 GB"
    assert said[1].startswith("does not fit 1.35 GB; would with gradient_checkpointing = true")
    assert said[2].startswith("does not fit 0.001 GB, nor with") and "train_batch_size = 1" in said[2]


@pytest.mark.parametrize("autocast", [False, True])
def test_attention_keeps_no_scores(autocast: bool) -> None:
    """Four times the positions take four times the memory, and not sixteen times."""
    config = Config(**NEEDS, mixed_precision="bf16" if autocast else "no", optimizer_type="AdamW8bit")
    config = config.model_copy(update={"train_text_encoder": False, "fused_backward_pass": True})
    small, large = (estimate(config, TINY, BatchShape(1, side, side), cuda=False).total for side in (512, 1024))
    assert small < large < 5 * small
