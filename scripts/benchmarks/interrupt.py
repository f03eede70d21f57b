"""Interrupts one run again and again, resumes it each time, and compares it once with a run that nobody disturbed.

    python -m scripts.benchmarks.interrupt --interruptions 40 --seed 0 [--processes 2] [-- any options of sdxl-train]

Each interruption is drawn: SIGKILL at any time from the start on, SIGKILL while something is being saved, SIGTERM, or
SIGTERM and then SIGKILL. Compared are the names of all files, every tensor of every saved weights file and of the
last state, metrics.jsonl and TensorBoard, but for what measures time and memory. Ends with status 1 on a difference.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scripts.toy.photos import write_photos
from sdxl_finetune import cli
from sdxl_finetune.commands.model import main as model_tool
from sdxl_finetune.training.loop import train  # noqa: F401 (so that forked runs start at once)

STYLE = Path(__file__).parents[2] / "configs" / "style.toml"
MEASURED = {"images_per_second", "data_wait_seconds", "peak_memory_bytes"}
OPTIONS = [
    *("--resolution", "96", "--min_bucket_reso", "64", "--max_bucket_reso", "128", "--max_data_loader_n_workers", "0"),
    *("--mixed_precision", "no", "--no-full_bf16", "--sample_every_n_epochs", "0", "--sample_prompts", ""),
    *("--gradient_accumulation_steps", "2", "--train_batch_size", "1", "--save_state", "--save_precision", "float"),
    *("--save_every_n_epochs", "2", "--save_every_n_steps", "3", "--save_last_n_steps", "6", "--flip_aug"),
    *("--ema_half_life", "10"),
]


class Process:
    """A run on its way: forked from this process, which has imported everything; or launched, of several processes."""

    def __init__(self, arguments: list[str], processes: int, log: Path) -> None:
        self.log = log
        if processes > 1:
            launcher = str(Path(sys.executable).with_name("accelerate"))
            launch = [launcher, "launch", "--multi_gpu", "--num_processes", str(processes), "--main_process_port", "0"]
            with log.open("a") as out:
                command = [*launch, "-m", "sdxl_finetune", *arguments]
                self._launched: Any = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
            self.pid = self._launched.pid
            return
        self._launched = None
        self.pid = os.fork()
        if self.pid == 0:
            descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.argv = ["sdxl-train", *arguments]
            try:
                cli.train()
            except SystemExit as end:
                os._exit(end.code if isinstance(end.code, int) else 1)
            os._exit(1)

    def ended(self) -> bool:
        if self._launched:
            return self._launched.poll() is not None
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def wait(self, seconds: float = 300) -> int:
        """Its exit status; a run that hangs is a failure of the script."""
        end = time.monotonic() + seconds
        while not self.ended():
            assert time.monotonic() < end, self.log.read_text()[-4000:]
            time.sleep(0.01)
        return self._launched.returncode if self._launched else os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill(self) -> None:
        """All its processes: a launcher's lie in sessions of their own."""
        process = psutil.Process(self.pid)
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        self.wait()

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)


def interrupt(process: Process, rng: random.Random, longest: float, output_dir: Path) -> str | None:
    """Interrupts a run at a random time up to `longest` seconds; returns how, None if it had ended before."""
    way = rng.choice(["SIGKILL", "SIGKILL while saving", "SIGTERM", "SIGTERM, SIGKILL"])
    sleep(process, rng.uniform(0, longest))
    if way == "SIGKILL while saving":
        while not process.ended() and not any(output_dir.glob(".*.tmp")):
            time.sleep(0.002)
        sleep(process, rng.uniform(0, 0.3))
    if process.ended():
        process.wait()
        return None
    if way.startswith("SIGTERM"):
        process.terminate()
        if way == "SIGTERM":
            process.wait()
            return way
        sleep(process, rng.uniform(0, 1.5))
    process.kill()
    return way


def sleep(process: Process, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not process.ended():
        time.sleep(0.002)


def saved(folder: Path) -> list[str]:
    """The names of everything that a run has saved."""
    return sorted(path.name for path in (folder / "out").iterdir() if path.name != "cache")


def differences(one: Path, other: Path) -> list[str]:
    """In what two runs differ."""
    found = []
    if saved(one) != saved(other):
        found.append(f"files: {saved(one)} and {saved(other)}")
    weights = sorted(path.name for path in (one / "out").glob("*.safetensors"))
    found += [name for name in weights if not same(*(load_file(run / "out" / name) for run in (one, other)))]
    for name in ("weights.safetensors", "optimizer.pt"):
        states = [next((run / "out").glob("*[a-z]-state")) / name for run in (one, other)]
        read = load_file if name.startswith("weights") else torch.load
        if not same(*(read(path) for path in states)):
            found.append(str(states[0]))
    found += [name for name, read in (("metrics.jsonl", metrics), ("TensorBoard", board)) if read(one) != read(other)]
    return found


def same(one: Any, other: Any) -> bool:
    """Bit for bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


def log_of(folder: Path) -> Path:
    """The log of the run that went to its end; one that is killed before it has saved anything leaves its own."""
    return max((folder / "logs").iterdir())


def metrics(folder: Path) -> list[dict[str, Any]]:
    path = log_of(folder) / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]


def board(folder: Path) -> dict[str, list[tuple[int, float]]]:
    read = EventAccumulator(str(log_of(folder) / "finetuning"), size_guidance={"scalars": 0}).Reload()
    tags = set(read.Tags()["scalars"]) - MEASURED
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in tags}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interruptions", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of the run")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("interrupted"), help="made anew")
    parser.add_argument("options", nargs="*", help="of sdxl-train, after --")
    given = parser.parse_args()
    shutil.rmtree(given.folder, ignore_errors=True)
    write_photos(given.folder / "images")
    os.chdir(given.folder)
    os.environ.setdefault("ACCELERATE_USE_CPU", "1")
    model_tool(["init", "base.safetensors", "--seed", "3"])

    def start(folder: str) -> Process:
        places = ["--output_dir", f"{folder}/out", "--logging_dir", f"{folder}/logs", "--resume", "auto"]
        length = ["--seed", "5", "--max_train_epochs", "", "--max_train_steps", str(given.steps)]
        arguments = ["--config", str(STYLE), *OPTIONS, *length, *places, *given.options]
        return Process(arguments, given.processes, Path(f"{folder}.log"))

    began = time.monotonic()
    process = start("undisturbed")
    while not process.ended() and not any(path.stat().st_size for path in Path().glob("*/logs/*/metrics.jsonl")):
        time.sleep(0.01)
    first_step = time.monotonic() - began
    assert process.wait() == 0, Path("undisturbed.log").read_text()
    each = (time.monotonic() - began - first_step) / given.steps
    rng, ways = random.Random(given.seed), []
    while len(ways) < given.interruptions:
        way = interrupt(start("disturbed"), rng, first_step + 4 * each, Path("disturbed/out"))
        if way is None:
            break
        ways.append(way)
        print(f"interruption {len(ways)}: {way}", flush=True)
    assert start("disturbed").wait() == 0, Path("disturbed.log").read_text()[-4000:]
    found = differences(Path("undisturbed"), Path("disturbed"))
    resumed = Path("disturbed.log").read_text().count("going on after step")
    print(f"{len(ways)} interruptions, {resumed} resumes: {'differs in ' + ', '.join(found) if found else 'identical'}")
    return 1 if found or len(ways) < given.interruptions else 0


if __name__ == "__main__":
    sys.exit(main())
