"""Trainings of the small model that draws (tests/toy), and their validation losses, for scripts/benchmarks/proof.py."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from scripts.benchmarks.proof_reads import Mean

ROOT = Path(__file__).parents[2]
TOY = ROOT / "tests" / "toy" / "toy.safetensors"
CONFIG = ROOT / "configs" / "quickstart.toml"
SHORT = ["--max_train_epochs", "3"]
HELD_OUT = [*SHORT, "--validation_split", "0.1", "--validation_timesteps", "20"]
SEEDS = ("0", "1", "2")
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]


@dataclass(frozen=True)
class Row:
    """One line of the table in docs/proof.md."""

    what: str
    theory: str
    measured: str
    holds: bool


def train(
    folder: Path,
    name: str,
    *options: str,
    processes: int = 1,
    model: Path = TOY,
    data: str = "style",
    program: str = "sdxl_finetune",
    config: Path = CONFIG,
) -> Path:
    """Runs sdxl-train and returns the final checkpoint. A run that is finished already is not repeated."""
    out = folder / name
    paths_of_run = ["--output_dir", str(out), "--logging_dir", str(out / "logs"), "--output_name", "model"]
    paths_of_run += ["--pretrained_model_name_or_path", str(model), "--train_data_dir", str(folder / data)]
    quiet = ["--sample_prompts", "", "--sample_every_n_epochs", "0", "--no-sample_at_first"]
    quiet += ["--save_every_n_epochs", ""]
    launch = LAUNCH if processes > 1 else []
    command = [sys.executable, *launch, "-m", program, "--config", str(config), *paths_of_run, *quiet, *options]
    final = out / "model.safetensors"
    if not final.exists():
        if "--resume" not in options:
            shutil.rmtree(out, ignore_errors=True)  # an interrupted run starts again
        cpu = {} if torch.cuda.device_count() >= processes else {"ACCELERATE_USE_CPU": "1"}
        python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with (folder / f"{name}.log").open("w") as log:
            environment = os.environ | cpu | {"PYTHONPATH": python_path}
            subprocess.run(command, check=True, cwd=ROOT, stderr=log, env=environment)
    return final


def validation(model: Path, index: int = -1) -> dict[str, float]:
    """Returns the validation losses of a run: the last ones, or those at `index`."""
    return [*validations(model).values()][index]


def validations(model: Path) -> dict[int, dict[str, float]]:
    """Returns the validation losses of a run by optimizer step."""
    (log,) = (model.parent / "logs").glob("*/metrics.jsonl")
    rows = map(json.loads, log.read_text().splitlines())
    return {row["step"]: row["validation"] for row in rows if "validation" in row}


def losses(folder: Path, name: str, *options: str, model: Path = TOY) -> list[dict[str, float]]:
    """Trains 180 steps with each of three seeds and returns the final validation losses.

    All runs hold out the same images and use the same noise for them.
    """
    runs = [train(folder, f"{name}-{seed}", *HELD_OUT, *options, "--seed", seed, model=model) for seed in SEEDS]
    return [validation(run) for run in runs]


def increase(losses: Sequence[dict[str, float]], base: Sequence[dict[str, float]], name: str = "loss") -> Mean:
    """Returns by which share the losses are above the base losses of the same seeds."""
    return Mean.of([run[name] / base_run[name] - 1 for run, base_run in zip(losses, base, strict=True)])


def average(runs: Sequence[dict[str, float]]) -> float:
    return float(np.mean([losses["loss"] for losses in runs]))
