"""Short runs of the small model that draws, whose predictions depend on captions, in a user's folder (`work`)."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from accelerate.state import AcceleratorState

from sdxl_finetune.config import Config, load_config
from sdxl_finetune.training.loop import train

TOY = Path(__file__).parents[1] / "toy" / "toy.safetensors"
OPTIONS = ["--pretrained_model_name_or_path", "base.safetensors", "--train_data_dir", "images", "--resolution", "64"]
OPTIONS += ["--caption_extension", ".txt", "--output_dir", "out", "--logging_dir", "logs", "--seed", "5"]
OPTIONS += ["--max_data_loader_n_workers", "0", "--train_batch_size", "2", "--max_train_steps", "4", "--cache_latents"]


def use_toy(work: Path) -> None:
    """Puts the small model that draws in the place of the folder's base model."""
    (work / "base.safetensors").unlink()
    (work / "base.safetensors").symlink_to(TOY)


def config(*more: str, program: str = "sdxl-train") -> Config:
    """The config of OPTIONS and further options."""
    loaded = load_config([*OPTIONS, *more], program=program)
    assert loaded is not None
    return loaded


def run(*more: str) -> list[dict]:
    """The rows of metrics.jsonl of a run."""
    shutil.rmtree("logs", ignore_errors=True)
    try:
        assert train(config(*more)) == 0
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    return read_rows("logs")


def train_on_two_processes(words: Sequence[str]) -> None:
    """Runs sdxl-train with these words on two processes, and expects success."""
    launcher = [str(Path(sys.executable).with_name("accelerate")), "launch", "--multi_gpu", "--num_processes", "2"]
    command = [*launcher, "--main_process_port", "0", "-m", "sdxl_finetune", *words]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def read_rows(folder: str) -> list[dict]:
    """The rows of metrics.jsonl of the only run in the folder."""
    (log,) = Path(folder).glob("*/metrics.jsonl")
    return [json.loads(line) for line in log.read_text().splitlines()]


def losses(rows: list[dict]) -> list[float]:
    """The training losses among the rows of metrics.jsonl."""
    return [row["loss"] for row in rows if "loss" in row]
