"""Runs that the trials of torture_kills.py and torture_kills_of_ranks.py kill, and what must be true of them.

All trials of a folder share images, base model and one undisturbed run. A trial has an empty folder of its own, so that
a kill may fall into the encoding of latents too.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image
from safetensors.torch import load_file

from scripts.benchmarks.interrupt import OPTIONS, STYLE, Process, differences
from scripts.benchmarks.torture import Trial
from scripts.toy.photos import write_photos
from sdxl_finetune.commands.model import main as model_tool
from sdxl_finetune.training.state import load_state

EVERYTHING = [
    *("--max_train_epochs", "", "--max_train_steps", "8", "--seed", "5", "--validation_split", "0.25"),
    *("--sample_prompts", "prompts.txt", "--sample_every_n_steps", "3", "--sample_at_first", "--resume", "auto"),
]
"""A run that saves, validates and draws previews, 6 images in epochs of 3 steps."""
PATIENCE = 1800.0
"""Seconds that a run may take. Other programs may need the machine at the same time."""


def start(name: str, processes: int, *more: str) -> Process:
    """Starts a run in the folder `name` of the current folder."""
    paths = ["--output_dir", f"{name}/out", "--logging_dir", f"{name}/logs"]
    return Process(["--config", str(STYLE), *OPTIONS, *EVERYTHING, *paths, *more], processes, Path(f"{name}.log"))


def prepare(processes: int, *more: str) -> float:
    """Makes what all trials need in the current folder. Returns how many seconds the undisturbed run took."""
    os.environ.setdefault("ACCELERATE_USE_CPU", "1")
    known = Path("undisturbed.json")
    if not known.exists():
        shutil.rmtree("undisturbed", ignore_errors=True)
        write_photos(Path("images"))
        Path("prompts.txt").write_text("a red house --w 64 --h 64 --s 2 --d 1\na lake --w 64 --h 64 --s 2 --d 2\n")
        model_tool(["init", "base.safetensors", "--seed", "3", "--overwrite"])
        began = time.monotonic()
        run = start("undisturbed", processes, *more)
        assert run.wait(PATIENCE) == 0, run.log.read_text()[-4000:]
        known.write_text(json.dumps(time.monotonic() - began))
    return float(json.loads(known.read_text()))


@contextlib.contextmanager
def trial_folder(folder: Path, name: str) -> Iterator[None]:
    """Stands in `folder` for a trial, and removes its files after a trial without a fault."""
    with contextlib.chdir(folder):
        yield
        shutil.rmtree(name, ignore_errors=True)
        Path(f"{name}.log").unlink(missing_ok=True)


def phase(name: str) -> str:
    """The present work of the run in the folder, judged by its files."""
    out, logs = Path(name, "out"), Path(name, "logs")
    if any(out.glob(".*.tmp")):
        return "while it saved"
    if any(path.stat().st_size for path in logs.glob("*/metrics.jsonl")):
        return "between two saves"
    return "before its first step"


def torn(name: str) -> list[str]:
    """The files in the folder's output that stand under their final names and are not complete."""
    found, out = [], Path(name, "out")
    for path in [*out.glob("*.safetensors"), *out.glob("*-state"), *out.glob("sample/*.png")]:
        try:
            if path.suffix == ".png":
                with Image.open(path) as image:
                    image.verify()
                with Image.open(path) as image:
                    image.load()
            elif path.is_dir():
                load_state(path)
            else:
                load_file(path)
        except Exception as error:  # noqa: PERF203 (safetensors has an error class of its own; all faults are reported)
            found.append(f"{path.name} is incomplete: {type(error).__name__}: {error}")
    return found


def outlived(run: Process) -> list[str]:
    """A fault for each process of an ended run that still lives."""
    return [f"a process lives on: {line}" for line in run.outlived_by()]


def pictures(name: str) -> set[tuple[str, str]]:
    """The previews of a run: each name without its time, and the hash of its pixels. They may be drawn twice."""
    found = set()
    for path in Path(name, "out", "sample").glob("*.png"):
        with Image.open(path) as image:
            found.add((re.sub(r"_\d{14}", "", path.stem), hashlib.blake2b(image.tobytes()).hexdigest()))
    return found


def faults_at_the_end(name: str, log: str) -> list[str]:
    """How a finished run differs from the undisturbed one. `log` holds the messages of its last start."""
    found = [f"differs in {part}" for part in differences(Path("undisturbed"), Path(name))]
    if pictures("undisturbed") != pictures(name):
        found.append("differs in its previews")
    if "is encoded again" in log:
        found.append("a shard of the cache was incomplete")
    left = [path.name for path in Path(name, "out").glob(".*")]
    return found + [f"{path} is left over" for path in left]


def finish(name: str, processes: int, *more: str) -> list[str]:
    """Resumes a killed run to its end. Returns what is wrong with it."""
    log = Path(f"{name}.log")
    before = len(log.read_bytes()) if log.exists() else 0
    run = start(name, processes, *more)
    status = run.wait(PATIENCE)
    said = log.read_bytes()[before:].decode(errors="replace")
    if status:
        return [f"the resumed run ended with status {status}: {said[-2000:]}", *outlived(run)]
    return faults_at_the_end(name, said) + outlived(run)


def randoms(seed: int, number: int) -> random.Random:
    """The random numbers of a trial."""
    return random.Random(f"{seed} {number}")


def table(trials: Sequence[Trial], killed: str) -> str:
    """A table of trials by their disturbance, with the faults below."""
    counts = Counter(trial.what for trial in trials)
    faults = Counter(trial.what for trial in trials if trial.failure)
    lines = [f"| {killed} | trials | faults |", "|---|--:|--:|"]
    lines += [f"| {what} | {count} | {faults[what]} |" for what, count in sorted(counts.items())]
    lines += [f"| **all** | {len(trials)} | {sum(faults.values())} |"]
    lines += [f"\nTrial {trial.number}: {trial.failure}" for trial in trials if trial.failure]
    return "\n".join(lines)
