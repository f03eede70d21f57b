"""Trains undisturbed for two hours and measures whether memory and open files grow.

The run has previews, saves, training states, validation, TensorBoard and two data-loader workers. Every tenth of the
time a second program adds images to the cache that the run reads. SOAK_MINUTES in the environment changes the time.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from scripts.benchmarks.torture import Trial
from scripts.toy.photos import write_photos

TOY = Path(__file__).parents[2] / "tests" / "toy" / "toy.safetensors"
MINUTES = 120.0
EVERY = 5.0
"""Seconds between two measurements."""
WARM_UP = 0.2
"""Share of the time that is not judged. Allocators, the first previews and the first saves still take memory in it."""
MOST_GROWTH = 32.0
"""MiB by which memory may grow after the warm-up: what allocators vary by. A leak of 5 KiB in each step is more."""
MOST_FILES = 2.0
"""Open files by which a process may grow after the warm-up."""
ADDED = 20
"""Images that the second program adds to the cache each time."""
CACHE_LOG = "cache.log"
"""Name of the file with all messages of the second program."""
SETTINGS = """
pretrained_model_name_or_path = "{model}"
train_data_dir = "{images}"
caption_extension = ".txt"
resolution = 64
train_batch_size = 2
output_dir = "out"
output_name = "soak"
logging_dir = "logs"
cache_dir = "cache"
cache_latents_to_disk = true
flip_aug = true
shuffle_caption = true
max_train_steps = 10000000
max_data_loader_n_workers = 2
optimizer_type = "AdamW"
learning_rate = 1e-5
ema_half_life = 100
validation_split = 0.25
validate_every_n_steps = 20
sample_prompts = "prompts.txt"
sample_every_n_steps = 20
sample_sampler = "euler"
save_every_n_steps = 20
save_last_n_steps = 40
save_state = true
seed = {seed}
"""


@dataclass(frozen=True)
class Sample:
    """Measurements at one time, of the training process and of its data-loader workers."""

    seconds: float
    memory: float
    """MiB of resident memory of the training process."""
    files: int
    """Open files of the training process."""
    workers_memory: float
    """MiB of resident memory of all data-loader workers."""
    step: int


def try_once(number: int, seed: int, folder: Path) -> Trial:
    """Trains for SOAK_MINUTES, and compares the growth after the warm-up with what is allowed."""
    minutes = float(os.environ.get("SOAK_MINUTES", MINUTES))
    work = folder / f"run-{number}"
    shutil.rmtree(work, ignore_errors=True)
    _write_inputs(work, seed)
    samples, status = _train(work, 60 * minutes)
    (work / "samples.jsonl").write_text("".join(json.dumps(asdict(sample)) + "\n" for sample in samples))
    faults = [*_missing(work, status), *grown(samples)]
    return Trial(number, describe(samples, work), "; ".join(faults) or None)


def figures(trials: Sequence[Trial]) -> str:
    """The measurements of each run, and what was wrong with it."""
    lines = ["| measured | growth within the limits |", "|---|---|"]
    lines += [f"| {trial.what} | {'yes' if trial.failure is None else 'no: ' + trial.failure} |" for trial in trials]
    return "\n".join(lines)


def slope(samples: Sequence[Sample], name: str) -> float:
    """The growth of a measurement in an hour: the slope of a line through all samples."""
    hours = [sample.seconds / 3600 for sample in samples]
    return float(np.polyfit(hours, [getattr(sample, name) for sample in samples], 1)[0])


def judged(samples: Sequence[Sample]) -> list[Sample]:
    """The samples after the warm-up."""
    return [sample for sample in samples if sample.seconds >= WARM_UP * samples[-1].seconds]


def grown(samples: Sequence[Sample]) -> list[str]:
    """Says which measurements grew by more than is allowed."""
    after = judged(samples)
    if len(after) < 3:
        return ["too few measurements"]
    hours = (after[-1].seconds - after[0].seconds) / 3600
    limits = {"memory": MOST_GROWTH, "workers_memory": MOST_GROWTH, "files": MOST_FILES}
    growth = {name: slope(after, name) * hours for name in limits}
    return [f"{name} grew by {growth[name]:.1f}" for name, limit in limits.items() if growth[name] > limit]


def describe(samples: Sequence[Sample], work: Path) -> str:
    """The work of the run, and its memory and open files with their slopes."""
    after = judged(samples)
    if len(after) < 3:
        return "a run that ended at once"
    parts = [f"{samples[-1].seconds / 60:.0f} minutes, {samples[-1].step:,} steps"]
    previews = len(list((work / "out" / "sample").glob("*.png")))
    validations = sum("validation" in row for row in _rows(work))
    parts.append(f"{previews} previews, {validations} validations")
    for name, title, unit in (
        ("memory", "memory", " MiB"),
        ("workers_memory", "memory of the workers", " MiB"),
        ("files", "open files", ""),
    ):
        first, last = getattr(after[0], name), getattr(after[-1], name)
        parts.append(f"{title} {first:.0f} to {last:.0f}{unit}, {slope(after, name):+.2f}{unit} an hour")
    return "; ".join(parts)


def _write_inputs(work: Path, seed: int) -> None:
    write_photos(work / "images")
    shutil.copytree(work / "images", work / "more")
    settings = SETTINGS.format(model=TOY, images="images", seed=seed)
    (work / "soak.toml").write_text(settings)
    (work / "more.toml").write_text(settings.replace('"images"', '"more"'))
    (work / "prompts.txt").write_text("a red circle --w 64 --h 64 --s 4\na blue square --w 64 --h 64 --s 4\n")


def _train(work: Path, seconds: float) -> tuple[list[Sample], int]:
    """Trains for so long and then asks the run to stop; returns the measurements and the exit status."""
    samples: list[Sample] = []
    added, growing = 0, None
    with (work / "console.log").open("w") as console:
        command = [sys.executable, "-m", "sdxl_finetune", "--config", "soak.toml"]
        run = subprocess.Popen(command, cwd=work, stdout=console, stderr=console)
        process = psutil.Process(run.pid)
        while not list((work / "logs").glob("*/metrics.jsonl")) and run.poll() is None:
            time.sleep(0.2)
        began = time.monotonic()
        while run.poll() is None and (passed := time.monotonic() - began) < seconds:
            samples.append(_measure(process, passed, work))
            if passed > (added + 1) * seconds / 10 and (growing is None or growing.poll() is not None):
                added += 1
                growing = _grow_cache(work, added)
            time.sleep(min(EVERY, seconds / 50))
        if run.poll() is None:
            run.send_signal(signal.SIGTERM)
        if growing is not None:
            growing.wait()
        return samples, run.wait()


def _measure(process: psutil.Process, seconds: float, work: Path) -> Sample:
    workers = [child.memory_info().rss for child in process.children()]
    return Sample(
        seconds=round(seconds, 1),
        memory=process.memory_info().rss / (1 << 20),
        files=process.num_fds(),
        workers_memory=sum(workers) / (1 << 20),
        step=max((row["step"] for row in _rows(work)), default=0),
    )


def _grow_cache(work: Path, number: int) -> subprocess.Popen[bytes]:
    """Adds images and starts a program that caches them, in the folder from which the run reads."""
    rng = np.random.default_rng(number)
    for name in range(ADDED):
        pixels = rng.integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(work / "more" / f"{number}-{name}.png")
    code = "from sdxl_finetune.cli import cache; cache()"
    command = [sys.executable, "-c", code, "--config", "more.toml"]
    with (work / CACHE_LOG).open("a") as messages:
        return subprocess.Popen(command, cwd=work, stdout=messages, stderr=messages)


def _missing(work: Path, status: int) -> list[str]:
    """Says what a run of this kind should have done and has not."""
    faults = [] if status == 128 + signal.SIGTERM else [f"the run ended with status {status}: see {work}/console.log"]
    rows = _rows(work)
    if any(row.get("loss", 0.0) is None for row in rows):
        faults.append("a loss was not finite")
    messages = (work / CACHE_LOG).read_text().splitlines() if (work / CACHE_LOG).exists() else []
    faults += [f"the cache did not grow: {line}" for line in messages if line.startswith(("error:", "Traceback"))][:1]
    for what, made in {
        "validation": any("validation" in row for row in rows),
        "previews": any((work / "out" / "sample").glob("*.png")),
        "checkpoints": any((work / "out").glob("*.safetensors")),
        "training states": any((work / "out").glob("*-state")),
    }.items():
        if not made:
            faults.append(f"no {what}")
    return faults


def _rows(work: Path) -> list[dict]:
    """The complete rows of metrics.jsonl."""
    lines = [line for path in (work / "logs").glob("*/metrics.jsonl") for line in path.read_text().split("\n")[:-1]]
    return [json.loads(line) for line in lines]
