"""Measures how fast a model trains, and in how much memory.

    python -m scripts.benchmarks.gpu_speed MODEL PICTURES [--batches 1 2 4]

The script makes steps of the real training loop on batches of one repeated picture, so that one run can try many sizes.
It trains both text encoders in bf16 with exact master weights, AdamW8bit, fused_backward_pass and
gradient_checkpointing. It prints a line of JSON for each size until memory runs out: images a second, peak bytes of the
device, seconds of the first steps. gpu_acceptance.py starts it as a process of its own, so that no other work has used
the memory.
"""

import argparse
import dataclasses
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdxl_finetune.batch import Batch, Position
from sdxl_finetune.config import Config, load_config
from sdxl_finetune.errors import UserError, say_errors
from sdxl_finetune.output.log import peak_memory_bytes
from sdxl_finetune.runtime.out_of_memory import OutOfMemory
from sdxl_finetune.runtime.signals import StopRequest
from sdxl_finetune.training.learner import Learner
from sdxl_finetune.training.loop import training_steps
from sdxl_finetune.training.setup import build_run

WARM = 3
"""Steps before the clock starts: the first ones compile, allocate and try out."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, default=8, help="that are measured, of each size")
    parser.add_argument("--seconds", type=float, default=1e9, help="no larger batch is begun after these")
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=225)
    parser.add_argument("--backend", help="compile the U-Net's blocks with it")
    given = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as out:
            config = configured(
                given.model, given.pictures, Path(out), resolution=given.resolution, tokens=given.tokens,
                backend=given.backend,
            )  # fmt: skip
            for row in measure(config, given.batches, steps=given.steps, seconds=given.seconds):
                print(json.dumps(row), flush=True)
    except UserError as error:
        say_errors(*error.problems)
        return 2
    return 0


def configured(
    model: Path, pictures: Path, out: Path, *, resolution: int, tokens: int, backend: str | None = None, batch: int = 1
) -> Config:
    options = {
        "pretrained_model_name_or_path": model,
        "train_data_dir": pictures,
        "output_dir": out,
        "resolution": resolution,
        "max_token_length": tokens,
        "caption_extension": ".txt",
        "train_batch_size": batch,
        "max_train_steps": 10_000,
        "optimizer_type": "AdamW8bit",
        "mixed_precision": "bf16",
        "learning_rate": 1e-7,  # random weights are not to be driven anywhere
        "learning_rate_te1": 1e-7,
        "learning_rate_te2": 1e-7,
        "max_data_loader_n_workers": 0,
        "console_log_level": "WARNING",
        "seed": 0,
    }
    flags = ["full_bf16", "fused_backward_pass", "gradient_checkpointing", "cache_latents", "train_text_encoder"]
    compiling = ["--torch_compile", "--dynamo_backend", backend] if backend else []
    given = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    config = load_config([*given, *(f"--{flag}" for flag in flags), *compiling], program="sdxl-train")
    assert config is not None
    return config


def repeated(batch: Batch, times: int) -> Iterator[Batch]:
    """Yields the same batch for each of `times` steps."""
    for step in range(times):
        yield dataclasses.replace(batch, position=Position(epoch=0, step=step, micro_batch=0, micro_batches_in_step=1))


def measure(config: Config, sizes: Sequence[int], *, steps: int, seconds: float = 1e9) -> Iterator[dict[str, Any]]:
    """Yields the figures of each batch size, until one does not fit or the time is over."""
    began = time.perf_counter()
    with build_run(config) as run:
        first = next(run.batches())
        for size in sizes:
            if time.perf_counter() - began > seconds:
                return
            try:
                yield measured(run.learner, enlarged(first, size), steps)
            except OutOfMemory:
                yield {"batch": size, "out_of_memory": True}
                return


def measured(learner: Learner, batch: Batch, steps: int) -> dict[str, Any]:
    """The figures of `steps` steps on this batch, after WARM steps that are not counted."""
    device, size = learner.accelerator.device, batch.images_in_step
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started, warm = time.perf_counter(), 0.0
    for step in training_steps(learner, repeated(batch, WARM + steps), StopRequest()):
        if step.number == WARM:
            synchronize(device)
            warm, started = time.perf_counter() - started, time.perf_counter()
        loss = step.loss
    synchronize(device)
    speed = size * steps / (time.perf_counter() - started)
    assert math.isfinite(loss.item()), f"the loss is {loss.item()}"
    return {"batch": size, "images_per_second": speed, "peak_bytes": peak_memory_bytes(device), "warm_seconds": warm}


def enlarged(batch: Batch, size: int) -> Batch:
    """`batch` repeated to so many images, as the loader gives it to a device."""
    times = size // len(batch.weights)
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    repeated = {
        name: value.repeat(times, *[1] * (value.ndim - 1))
        for name, value in values.items()
        if isinstance(value, Tensor)
    }
    weights = torch.full((size,), 1 / size)
    larger = dataclasses.replace(batch, **{**repeated, "weights": weights}, images_in_step=size)
    return larger.pin_memory() if torch.cuda.is_available() else larger


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
