"""Interrupts a run again and again, resumes it each time, and compares the result with an undisturbed run.

    python -m scripts.benchmarks.interrupt --interruptions 40 --seed 0 [--processes 2] [-- any options of sdxl-train]

Each interruption is chosen at random: SIGKILL at any time, SIGKILL while something is saved, SIGTERM, or SIGTERM and
then SIGKILL. The script compares the names of all files, all tensors in the checkpoints and in the last training
state, metrics.jsonl and the TensorBoard scalars. Measurements of time and memory are not compared. The exit status is
1 if anything differs.
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
from sdxl_finetune.training.loop import train  # noqa: F401 (imported early, so that forked runs start fast)

STYLE = Path(__file__).parents[2] / "configs" / "style.toml"
MEASURED = {"images_per_second", "data_wait_seconds", "peak_memory_bytes"}
"""Values in the logs that differ from run to run."""
MARK = "INTERRUPTED_RUN"
"""Environment variable of all processes of a run, by which they are found when their main process has ended."""
OPTIONS = [
    *("--resolution", "96", "--min_bucket_reso", "64", "--max_bucket_reso", "128", "--max_data_loader_n_workers", "0"),
    *("--mixed_precision", "no", "--no-full_bf16", "--sample_every_n_epochs", "0", "--sample_prompts", ""),
    *("--gradient_accumulation_steps", "2", "--train_batch_size", "1", "--save_state", "--save_precision", "float"),
    *("--save_every_n_epochs", "2", "--save_every_n_steps", "3", "--save_last_n_steps", "6", "--flip_aug"),
    *("--ema_half_life", "10"),
]


class Process:
    """A running sdxl-train.

    A run of one process is forked from this process, so that nothing has to be imported again. A run of several
    processes is started with accelerate.
    """

    def __init__(self, arguments: list[str], processes: int, log: Path) -> None:
        self.log = log
        mark = {MARK: str(log.resolve())}
        if processes > 1:
            launcher = str(Path(sys.executable).with_name("accelerate"))
            launch = [launcher, "launch", "--multi_gpu", "--num_processes", str(processes), "--main_process_port", "0"]
            with log.open("a") as out:
                command = [*launch, "-m", "sdxl_finetune", *arguments]
                environment = {**os.environ, **mark}
                self._launched: Any = subprocess.Popen(
                    command, stdout=out, stderr=out, start_new_session=True, env=environment
                )
            self.pid = self._launched.pid
            return
        self._launched = None
        self.pid = os.fork()
        if self.pid == 0:
            descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os.environ.update(mark)
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
        """Waits for the end and returns the exit status. Raises AssertionError if the run hangs."""
        end = time.monotonic() + seconds
        while not self.ended():
            assert time.monotonic() < end, self.log.read_text()[-4000:]
            time.sleep(0.01)
        return self._launched.returncode if self._launched else os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill(self) -> None:
        """Kills the run with all its processes. The processes of a launcher are in sessions of their own."""
        with contextlib.suppress(psutil.NoSuchProcess):  # it may end by itself meanwhile
            process = psutil.Process(self.pid)
            for member in [process, *process.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
        self.wait()

    def outlived_by(self, seconds: float = 120) -> list[str]:
        """Returns the command lines of processes of this ended run that still live after so many seconds. Kills them.

        A forked main process itself is never among them, because Linux shows the environment it was started with.
        """
        end = time.monotonic() + seconds
        while (living := self._marked()) and time.monotonic() < end:
            time.sleep(0.1)
        lines = []
        for process in living:
            with contextlib.suppress(psutil.NoSuchProcess):
                lines.append(" ".join(process.cmdline()))
                process.kill()
        return lines

    def _marked(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == str(self.log.resolve()) and process.is_running():
                    found.append(process)
        return found

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)


def interrupt(process: Process, rng: random.Random, max_seconds: float, output_dir: Path) -> str | None:
    """Interrupts a run at a random time within `max_seconds`. Returns how, or None if the run had ended before."""
    way = rng.choice(["SIGKILL", "SIGKILL while saving", "SIGTERM", "SIGTERM, SIGKILL"])
    sleep(process, rng.uniform(0, max_seconds))
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
    """Waits for some seconds, or until the run ends."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not process.ended():
        time.sleep(0.002)


def saved_names(folder: Path) -> list[str]:
    """Returns the names of all files and folders that a run has saved."""
    return sorted(path.name for path in (folder / "out").iterdir() if path.name != "cache")


def differences(first: Path, second: Path) -> list[str]:
    """Returns the names of what differs between two runs."""
    different = []
    if saved_names(first) != saved_names(second):
        different.append(f"files: {saved_names(first)} and {saved_names(second)}")
    checkpoints = sorted(path.name for path in (first / "out").glob("*.safetensors"))
    different += [name for name in checkpoints if not same(*(load_file(run / "out" / name) for run in (first, second)))]
    for name in ("weights.safetensors", "optimizer.pt"):
        paths = [next((run / "out").glob("*[a-z]-state")) / name for run in (first, second)]
        load = load_file if name.startswith("weights") else torch.load
        if not same(*(load(path) for path in paths)):
            different.append(str(paths[0]))
    logs = (("metrics.jsonl", read_metrics), ("TensorBoard", read_scalars))
    # As text, because the gradient norm of a skipped step in fp16 is NaN, which equals nothing.
    return different + [name for name, read in logs if repr(read(first)) != repr(read(second))]


def same(first: Any, second: Any) -> bool:
    """True if all tensors and values are equal, bit for bit."""
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    return bool(first == second)


def last_log(folder: Path) -> Path:
    """Returns the log folder of the last run. A run killed before its first save leaves an older folder."""
    return max((folder / "logs").iterdir())


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    path = last_log(folder) / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(last_log(folder) / "finetuning"), size_guidance={"scalars": 0}).Reload()
    tags = set(events.Tags()["scalars"]) - MEASURED
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interruptions", type=int, default=40, help="default: 40")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random interruptions (default: 0)")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of the run (default: 60)")
    parser.add_argument("--processes", type=int, default=1, help="processes of the run (default: 1)")
    parser.add_argument("--folder", type=Path, default=Path("interrupted"), help="folder for both runs. Deleted first")
    parser.add_argument("options", nargs="*", help="options of sdxl-train, after --")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.folder, ignore_errors=True)
    write_photos(arguments.folder / "images")
    os.chdir(arguments.folder)
    os.environ.setdefault("ACCELERATE_USE_CPU", "1")
    model_tool(["init", "base.safetensors", "--seed", "3"])

    def start(folder: str) -> Process:
        paths = ["--output_dir", f"{folder}/out", "--logging_dir", f"{folder}/logs", "--resume", "auto"]
        length = ["--seed", "5", "--max_train_epochs", "", "--max_train_steps", str(arguments.steps)]
        options = ["--config", str(STYLE), *OPTIONS, *length, *paths, *arguments.options]
        return Process(options, arguments.processes, Path(f"{folder}.log"))

    began = time.monotonic()
    process = start("undisturbed")
    while not process.ended() and not any(path.stat().st_size for path in Path().glob("*/logs/*/metrics.jsonl")):
        time.sleep(0.01)
    first_step = time.monotonic() - began
    assert process.wait() == 0, Path("undisturbed.log").read_text()
    seconds_per_step = (time.monotonic() - began - first_step) / arguments.steps
    rng, ways = random.Random(arguments.seed), []
    while len(ways) < arguments.interruptions:
        way = interrupt(start("disturbed"), rng, first_step + 4 * seconds_per_step, Path("disturbed/out"))
        if way is None:
            break
        ways.append(way)
        print(f"interruption {len(ways)}: {way}", flush=True)
    assert start("disturbed").wait() == 0, Path("disturbed.log").read_text()[-4000:]
    different = differences(Path("undisturbed"), Path("disturbed"))
    resumed = Path("disturbed.log").read_text().count("resuming after step")
    result = f"differs in {', '.join(different)}" if different else "identical"
    print(f"{len(ways)} interruptions, {resumed} resumes: {result}")
    return 1 if different or len(ways) < arguments.interruptions else 0


if __name__ == "__main__":
    sys.exit(main())
