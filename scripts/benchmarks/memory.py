"""Compares the memory estimate of sdxl-check with the memory of a training step.

    python -m scripts.benchmarks.memory [--only TEXT]
    python -m scripts.benchmarks.memory --full

For each entry of a grid of settings, a small random model is trained for two steps on the CPU with the real training
loop. The measured memory comes from torch's profiler and does not use the estimate. It is the highest sum of bytes that
torch's allocator has given out and not got back, during the second step. The script prints estimate, measurement and
ratio. The exit status is 1 if an estimate is off by more than 10 %.

With --full, the script prints instead the estimates of full-size SDXL on a GPU, for a step of `configs/style.toml` on
images of 1024x1024. Each row adds an option to the rows above.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch.profiler import ProfilerActivity, profile, record_function

from scripts.toy.photos import write_photos
from sdxl_finetune.commands.memory_estimate import BatchShape, Known, estimate, largest_batch
from sdxl_finetune.commands.memory_report import on_cuda
from sdxl_finetune.commands.model import main as model_tool
from sdxl_finetune.config import Config, load_config
from sdxl_finetune.model.architecture import FULL
from sdxl_finetune.model.load import inspect_checkpoint
from sdxl_finetune.runtime.signals import StopRequest
from sdxl_finetune.training.loop import training_steps
from sdxl_finetune.training.setup import build_run

MiB, GiB = 1 << 20, 1 << 30
STYLE = {
    "cache_latents": True,
    "learning_rate": 3e-5,
    "learning_rate_te1": 1e-6,
    "learning_rate_te2": 1e-6,
    "full_bf16": True,
    "mixed_precision": "bf16",
    "max_token_length": 225,
    "train_text_encoder": True,
}
"""Options of `configs/style.toml` that its memory depends on."""
FULL_SIZE: dict[str, dict[str, Any]] = {
    "configs/style.toml, batch 5": {},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "AdamW8bit": {"optimizer_type": "AdamW8bit"},
    "fused_backward_pass": {"fused_backward_pass": True},
    "batch 1": {"train_batch_size": 1},
    "the U-Net alone": {"train_text_encoder": False},
    "cache_text_encoder_outputs": {"cache_text_encoder_outputs": True},
    "Adafactor": {"optimizer_type": "Adafactor"},
    "no exact_masters": {"exact_masters": False},
}
"""Rows of the table of full-size SDXL, each with the options that it adds."""
LIMIT = 0.10
"""Largest relative error of the estimate."""
STEP = "the step that counts"
"""Name of the measured step in the profile."""
AUTOCAST = ["--mixed_precision", "bf16"]
BF16 = [*AUTOCAST, "--full_bf16"]
BIG = ["--train_batch_size", "8", "--resolution", "256", "--no-train_text_encoder", "--fused_backward_pass"]
"""Options with which activations dominate the peak. In small models, weights and gradients usually dominate."""
FUSED, KEEP = ["--fused_backward_pass"], ["--gradient_checkpointing"]


def optimizer(name: str) -> list[str]:
    return ["--optimizer_type", name]


GRID: dict[str, tuple[str, list[str]]] = {
    "float32 AdamW": ("tiny", optimizer("AdamW")),
    "float32 AdamW batch 4": ("tiny", [*optimizer("AdamW"), "--train_batch_size", "4"]),
    "float32 AdamW batch 4 checkpointing": ("tiny", [*optimizer("AdamW"), *KEEP, "--train_batch_size", "4"]),
    "float32 AdamW batch 8 at 128": ("tiny", [*optimizer("AdamW"), "--train_batch_size", "8", "--resolution", "128"]),
    "float32 AdamW batch 8 at 128 checkpointing": (
        "tiny",
        [*optimizer("AdamW"), *KEEP, "--train_batch_size", "8", "--resolution", "128"],
    ),
    "float32 activations": ("tiny", [*optimizer("AdamW8bit"), *BIG]),
    "float32 activations checkpointing": ("tiny", [*optimizer("AdamW8bit"), *BIG, *KEEP]),
    "float32 activations 225 tokens": ("tiny", [*optimizer("AdamW8bit"), *BIG, "--max_token_length", "225"]),
    "autocast activations": ("tiny", [*AUTOCAST, *optimizer("AdamW8bit"), *BIG, "--train_batch_size", "2"]),
    "bf16 activations": ("tiny", [*BF16, *optimizer("AdamW8bit"), *BIG, "--train_batch_size", "2"]),
    "bf16 activations checkpointing": (
        "tiny",
        [*BF16, *optimizer("AdamW8bit"), *BIG, *KEEP, "--train_batch_size", "2"],
    ),
    "float32 AdamW fused": ("tiny", [*optimizer("AdamW"), *FUSED]),
    "float32 AdamW accumulation 2": ("tiny", [*optimizer("AdamW"), "--gradient_accumulation_steps", "2"]),
    "float32 AdamW U-Net alone": ("tiny", [*optimizer("AdamW"), "--no-train_text_encoder"]),
    "float32 AdamW 225 tokens, images": (
        "tiny",
        [*optimizer("AdamW"), "--max_token_length", "225", "--no-cache_latents", "--train_batch_size", "2"],
    ),
    "float32 AdamW average": ("tiny", [*optimizer("AdamW"), "--ema_decay", "0.99"]),
    "float32 AdamW8bit": ("tiny", optimizer("AdamW8bit")),
    "float32 AdamW8bit fused": ("tiny", [*optimizer("AdamW8bit"), *FUSED]),
    "float32 Adafactor": ("tiny", optimizer("Adafactor")),
    "float32 Prodigy": ("tiny", optimizer("Prodigy")),
    "autocast AdamW": ("tiny", [*AUTOCAST, *optimizer("AdamW")]),
    "autocast AdamW batch 4": ("tiny", [*AUTOCAST, *optimizer("AdamW"), "--train_batch_size", "4"]),
    "autocast AdamW8bit fused checkpointing": ("tiny", [*AUTOCAST, *optimizer("AdamW8bit"), *FUSED, *KEEP]),
    "bf16 AdamW": ("tiny", [*BF16, *optimizer("AdamW")]),
    "bf16 AdamW batch 4": ("tiny", [*BF16, *optimizer("AdamW"), "--train_batch_size", "4"]),
    "bf16 AdamW fused": ("tiny", [*BF16, *optimizer("AdamW"), *FUSED]),
    "bf16 AdamW accumulation 2": ("tiny", [*BF16, *optimizer("AdamW"), "--gradient_accumulation_steps", "2"]),
    "bf16 AdamW fused accumulation 2": (
        "tiny",
        [*BF16, *optimizer("AdamW"), *FUSED, "--gradient_accumulation_steps", "2"],
    ),
    "bf16 AdamW rounded": ("tiny", [*BF16, *optimizer("AdamW"), "--no-exact_masters"]),
    "bf16 AdamW8bit": ("tiny", [*BF16, *optimizer("AdamW8bit")]),
    "bf16 AdamW8bit fused": ("tiny", [*BF16, *optimizer("AdamW8bit"), *FUSED]),
    "bf16 AdamW8bit fused checkpointing": ("tiny", [*BF16, *optimizer("AdamW8bit"), *FUSED, *KEEP]),
    "bf16 Adafactor": ("tiny", [*BF16, *optimizer("Adafactor")]),
    "bf16 Adafactor fused": ("tiny", [*BF16, *optimizer("Adafactor"), *FUSED]),
    "bf16 Prodigy": ("tiny", [*BF16, *optimizer("Prodigy")]),
    "small float32 AdamW": ("small", optimizer("AdamW")),
    "small float32 AdamW8bit fused": ("small", [*optimizer("AdamW8bit"), *FUSED]),
    "small bf16 AdamW8bit fused": ("small", [*BF16, *optimizer("AdamW8bit"), *FUSED]),
    "small bf16 AdamW": ("small", [*BF16, *optimizer("AdamW")]),
}
"""Name of each line, with the preset of the model and options in addition to those of `build_config`."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default="", help="measure only the lines that have TEXT in their name", metavar="TEXT"
    )
    parser.add_argument("--full", action="store_true", help="print the estimates of full-size SDXL")
    arguments = parser.parse_args()
    if arguments.full:
        print_full_size()
        return 0
    only, worst = arguments.only, 0.0
    print(f"{'settings':46}{'estimate':>10}{'measured':>10}{'ratio':>8}  MiB of tensors at the peak")
    with tempfile.TemporaryDirectory() as folder:
        for name, (preset, options) in GRID.items():
            if only not in name:
                continue
            estimated, measured = compare(build_config(Path(folder), preset, options))
            worst = max(worst, abs(estimated / measured - 1))
            print(f"{name:46}{estimated / MiB:10.1f}{measured / MiB:10.1f}{estimated / measured:8.3f}", flush=True)
    print(f"the estimate is off by {worst:.1%} at most")
    return int(worst > LIMIT)


def print_full_size() -> None:
    """Prints the memory estimate of a step with full-size SDXL, with one option more in each row."""
    config, shape, known = Config.model_validate(STYLE), BatchShape(5, 1024, 1024), Known()
    for text, changes in FULL_SIZE.items():
        images = changes.get("train_batch_size", shape.images)
        shape = BatchShape(images, 1024, 1024)
        config = config.model_copy(update=changes)
        found = estimate(config, FULL, shape, cuda=True, known=known)
        parts = ", ".join(f"{part} {size / GiB:.2f}" for part, size in found.parts.items())
        with_allowance = on_cuda([found]) / GiB
        print(f"{text:30}{found.total / GiB:7.1f} GiB, {with_allowance:.1f} with the allowance: {parts}", flush=True)


def build_config(folder: Path, preset: str, options: Sequence[str]) -> Config:
    """Returns a config with photographs in one bucket and two steps. Writes model and photographs if needed."""
    model = folder / f"{preset}.safetensors"
    if not model.exists():
        write_photos(folder / "photos")
        model_tool(["init", str(model), "--preset", preset])
    given = {
        "pretrained_model_name_or_path": model,
        "train_data_dir": folder / "photos",
        "output_dir": folder / "out",
        "resolution": 64,
        "train_batch_size": 1,
        "caption_extension": ".txt",
        "max_train_steps": 2,
        "learning_rate": 1e-5,
        "max_data_loader_n_workers": 0,
        "seed": 0,
    }
    base = [text for key, value in given.items() for text in (f"--{key}", str(value))]
    config = load_config([*base, "--cache_latents", "--train_text_encoder", *options], program="")
    assert config is not None
    return config


def compare(config: Config) -> tuple[int, int]:
    """Returns the estimated and the measured peak, in bytes."""
    measured, shape = measure(config)
    assert config.pretrained_model_name_or_path is not None
    architecture = inspect_checkpoint(config.pretrained_model_name_or_path).architecture
    assert architecture is not None
    return estimate(config, architecture, shape, cuda=False).total, measured


def measure(config: Config) -> tuple[int, BatchShape]:
    """Returns the measured peak of the second step in bytes, and the shape of its batch.

    The profiler starts before the model is loaded, so that it knows of all memory.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, build_run(config) as run:
        shape = largest_batch(run.dataset.index, run.timeline.plan)
        steps = training_steps(run.learner, run.batches(), StopRequest())
        next(steps)
        with record_function(STEP):
            next(steps)
        steps.close()
    return peak_of_step(profiler), shape


def peak_of_step(profiler: profile) -> int:
    """Adds up allocations and frees in their order, and returns the highest sum during the measured step, in bytes."""
    events = list(_events(profiler.profiler.kineto_results.experimental_event_tree()))
    (begin, end), *_ = [(event.start_time_ns, event.end_time_ns) for event in events if event.name == STEP]
    changes = [
        (event.start_time_ns, event.extra_fields.alloc_size)
        for event in events
        if event.tag == torch._C._profiler._EventType.Allocation
    ]
    current = highest = 0
    for moment, size in sorted(changes, key=lambda change: change[0]):
        current += size
        if begin <= moment <= end:
            highest = max(highest, current)
    return highest


def _events(roots: Sequence) -> Iterator:
    """Yields all events of the profiler's tree.

    The tree has no events for frees of memory that was allocated before the profiler started.
    """
    waiting = list(roots)
    while waiting:
        event = waiting.pop()
        yield event
        waiting += event.children


if __name__ == "__main__":
    sys.exit(main())
