"""The small model that draws is made the same however often its making is interrupted."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

TINY = [
    *("--pictures", "24", "--vae_steps", "12", "--decoder_steps", "4", "--keep_every", "3", "--judged", "2"),
    *("--max_train_steps", "8", "--save_every_n_steps", "2", "--train_batch_size", "4", "--lr_warmup_steps", "2"),
]


def start(folder: Path) -> subprocess.Popen:
    """The script, in a process group of its own with the sdxl-train that it starts."""
    command = [sys.executable, "-m", "scripts.toy.make_model", "--folder", str(folder), *TINY]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def make(folder: Path) -> str:
    """What the script says until it has made the model."""
    process = start(folder)
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0, said
    return said


def kill_when(due: Callable[[], bool], folder: Path) -> str:
    """Starts the script and kills it and what it has started as soon as `due`; what it has said."""
    process = start(folder)
    end = time.monotonic() + 240
    while not due() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    running = process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    said = process.communicate()[0]  # until both have gone
    assert running and due(), said
    return said


TIMES = rb'"modelspec.date":"[^"]{19}"|\\"log\\": \\"\d{14}\\"'
"""In the metadata: of saving, and of the start, after which the log is named."""


def content(model: Path) -> bytes:
    """The file as it is but for two times, each as long whenever it was."""
    found, count = re.subn(TIMES, b"", model.read_bytes())
    assert count == 2
    return found


def test_the_model_is_the_same_after_interruptions(tmp_path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    make(one)
    kill_when((other / "vae.pt").exists, other)
    step = torch.load(other / "vae.pt", weights_only=True)["step"]
    assert 0 < step < 12 and not (other / "decoder.pt").exists()
    said = kill_when(lambda: any((other / "out").glob("toy-*-state")), other)
    assert re.findall(r"(\d+)/12 ", said)[0] == str(step)
    assert not (other / "out" / "toy.safetensors").exists()
    assert "going on after step" in make(other)
    assert content(one / "toy.safetensors") == content(other / "toy.safetensors")
