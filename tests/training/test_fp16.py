"""Training in float16, on a CPU: as in float32, through overflows, and exactly on after a resume."""

import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from scripts.benchmarks.interrupt import differences, read_metrics, saved_names
from sdxl_finetune.config import load_config
from sdxl_finetune.optim import loss_scale
from sdxl_finetune.output import watch
from sdxl_finetune.training.loop import train
from tests.training.test_resume import arguments, forget, refusal
from tests.training.toy_runs import read_rows

FLOAT32 = ["--mixed_precision", "no"]
FP16 = ["--mixed_precision", "fp16"]
KINDS = {"mixed precision": FP16, "full_fp16": [*FP16, "--full_fp16"]}
SGD = ["--optimizer_type", "SGD", "--learning_rate", "0.02", "--learning_rate_te1", "0", "--learning_rate_te2", "0"]
QUICK = ["--resolution", "64", "--max_bucket_reso", "64", "--validation_split", "0", "--ema_half_life", ""]
QUICK += ["--gradient_accumulation_steps", "1", "--train_batch_size", "4", "--no-flip_aug", "--save_every_n_steps", ""]


def run(folder: str, *more: str) -> list[dict]:
    """Trains, and returns the rows of the log."""
    config = load_config(arguments(folder, *QUICK, *more), program="sdxl-train")
    assert config is not None
    try:
        assert train(config) == 0
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    return read_rows(f"{folder}/logs")


def change(folder: str) -> torch.Tensor:
    """The change of the U-Net's weights."""
    start, end = load_file("base.safetensors"), load_file(f"{folder}/out/style.safetensors")
    changes = [(end[key] - start[key].float()).flatten() for key in end if key.startswith("model.diffusion_model.")]
    return torch.cat(changes)


@pytest.mark.parametrize("kind", KINDS)
def test_float16_trains_as_float32_and_the_loss_falls(work, kind: str) -> None:
    options = [*SGD, "--max_train_steps", "8", "--no-save_state"]
    exact, rows = run("float32", *options, *FLOAT32), run("float16", *options, *KINDS[kind])
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in exact], rel=5e-3)
    assert [row["grad_norm"] for row in rows] == pytest.approx([row["grad_norm"] for row in exact], rel=2e-2)
    expected, found = change("float32"), change("float16")
    assert (found - expected).norm() < 0.02 * expected.norm()
    again = run("still", *options, *FP16, "--learning_rate", "1e-12")
    assert sum(row["loss"] for row in rows[-3:]) < sum(row["loss"] for row in again[-3:]), "without any learning"
    assert {row["loss_scale"] for row in rows} == {65536}


@pytest.mark.parametrize("kind", KINDS)
def test_overflows_are_skipped_and_a_resume_goes_on_exactly(work, monkeypatch, caplog, kind: str) -> None:
    """The scale starts so high that gradients overflow. The state is saved before the last overflow."""
    monkeypatch.setattr(loss_scale, "START", 2.0**22)
    options = [*KINDS[kind], "--optimizer_type", "AdamW", "--save_every_n_steps", "1", "--max_train_steps", "5"]
    options += ["--save_every_n_epochs", "", "--save_last_n_steps", ""]
    rows = run("one", *options)
    skipped = [row["grad_norm"] is None for row in rows]
    assert skipped[0] and not all(skipped)
    for row, is_skipped in zip(rows, skipped, strict=True):
        assert (row["update/unet"] == 0) == is_skipped
    count, last = sum(skipped), skipped[-1]
    assert rows[-1]["loss_scale"] in {2.0**22 / 2**count, 2.0**22 / 2 ** (count - last)}
    assert caplog.text.count("was skipped") == count
    shutil.copytree("one", "other")
    forget("other", *(name for name in saved_names(Path("other")) if name != "style-step00000001-state"))
    run("other", *options, "--resume", "auto")
    assert read_metrics(Path("other")) == read_metrics(Path("one")) and differences(Path("one"), Path("other")) == []
    if kind == "full_fp16":
        state = load_file("one/out/style-step00000005-state/weights.safetensors")
        unet = [value for name, value in state.items() if name.startswith("model.diffusion_model.")]
        assert {value.dtype for value in unet} == {torch.float32}
        assert any(not torch.equal(value, value.half().float()) for value in unet)
        said = refusal("one", *QUICK, *options, "--no-full_fp16", "--resume", "one/out/style-step00000001-state")
        assert "full_fp16 = True" in said


def test_gradients_that_overflow_at_any_scale_end_the_run(work, monkeypatch, capsys) -> None:
    monkeypatch.setattr(loss_scale.LossScale, "scaled", lambda scale, loss: loss * torch.inf)
    monkeypatch.setattr(watch, "SMALLEST_LOSS_SCALE", 2.0**14)
    config = load_config(arguments("one", *QUICK, *FP16, "--max_train_steps", "100"), program="sdxl-train")
    assert config is not None and train(config) == 1
    assert "the gradient norm of step 3 is" in capsys.readouterr().err
    assert not list(Path("one/out").glob("style.safetensors"))
