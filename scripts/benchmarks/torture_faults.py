"""Runs whose storage fails on purpose: each trial makes calls on one kind of file fail, in a writer or a reader.

A library (faults.c) stands between the run and the system. The trial chooses the file, the call, the error, how many
calls succeed before it and how many fail. Afterwards the run has gone on to the weights of an undisturbed run, or has
ended with messages and no traceback. All that stands under a final name is complete. A resume without faults ends with
the weights of the undisturbed run, bit for bit. Needs Linux and a C compiler.
"""

import errno
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from scripts.benchmarks.interrupt import OPTIONS, STYLE, Process, same
from scripts.benchmarks.torture import Trial
from scripts.toy.photos import write_photos
from sdxl_finetune.commands.model import main as model_tool
from sdxl_finetune.errors import UserError
from sdxl_finetune.training.state import load_state

SOURCE = Path(__file__).with_name("faults.c")
LOADED = "LD_PRELOAD"
STEPS = 4
RUN = [
    *OPTIONS,
    *("--resolution", "64", "--max_bucket_reso", "64", "--gradient_accumulation_steps", "1", "--no-flip_aug"),
    *("--optimizer_type", "SGD", "--learning_rate", "0.01", "--ema_half_life", "", "--seed", "5"),
    *("--save_every_n_epochs", "", "--save_every_n_steps", "2", "--save_last_n_steps", "", "--save_precision", "bf16"),
    *("--max_train_epochs", "", "--max_train_steps", str(STEPS), "--cache_latents_to_disk"),
    *("--sample_prompts", "prompts.txt", "--sample_every_n_steps", "2", "--train_data_dir", "images"),
]
FROZEN = ["--no-train_text_encoder", "--cache_text_encoder_outputs_to_disk", "--no-shuffle_caption"]
FROZEN += ["--caption_dropout_rate", "0", "--caption_tag_dropout_rate", "0"]
"""Options of a run that keeps the outputs of its text encoders."""
WRITERS = {
    "checkpoint": ".safetensors.",
    "training state: weights": "weights.safetensors",
    "training state: optimizer": "optimizer.pt",
    "training state: manifest": "manifest.json",
    "training state: folder": "-state.",
    "latents": ".latents.",
    "text encoder outputs": ".text_outputs.",
    "index": ".index.",
    "scan": ".scan.",
    "previews": "/sample/",
    "metrics": "metrics.jsonl",
    "saves of the log": "saves.jsonl",
    "TensorBoard": "tfevents",
    "messages": "console_rank0.log",
    "facts of the log": "versions.json",
}
"""Files that a run writes, each by a part of their temporary or final path."""
WITHOUT_RENAME = {
    *("training state: weights", "training state: optimizer", "training state: manifest"),
    *("metrics", "saves of the log", "TensorBoard", "messages"),
}
"""Files that are not renamed: they grow, or their folder is renamed."""
ONLY_WRITTEN = {"TensorBoard", "messages"}
"""Files that are opened once and not flushed to the disk by themselves."""
READERS = {
    "images": "/images/",
    "captions": ".txt",
    "model": "base.safetensors",
    "latents": ".latents",
    "training state": "-state/",
    "previews": "/sample/",
    "log": "metrics.jsonl",
}
"""Files that a run reads."""
WRITE_FAULTS = {
    "no space": ("write", errno.ENOSPC),
    "quota": ("write", errno.EDQUOT),
    "I/O error": ("write", errno.EIO),
    "short write": ("write", 0),
    "failed fsync": ("fsync", errno.EIO),
    "failed rename": ("rename", errno.EIO),
    "read-only": ("open", errno.EROFS),
}


@dataclass(frozen=True)
class Fault:
    """Calls that fail in one trial."""

    file: str
    kind: str
    call: str
    number: int
    part: str
    skip: int
    count: int
    """Number of calls that fail; -1 for all."""

    @property
    def what(self) -> str:
        return f"{self.kind}: {self.file}"

    def environment(self, log: Path) -> dict[str, str]:
        """The variables that faults.c reads."""
        return {
            "FAULTS_CALL": self.call,
            "FAULTS_PATH": self.part,
            "FAULTS_ERRNO": str(self.number),
            "FAULTS_SKIP": str(self.skip),
            "FAULTS_COUNT": str(self.count),
            "FAULTS_LOG": str(log),
        }


def choose(number: int, seed: int) -> Fault:
    """The fault of a trial. Consecutive trials go through all files, so that 50 trials meet each of them."""
    rng = random.Random(f"{seed}/{number}")
    files = [("write", name) for name in WRITERS] + [("read", name) for name in READERS]
    way, file = files[(number + seed) % len(files)]
    count = rng.choice([1, 1, 3, -1])
    if way == "read":
        return Fault(file, "read error", "read", errno.EIO, READERS[file], rng.choice([0, 0, 1, 3]), count)
    kinds = [
        kind
        for kind, (call, _) in WRITE_FAULTS.items()
        if not (call == "rename" and file in WITHOUT_RENAME) and not (call == "fsync" and file in ONLY_WRITTEN)
    ]
    kind = rng.choice(kinds)
    call, error = WRITE_FAULTS[kind]
    # A file is opened, flushed and renamed once, and written in several calls.
    skip = rng.choice([0, 0, 1, 2]) if file in ("checkpoint", "training state: folder") or call == "write" else 0
    return Fault(file, kind, call, error, WRITERS[file], skip, count)


def try_once(number: int, seed: int, folder: Path) -> Trial:
    """Makes a run with a fault, and a resume without it."""
    load_faults(folder)
    os.chdir(folder)
    os.environ.setdefault("ACCELERATE_USE_CPU", "1")
    fault = choose(number, seed)
    options = [*RUN, *(FROZEN if fault.file == "text encoder outputs" else [])]
    expected = undisturbed(folder, options, "frozen" if fault.file == "text encoder outputs" else "whole")
    place = folder / "trial"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    if fault.call == "read" and fault.file in ("training state", "log"):
        # Something to resume from: the first run is made to its end, and loses its last saves.
        start(place, options)
        for path in (place / "out").glob("style*"):
            if "step00000002" not in path.name:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    fallback = ["--save_fallback_dir", "other"] if random.Random(f"fallback/{seed}/{number}").random() < 0.25 else []
    status = start(place, [*options, *fallback], fault)
    failure = judge(place, status, expected)
    if failure is None and (status or not (place / "out" / "style.safetensors").exists()):
        status = start(place, [*options, *fallback])
        failure = judge(place, status, expected, resumed=True)
    if failure is None:
        shutil.rmtree(place)
    was_met = "" if (folder / "faults.log").exists() else " (not met)"
    return Trial(number, fault.what + was_met, failure)


def load_faults(folder: Path) -> None:
    """Starts this program again with the library of faults, unless it has been loaded."""
    if "faults.so" in os.environ.get(LOADED, ""):
        return
    library = folder / "faults.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", library, SOURCE, "-ldl"], check=True)
    environment = {**os.environ, LOADED: str(library)}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def undisturbed(folder: Path, options: list[str], name: str) -> Path:
    """The final checkpoint of a run without faults, which is made once."""
    place = folder / name
    final = place / "out" / "style.safetensors"
    if not (folder / "base.safetensors").exists():
        write_photos(folder / "images")
        (folder / "prompts.txt").write_text("a photograph --w 64 --h 64 --s 2 --d 1\n")
        model_tool(["init", "base.safetensors", "--seed", "3"])
    if not final.exists():
        assert start(place, options) == 0, (folder / f"{name}.log").read_text()[-4000:]
    return final


def start(place: Path, options: list[str], fault: Fault | None = None) -> int:
    """Runs sdxl-train with output and log in a folder, and returns its exit status. Messages go beside the folder."""
    log = place.parent / "faults.log"
    log.unlink(missing_ok=True) if fault else None
    os.environ.update(fault.environment(log) if fault else {})
    try:
        folders = ["--output_dir", f"{place.name}/out", "--logging_dir", f"{place.name}/logs", "--resume", "auto"]
        options = [f"{place.name}/other" if word == "other" else word for word in options]
        retry = ["--save_retry_minutes", "0.05"]
        process = Process(["--config", str(STYLE), *options, *folders, *retry], 1, place.with_suffix(".log"))
    finally:
        for name in Fault("", "", "", 0, "", 0, 0).environment(log):
            os.environ.pop(name, None)
    return process.wait(600)


def judge(place: Path, status: int, expected: Path, *, resumed: bool = False) -> str | None:
    """The fault that is found after a run; None if all is as it must be."""
    messages = place.with_suffix(".log").read_text(errors="replace")
    if "Traceback (most recent call last)" in messages:
        return f"a traceback, exit status {status}: {messages[-1500:]}"
    if status not in (0, 1, 2) or (resumed and status):
        return f"exit status {status}: {messages[-1500:]}"
    if status and "error: " not in messages:
        return f"exit status {status} without a message: {messages[-1500:]}"
    for folder in (place / "out", place / "other"):
        if damaged := damaged_saves(folder):
            return damaged
        if left := sorted(path.name for path in folder.rglob("*.tmp")):
            return f"left behind: {', '.join(left)}"
    if status == 0:
        finals = [folder / "style.safetensors" for folder in (place / "out", place / "other")]
        final = next((path for path in finals if path.exists()), None)
        if final is None:
            return "exit status 0 without the final checkpoint"
        if not same(load_file(expected), load_file(final)):
            return "other weights than those of the undisturbed run"
    return None


def damaged_saves(folder: Path) -> str | None:
    """Names a save under a final name that cannot be loaded; None if all can."""
    try:
        for path in folder.glob("*.safetensors"):
            load_file(path)
        for path in folder.glob("*-state"):
            load_state(path)
    except (UserError, SafetensorError, OSError) as error:
        return f"damaged: {error}"
    return None


def figures(trials: Sequence[Trial]) -> str:
    """A table of faults, with how many trials of each there were and how many ended as they must."""
    made = Counter(trial.what.partition(":")[0] for trial in trials if "(not met)" not in trial.what)
    bad = Counter(trial.what.partition(":")[0] for trial in trials if trial.failure)
    rows = [f"| {kind} | {count} | {count - bad[kind]} |" for kind, count in sorted(made.items())]
    met = sum(made.values())
    head = f"{len(trials)} runs. In {met} of them the fault was met; the others never made the call that was to fail."
    return "\n".join([head, "", "| fault | runs | as they must be |", "|---|--:|--:|", *rows])
