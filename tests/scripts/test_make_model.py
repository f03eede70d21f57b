"""scripts/toy/make_model.py makes the same model, however often it is interrupted."""

import json
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
    """Starts the script in a new process group, so that it can be killed together with its sdxl-train."""
    command = [sys.executable, "-m", "scripts.toy.make_model", "--folder", str(folder), *TINY]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def make(folder: Path) -> str:
    """Runs the script to its end and returns its output."""
    process = start(folder)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return output


def kill_when(due: Callable[[], bool], folder: Path) -> str:
    """Starts the script, kills it and its sdxl-train as soon as `due` is true, and returns its output."""
    process = start(folder)
    end = time.monotonic() + 240
    while not due() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    running = process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    output = process.communicate()[0]  # waits until both processes have ended
    assert running and due(), output
    return output


def content(model: Path) -> tuple[dict, dict, bytes]:
    """Returns metadata, tensors and bytes of a model file without its times: of saving, start and training."""
    with model.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        metadata = header.pop("__metadata__")
        del metadata["modelspec.date"]
        for field, name in (("resume", "log"), ("stages", "seconds")):
            values = json.loads(metadata[f"sdxl_finetune.{field}"])
            for one in values if isinstance(values, list) else [values]:
                del one[name]
            metadata[f"sdxl_finetune.{field}"] = values
        return metadata, header, file.read()


def test_the_model_is_the_same_after_interruptions(tmp_path) -> None:
    undisturbed, interrupted = tmp_path / "undisturbed", tmp_path / "interrupted"
    make(undisturbed)
    kill_when((interrupted / "vae.pt").exists, interrupted)
    step = torch.load(interrupted / "vae.pt", weights_only=True)["step"]
    assert 0 < step < 12 and not (interrupted / "decoder.pt").exists()
    output = kill_when(lambda: any((interrupted / "out").glob("toy-*-state")), interrupted)
    assert re.findall(r"(\d+)/12 ", output)[0] == str(step)
    assert not (interrupted / "out" / "toy.safetensors").exists()
    assert "resuming after step" in make(interrupted)
    assert content(undisturbed / "toy.safetensors") == content(interrupted / "toy.safetensors")
