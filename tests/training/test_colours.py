"""The colour check: figures are those of the pixels, training does not notice it, and a drift is warned of once."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sdxl_finetune.output.colours import compare, measure
from sdxl_finetune.training.colours import ColourCheck
from sdxl_finetune.training.setup import build_run
from tests.training.toy_runs import OPTIONS, config, losses, run, use_toy

CHECK = ["--colour_check_every_n_steps", "2", "--colour_check_images", "3"]
HELD_OUT = ["--validation_split", "0.4"]


@given(st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=1, max_size=12))
def test_figures_are_mean_and_deviation_of_brightness_and_mean_range_of_colours(pixels) -> None:
    levels = np.asarray(pixels, np.float64) / 255
    luma = levels @ (0.2126, 0.7152, 0.0722)
    images = torch.tensor(np.asarray(pixels).T, dtype=torch.float32)[None, :, None] / 127.5 - 1
    expected = [luma.mean(), luma.std(), np.ptp(levels, axis=1).mean()]
    assert measure(images)[0].tolist() == pytest.approx(expected, abs=1e-5)
    assert measure(images * 9)[0].tolist() == measure((images * 9).clamp(-1, 1))[0].tolist()


def test_a_drift_needs_more_than_the_bound_and_more_than_chance() -> None:
    images = np.tile([0.5, 0.2, 0.3], (4, 1))
    drawn = images + [[-0.2, 0.3, 0.01]] * 4 + np.outer([-1, 1, -1, 1], [0.01, 0.6, 0])
    mean, contrast, saturation = compare(drawn, images)
    assert mean.is_beyond(0.1) and not mean.is_beyond(0.21)
    assert str(mean) == "darker (mean 0.30 instead of 0.50)"
    assert contrast.value == pytest.approx(0.3) and not contrast.is_beyond(0.1), "twice the standard error is 0.69"
    assert saturation.value == pytest.approx(0.01) and saturation.error == pytest.approx(0)


def colour_rows(rows: list[dict]) -> dict[int, dict]:
    return {row["step"]: row["colours"] for row in rows if "colours" in row}


def digest(path: str) -> str:
    """A hash of all tensors of a checkpoint."""
    tensors = load_file(path)
    return hashlib.sha256(b"".join(tensors[key].numpy().tobytes() for key in sorted(tensors))).hexdigest()


@pytest.mark.parametrize("held_out", [[], HELD_OUT], ids=["training images", "held out"])
def test_training_is_the_same_with_and_without_the_check(work, held_out) -> None:
    use_toy(work)
    options = [*held_out, "--train_text_encoder", "--caption_dropout_rate", "0.3"]
    plain = run(*options)
    expected = digest("out/last.safetensors")
    checked = run(*options, *CHECK, "--sample_sampler", "euler_a")
    assert losses(checked) == losses(plain) and digest("out/last.safetensors") == expected
    figures = colour_rows(checked)
    assert list(figures) == [0, 2, 4] and not colour_rows(plain)
    assert figures[0]["images/mean"] == figures[4]["images/mean"], "the images stay the same"
    assert figures[0]["drawn/mean"] != figures[4]["drawn/mean"]
    for each in figures.values():
        assert each["drift/contrast"] == pytest.approx(each["drawn/contrast"] - each["images/contrast"])
    events = EventAccumulator(str(next(Path("logs").rglob("events*")).parent)).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("colours/")]
    assert len(tags) == 9 and [event.step for event in events.Scalars("colours/drift/mean")] == [0, 2, 4]


def test_images_are_measured_as_they_are_and_with_cached_text_and_without_cached_latents(work) -> None:
    """The toy's VAE changes these pictures a little. Their latents and captions may come from caches or not."""
    use_toy(work)
    for number, path in enumerate(sorted(Path("images").rglob("*.*"))):
        if path.suffix != ".txt":
            Image.new("RGB", (64, 64), [(250, 250, 250), (12, 12, 12)][number % 2]).save(path)
    every = [*CHECK, "--colour_check_images", "50", "--max_train_steps", "2"]
    means = [
        colour_rows(run(*every, *options))[0]
        for options in ([], ["--cache_text_encoder_outputs"], ["--no-cache_latents"])
    ]
    for figures in means:
        assert figures["images/contrast"] < 0.05 and figures["images/saturation"] < 0.1
    for other in means[1:]:  # cached outputs are in float16
        assert other == pytest.approx(means[0], abs=0.02)


def test_a_drift_is_warned_of_once_before_and_once_after_the_first_step(work, caplog) -> None:
    use_toy(work)
    run(*CHECK, "--colour_check_bound", "0.9")
    assert "colour_check_bound" not in caplog.text
    many = ["--colour_check_images", "8", "--sample_sampler", "euler"]
    run(*CHECK, *many, "--colour_check_bound", "0.001", "--v_parameterization", "--max_train_steps", "6")
    warnings = [record.message for record in caplog.records if "beyond colour_check_bound = 0.001" in record.message]
    assert len(warnings) == 2
    assert warnings[0].startswith("colours after step 0: drawn pictures are ")
    assert "Before the first step" in warnings[0] and "Before the first step" not in warnings[1]
    assert all("zero_terminal_snr or v_parameterization differ" in warning for warning in warnings)


def test_a_failure_is_reported_and_the_run_goes_on(work, caplog) -> None:
    use_toy(work)
    with build_run(config(*CHECK)) as built:
        assert isinstance(built.colours, ColourCheck)
        with torch.no_grad():
            built.learner.sdxl.unet.conv_out.bias.fill_(torch.nan)
        assert built.colours(built.learner) == []
    assert "colours: the model gave values that are infinite or not a number" in caplog.text


def test_two_processes_share_the_pictures(work) -> None:
    """The figures are those of one process, apart from rounding."""
    use_toy(work)
    alone = colour_rows(run(*CHECK, "--max_train_steps", "2"))[0]
    words = [*OPTIONS, *CHECK, "--max_train_steps", "2", "--output_dir", "out2", "--logging_dir", "logs2"]
    launch = [Path(sys.executable).with_name("accelerate"), "launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0", "-m", "sdxl_finetune"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *words], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (log,) = Path("logs2").glob("*/metrics.jsonl")
    shared = colour_rows([json.loads(line) for line in log.read_text().splitlines()])[0]
    assert shared == pytest.approx(alone, abs=1e-4)
