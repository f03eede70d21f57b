"""Compares sdxl-check's memory estimate with the memory that a step takes.

    python -m scripts.benchmarks.memory [--only TEXT]

For each line of a grid of settings, the real training loop trains a small random model for two steps on the CPU. The
profiler records all allocations of torch, independently of the estimate. The measured figure is the highest sum of
allocated bytes within the second step. The script prints both figures and their ratio, and exits with status 1 if any
estimate is off by more than 10 %.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from torch.profiler import ProfilerActivity, profile, record_function

from scripts.toy.photos import write_photos
from sdxl_finetune.commands.memory_estimate import estimate, largest_batch
from sdxl_finetune.commands.model import main as model_tool
from sdxl_finetune.config import Config, load_config
from sdxl_finetune.model.load import inspect_checkpoint
from sdxl_finetune.runtime.signals import StopRequest
from sdxl_finetune.training.loop import training_steps
from sdxl_finetune.training.setup import build_run

MiB = 1 << 20
LIMIT = 0.10
STEP = "the step that counts"
AUTOCAST = ["--mixed_precision", "bf16"]
BF16 = [*AUTOCAST, "--full_bf16"]
BIG = ["--train_batch_size", "8", "--resolution", "256", "--no-train_text_encoder", "--fused_backward_pass"]
"""With it the peak is of activations, and not of weights and gradients, which small models have much of."""
FUSED, KEEP = ["--fused_backward_pass"], ["--gradient_checkpointing"]


def of(name: str) -> list[str]:
    return ["--optimizer_type", name]


GRID: dict[str, tuple[str, list[str]]] = {
    "float32 AdamW": ("tiny", of("AdamW")),
    "float32 AdamW batch 4": ("tiny", [*of("AdamW"), "--train_batch_size", "4"]),
    "float32 AdamW batch 4 checkpointing": ("tiny", [*of("AdamW"), *KEEP, "--train_batch_size", "4"]),
    "float32 AdamW batch 8 at 128": ("tiny", [*of("AdamW"), "--train_batch_size", "8", "--resolution", "128"]),
    "float32 AdamW batch 8 at 128 checkpointing": (
        "tiny",
        [*of("AdamW"), *KEEP, "--train_batch_size", "8", "--resolution", "128"],
    ),
    "float32 activations": ("tiny", [*of("AdamW8bit"), *BIG]),
    "float32 activations checkpointing": ("tiny", [*of("AdamW8bit"), *BIG, *KEEP]),
    "float32 activations 225 tokens": ("tiny", [*of("AdamW8bit"), *BIG, "--max_token_length", "225"]),
    "autocast activations": ("tiny", [*AUTOCAST, *of("AdamW8bit"), *BIG, "--train_batch_size", "2"]),
    "bf16 activations": ("tiny", [*BF16, *of("AdamW8bit"), *BIG, "--train_batch_size", "2"]),
    "bf16 activations checkpointing": ("tiny", [*BF16, *of("AdamW8bit"), *BIG, *KEEP, "--train_batch_size", "2"]),
    "float32 AdamW fused": ("tiny", [*of("AdamW"), *FUSED]),
    "float32 AdamW accumulation 2": ("tiny", [*of("AdamW"), "--gradient_accumulation_steps", "2"]),
    "float32 AdamW U-Net alone": ("tiny", [*of("AdamW"), "--no-train_text_encoder"]),
    "float32 AdamW 225 tokens, images": (
        "tiny",
        [*of("AdamW"), "--max_token_length", "225", "--no-cache_latents", "--train_batch_size", "2"],
    ),
    "float32 AdamW average": ("tiny", [*of("AdamW"), "--ema_decay", "0.99"]),
    "float32 AdamW8bit": ("tiny", of("AdamW8bit")),
    "float32 AdamW8bit fused": ("tiny", [*of("AdamW8bit"), *FUSED]),
    "float32 Adafactor": ("tiny", of("Adafactor")),
    "float32 Prodigy": ("tiny", of("Prodigy")),
    "autocast AdamW": ("tiny", [*AUTOCAST, *of("AdamW")]),
    "autocast AdamW batch 4": ("tiny", [*AUTOCAST, *of("AdamW"), "--train_batch_size", "4"]),
    "autocast AdamW8bit fused checkpointing": ("tiny", [*AUTOCAST, *of("AdamW8bit"), *FUSED, *KEEP]),
    "bf16 AdamW": ("tiny", [*BF16, *of("AdamW")]),
    "bf16 AdamW batch 4": ("tiny", [*BF16, *of("AdamW"), "--train_batch_size", "4"]),
    "bf16 AdamW fused": ("tiny", [*BF16, *of("AdamW"), *FUSED]),
    "bf16 AdamW accumulation 2": ("tiny", [*BF16, *of("AdamW"), "--gradient_accumulation_steps", "2"]),
    "bf16 AdamW fused accumulation 2": ("tiny", [*BF16, *of("AdamW"), *FUSED, "--gradient_accumulation_steps", "2"]),
    "bf16 AdamW rounded": ("tiny", [*BF16, *of("AdamW"), "--no-exact_masters"]),
    "bf16 AdamW8bit": ("tiny", [*BF16, *of("AdamW8bit")]),
    "bf16 AdamW8bit fused": ("tiny", [*BF16, *of("AdamW8bit"), *FUSED]),
    "bf16 AdamW8bit fused checkpointing": ("tiny", [*BF16, *of("AdamW8bit"), *FUSED, *KEEP]),
    "bf16 Adafactor": ("tiny", [*BF16, *of("Adafactor")]),
    "bf16 Adafactor fused": ("tiny", [*BF16, *of("Adafactor"), *FUSED]),
    "bf16 Prodigy": ("tiny", [*BF16, *of("Prodigy")]),
    "small float32 AdamW": ("small", of("AdamW")),
    "small float32 AdamW8bit fused": ("small", [*of("AdamW8bit"), *FUSED]),
    "small bf16 AdamW8bit fused": ("small", [*BF16, *of("AdamW8bit"), *FUSED]),
    "small bf16 AdamW": ("small", [*BF16, *of("AdamW")]),
}
"""A name, the model's preset, and options beside those of `config_for`."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="lines of the grid with this in their name")
    only = parser.parse_args().only
    worst = 0.0
    print(f"{'settings':46}{'estimate':>10}{'measured':>10}{'ratio':>8}  MiB of tensors at the peak")
    with tempfile.TemporaryDirectory() as folder:
        for name, (preset, options) in GRID.items():
            if only not in name:
                continue
            foretold, measured = compare(config_for(Path(folder), preset, options))
            worst = max(worst, abs(foretold / measured - 1))
            print(f"{name:46}{foretold / MiB:10.1f}{measured / MiB:10.1f}{foretold / measured:8.3f}", flush=True)
    print(f"the estimate is off by {worst:.1%} at most")
    return int(worst > LIMIT)


def config_for(folder: Path, preset: str, options: Sequence[str]) -> Config:
    """One bucket of photographs and two steps."""
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
    """Bytes at the peak as foretold and as measured."""
    measured, shape = measure(config)
    assert config.pretrained_model_name_or_path is not None
    architecture = inspect_checkpoint(config.pretrained_model_name_or_path).architecture
    assert architecture is not None
    return estimate(config, architecture, shape, cuda=False).total, measured


def measure(config: Config) -> tuple[int, tuple[int, int, int]]:
    """The highest sum of bytes that the allocator has given out in the second step, and the shape of its batches. The
    profiler watches from before the model is loaded, so that it knows of everything.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched, build_run(config) as run:
        shape = largest_batch(run.dataset.index, run.timeline.plan)
        steps = training_steps(run.learner, run.batches(), StopRequest())
        next(steps)
        with record_function(STEP):
            next(steps)
        steps.close()
    return highest(watched), shape


def highest(watched: profile) -> int:
    events = list(_events(watched.profiler.kineto_results.experimental_event_tree()))
    (begin, end), *_ = [(one.start_time_ns, one.end_time_ns) for one in events if one.name == STEP]
    changes = [
        (one.start_time_ns, one.extra_fields.alloc_size)
        for one in events
        if one.tag == torch._C._profiler._EventType.Allocation
    ]
    now = most = 0
    for moment, size in sorted(changes, key=lambda change: change[0]):
        now += size
        if begin <= moment <= end:
            most = max(most, now)
    return most


def _events(roots: Sequence) -> Iterator:
    """All events of the profiler's tree; frees of memory that it never saw given out are no events."""
    waiting = list(roots)
    while waiting:
        one = waiting.pop()
        yield one
        waiting += one.children


if __name__ == "__main__":
    sys.exit(main())
