"""Runs that save little, and the small disk that they save to."""

import shutil
import subprocess
from pathlib import Path

from accelerate.state import AcceleratorState

from scripts.benchmarks.interrupt import OPTIONS, STYLE
from sdxl_finetune.config import load_config
from sdxl_finetune.training.loop import train

DISK = 480 << 20
"""Bytes of the small disk. A run of 4 steps saves less."""
SMALL = ["--optimizer_type", "SGD", "--learning_rate", "0.01", "--ema_half_life", "", "--save_precision", "bf16"]
SMALL += ["--resolution", "64", "--max_bucket_reso", "64", "--gradient_accumulation_steps", "1"]
"""Options of runs that save little: no optimizer state, no EMA, and checkpoints in two bytes."""


def run(folder: str, *more: str) -> int:
    """A run of 4 steps that saves weights and states after every second one and at the end."""
    places = ["--output_dir", f"{folder}/out", "--logging_dir", f"{folder}/logs", "--seed", "5"]
    places += ["--cache_dir", "cache"]
    length = ["--max_train_epochs", "", "--max_train_steps", "4", "--save_every_n_steps", "2"]
    length += ["--save_last_n_steps", ""]
    config = load_config(["--config", str(STYLE), *OPTIONS, *length, *SMALL, *places, *more], program="sdxl-train")
    assert config is not None
    try:
        return train(config)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def mount(folder: Path) -> bool:
    """Mounts a file system of DISK bytes. Returns False if this process may not do that."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", str(folder)]
    return shutil.which("mount") is not None and not subprocess.run(command, capture_output=True).returncode
