"""Measures how fast a model trains, and the memory that it needs.

    python -m scripts.benchmarks.gpu_speed MODEL PICTURES [--batches 1 2 4] [--backend inductor] [--profile 4]

The script makes steps of the real training loop with batches that repeat one image, so that one run can try many batch
sizes. It uses bf16 with exact masters, AdamW8bit, fused_backward_pass and gradient_checkpointing, and trains both text
encoders. For each batch size it prints a line of JSON: images per second, peak bytes of tensors, bytes that torch
reserved on the GPU, and seconds of the first steps. It stops when a batch does not fit.

With `--profile` it prints the kernels that took most time in a step of this batch size. With `--backend` it then
compiles the U-Net's blocks, and measures batch size 1 and the fastest again. gpu_acceptance.py starts this script as a
process of its own, so that no other memory is in use.
"""

import argparse
import dataclasses
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdxl_finetune.batch import Batch, Position
from sdxl_finetune.config import Config, load_config
from sdxl_finetune.errors import UserError, say_errors
from sdxl_finetune.model.compilation import check_compiler, compile_blocks, compiler_failures
from sdxl_finetune.output.log import peak_memory_bytes
from sdxl_finetune.runtime.out_of_memory import OutOfMemory
from sdxl_finetune.runtime.signals import StopRequest
from sdxl_finetune.training.learner import Learner
from sdxl_finetune.training.loop import training_steps
from sdxl_finetune.training.setup import build_run

WARM_UP_STEPS = 3
"""Steps before the measurement. They compile the model, allocate memory and choose algorithms."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="checkpoint")
    parser.add_argument("pictures", type=Path, help="folder of images with captions")
    parser.add_argument("--batches", type=int, nargs="+", default=[1], help="batch sizes (default: 1)")
    parser.add_argument("--steps", type=int, default=8, help="measured steps of each batch size (default: 8)")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no larger batch size after this time")
    parser.add_argument("--resolution", type=int, default=1024, help="pixels (default: 1024)")
    parser.add_argument("--tokens", type=int, default=225, help="tokens of a caption (default: 225)")
    parser.add_argument("--backend", help="measure compiled blocks too, with this backend")
    parser.add_argument("--profile", type=int, metavar="BATCH", help="print the slowest kernels of a step")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as out:
            config = build_config(
                arguments.model, arguments.pictures, Path(out), resolution=arguments.resolution,
                tokens=arguments.tokens,
            )  # fmt: skip
            with build_run(config) as run:
                print_figures(run.learner, next(run.batches()), arguments)
    except UserError as error:
        say_errors(*error.problems)
        return 2
    return 0


def print_figures(learner: Learner, first: Batch, arguments: argparse.Namespace) -> None:
    rows = []
    for row in measure(learner, first, arguments.batches, arguments.steps, arguments.seconds):
        print(json.dumps(row), flush=True)
        rows.append(row)
    if arguments.profile:
        print(slowest_kernels(learner, enlarge(first, arguments.profile)), flush=True)
    if arguments.backend:
        for row in measure_compiled(learner, first, rows, arguments.steps, arguments.backend):
            print(json.dumps(row), flush=True)


def build_config(model: Path, pictures: Path, out: Path, *, resolution: int, tokens: int, batch: int = 1) -> Config:
    """Builds the config that is measured."""
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
        "learning_rate": 1e-7,  # small, so that random weights do not diverge
        "learning_rate_te1": 1e-7,
        "learning_rate_te2": 1e-7,
        "max_data_loader_n_workers": 0,
        "console_log_level": "WARNING",
        "seed": 0,
    }
    flags = ["full_bf16", "fused_backward_pass", "gradient_checkpointing", "cache_latents", "train_text_encoder"]
    values = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    config = load_config([*values, *(f"--{flag}" for flag in flags)], program="sdxl-train")
    assert config is not None
    return config


def repeat(batch: Batch, steps: int) -> Iterator[Batch]:
    """Yields the batch for each of `steps` optimizer steps."""
    for step in range(steps):
        yield dataclasses.replace(batch, position=Position(epoch=0, step=step, micro_batch=0, micro_batches_in_step=1))


def measure(
    learner: Learner, first: Batch, sizes: Sequence[int], steps: int, seconds: float = 1e9, *, compiled: bool = False
) -> Iterator[dict[str, Any]]:
    """Yields the results of each batch size, until one does not fit or the time is over. `first` has one image.

    `compiled` says whether the blocks are compiled.
    """
    began = time.perf_counter()
    for size in sizes:
        if size != sizes[0] and time.perf_counter() - began > seconds:
            return
        try:
            yield {**measure_batch(learner, enlarge(first, size), steps), "compiled": compiled}
        except OutOfMemory:
            yield {"batch": size, "out_of_memory": True, "compiled": compiled}
            return


def measure_compiled(
    learner: Learner, first: Batch, rows: Sequence[Mapping[str, Any]], steps: int, backend: str
) -> Iterator[dict[str, Any]]:
    """Compiles the blocks, and yields the results of batch size 1 and of the fastest in `rows`.

    A compiler that does not work gives a row with the key `failure`.
    """
    fitting = [row for row in rows if "out_of_memory" not in row]
    if not fitting:
        return
    sizes = sorted({1, max(fitting, key=lambda row: row["images_per_second"])["batch"]})
    try:
        check_compiler(backend, learner.accelerator.device)
        with compiler_failures(backend):
            compile_blocks(learner.sdxl, backend)
            yield from measure(learner, first, sizes, steps, compiled=True)
    except UserError as error:
        yield {"failure": str(error), "compiled": True}


def measure_batch(learner: Learner, batch: Batch, steps: int) -> dict[str, Any]:
    """Returns speed and peak memory of `steps` steps with this batch. Warm-up steps are left out."""
    device, size = learner.accelerator.device, batch.images_in_step
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started, warm = time.perf_counter(), 0.0
    for step in training_steps(learner, repeat(batch, WARM_UP_STEPS + steps), StopRequest()):
        if step.number == WARM_UP_STEPS:
            synchronize(device)
            warm, started = time.perf_counter() - started, time.perf_counter()
        loss = step.loss
    synchronize(device)
    speed = size * steps / (time.perf_counter() - started)
    assert math.isfinite(loss.item()), f"the loss is {loss.item()}"
    row = {"batch": size, "images_per_second": speed, "peak_bytes": peak_memory_bytes(device), "warm_seconds": warm}
    if device.type == "cuda":
        row["reserved_bytes"] = torch.cuda.max_memory_reserved(device)
    return row


def slowest_kernels(learner: Learner, batch: Batch, rows: int = 30) -> str:
    """Returns a table of the kernels that took most time in two steps, after two steps of warm-up."""
    on_gpu = learner.accelerator.device.type == "cuda"
    profiler = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU]
    )
    for step in training_steps(learner, repeat(batch, 4), StopRequest()):
        if step.number == 2:
            synchronize(learner.accelerator.device)
            profiler.start()
    synchronize(learner.accelerator.device)
    profiler.stop()
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=key, row_limit=rows, max_name_column_width=100)


def enlarge(batch: Batch, size: int) -> Batch:
    """Repeats a batch until it has `size` images. If there is a GPU, the result is in pinned memory."""
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
