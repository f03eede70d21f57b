"""Runs whose `output_dir` is in an object store: stopped ones, and those that go on on another machine."""

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from sdxl_finetune.storage import Address, list_files, read
from tests.s3_server import S3Server
from tests.training.test_resume import run, start

OUT = Address("s3://bucket/out")
FAST = ["--optimizer_type", "Lion", "--ema_half_life", "", "--gradient_accumulation_steps", "1"]
FAST += ["--validation_split", "0", "--save_every_n_epochs", ""]


def on(machine: str) -> list[str]:
    """The options of a run on this machine, which shares only the store with others."""
    return [*FAST, "--output_dir", str(OUT), "--cache_dir", "cache", "--cache_dir_local", machine]


def stored() -> set[str]:
    """Names of the saves in the store."""
    return {found.name.partition("/")[0] for found in list_files(OUT)}


def step_of(state: str) -> int:
    step: int = json.loads(read(OUT / state / "state.json"))["step"]
    return step


def said_until(process: subprocess.Popen, pattern: str) -> str:
    """What a process says, up to the line in which the pattern is found."""
    text = ""
    assert process.stderr
    while not re.search(pattern, text):
        line = process.stderr.readline()
        assert line, text
        text += line
    return text


def test_the_state_of_a_stopped_run_is_in_the_store_and_another_machine_replaces_it(work, s3: S3Server, caplog) -> None:
    options = ["--no-save_state", "--save_every_n_steps", "", "--resume", "auto"]
    process = start("one", *on("one"), *options)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 143, said
    (state,) = stored()
    step = step_of(state)
    assert state == f"style-step{step:08d}-state"

    caplog.set_level("INFO")
    more = ["--resume", "auto", "--max_train_steps", str(step + 1), "--save_every_n_steps", "1"]
    assert run("two", *on("two"), *more) == 0
    assert f"resuming after step {step}" in caplog.text
    assert state not in stored(), "the state of an interruption goes as soon as a newer one is complete"
    assert "style-state" in stored()


def test_a_second_signal_leaves_the_state_on_the_disk_and_the_next_run_uploads_it(work, s3: S3Server) -> None:
    options = [*on("one"), "--no-save_state", "--save_every_n_steps", "", "--resume", "auto"]
    process = start("one", *options)
    with s3.holding():
        process.send_signal(signal.SIGTERM)
        said_until(process, "waiting at most")
        time.sleep(1.5)  # two signals within a second are one
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 143 and "Traceback" not in said
    (name,) = re.findall(r"not uploaded: (\S+)\.", said)
    (state,) = Path("one").glob("out-*/*-state")
    assert name == state.name and f"{name}/manifest.json" not in {found.name for found in list_files(OUT)}
    step = json.loads((state / "state.json").read_text())["step"]
    assert run("one", *options, "--max_train_steps", str(step + 1)) == 0
    assert step_of(name) == step


@pytest.mark.parametrize("period", ["epochs", "steps"])
def test_old_saves_that_only_the_store_holds_are_removed_by_the_same_rule(work, s3: S3Server, period: str) -> None:
    saving = {"steps": ["--save_every_n_steps", "1", "--save_last_n_steps", "2"]}
    saving["epochs"] = ["--save_every_n_steps", "", "--save_every_n_epochs", "1", "--save_last_n_epochs", "2"]
    for image in sorted(Path("images").glob("*.jpg"))[2:]:
        image.unlink()  # an epoch has two steps
    first, last = {"steps": ("4", "6"), "epochs": ("3", "7")}[period]
    local = [*FAST, *saving[period], "--save_precision", "fp16"]
    assert run("local", *local, "--max_train_steps", first) == 0
    assert run("local", *local, "--max_train_steps", last, "--resume", "auto") == 0
    kept = {path.name for path in Path("local/out").iterdir() if path.name.startswith("style")}
    assert "style-000001.safetensors" not in kept and "style-step00000002.safetensors" not in kept
    each = ["--save_precision", "fp16", *saving[period]]
    assert run("one", *on("one"), *each, "--max_train_steps", first) == 0
    assert run("two", *on("two"), *each, "--max_train_steps", last, "--resume", "auto") == 0
    assert {name for name in stored() if name.startswith("style")} == kept
