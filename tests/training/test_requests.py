"""Limits of time and request files save and stop a run, on all ranks after the same step."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from scripts.benchmarks.interrupt import read_metrics, same, saved_names
from sdxl_finetune.runtime import signals
from sdxl_finetune.training import requests
from tests.runtime.test_processes import children, launch, output
from tests.training.test_resume import run, start

ALONE = ["--no-save_state", "--save_every_n_steps", "", "--save_every_n_epochs", "", "--resume", "auto"]
"""No checkpoint and no training state is due before the end."""


def wait_for(condition: Callable[[], object], process) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def reason(folder: str) -> str:
    """The reason for which the last run in the folder ended."""
    log = max(Path(folder, "logs").iterdir())
    return json.loads((log / "ended.json").read_text())["reason"]


def step_of(state: Path) -> int:
    return json.loads((state / "state.json").read_text())["step"]


def test_files_save_and_stop_a_run(work) -> None:
    process = start("one", *ALONE)
    out = Path("one/out")
    (out / "save").touch()
    wait_for(lambda: list(out.glob("style-step*.safetensors")), process)
    (state,) = out.glob("style-step*-state")
    (checkpoint,) = out.glob("style-step*.safetensors")
    assert state.name == f"{checkpoint.stem}-state" and not (out / "save").exists()
    (out / "style.stop").touch()
    said = process.communicate()[1]
    assert process.returncode == 0 and "style.stop: stopping after this step" in said and "Traceback" not in said
    assert reason("one").endswith("stopped by the file one/out/style.stop") and not (out / "style.stop").exists()
    stopped = max(out.glob("style-step*-state"), key=step_of)
    assert step_of(stopped) > step_of(state), "the state of the request stays beside that of the stop"
    last = step_of(stopped) + 1
    (out / "stop").touch()
    (out / "save").write_bytes(b"x" * 2000)
    assert run("one", *ALONE, "--max_train_steps", str(last), "--save_state_on_train_end") == 0
    assert not (out / "stop").exists(), "a request that is older than the run has no effect"
    assert (out / "save").exists(), "a large file is no request"
    assert [row["step"] for row in read_metrics(Path("one"))] == list(range(1, last + 1))
    assert not stopped.exists() and state.exists() and (out / "style.safetensors").exists()


def test_max_train_hours_ends_a_run_with_its_state(work, caplog, monkeypatch) -> None:
    """The disk is taken to be so slow that the save needs all the time that is left after the first step."""
    monkeypatch.setattr(requests, "SPEED", 1e-3)
    monkeypatch.setattr(signals, "LOOK_EVERY", 0.0)
    hours = [*ALONE, "--max_train_hours", "1000"]
    assert run("one", *hours) == 0
    assert "max_train_hours = 1000: stopping" in caplog.text
    assert saved_names(Path("one")) == ["style-step00000001-state"]
    assert reason("one") == "Interrupt: stopped by max_train_hours = 1000"
    assert run("one", *hours) == 0
    assert saved_names(Path("one")) == ["style-step00000002-state"], "the limit counts from each start"
    assert run("one", *ALONE) == 0 and run("two", *ALONE) == 0
    assert read_metrics(Path("one")) == read_metrics(Path("two"))
    assert same(*(load_file(f"{folder}/out/style.safetensors") for folder in ("one", "two")))


def test_max_train_hours_that_have_passed_end_the_preparation(work, caplog) -> None:
    assert run("one", *ALONE, "--max_train_hours", "1e-9") == 0
    assert not saved_names(Path("one")) and reason("one").endswith("max_train_hours = 1e-09")


def test_states_by_the_minute_replace_one_another(work) -> None:
    every = ["--save_state_every_minutes", "0.00001", "--max_train_steps", "500"]
    process = start("one", *ALONE, *every)
    out, steps = Path("one/out"), set[int]()
    while len(steps) < 3:
        assert process.poll() is None, process.communicate()
        found = [path.name for path in out.glob("style-step*-state")]
        assert len(found) <= 2, "an old state stays only until the new one is complete"
        steps |= {int(name[10:18]) for name in found}
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    last = max(step_of(path) for path in out.glob("style-step*-state")) + 1
    assert run("one", *ALONE, "--max_train_steps", str(last), "--save_state_on_train_end") == 0
    assert saved_names(Path("one")) == ["style-state", "style.safetensors"]
    assert run("two", *ALONE, "--max_train_steps", str(last), "--save_state_on_train_end") == 0
    names = [f"{folder}/out/style-state/weights.safetensors" for folder in ("one", "two")]
    assert same(*map(load_file, names)) and read_metrics(Path("one")) == read_metrics(Path("two"))


@pytest.mark.parametrize("request_", ["file", "signal"])
def test_two_ranks_save_and_stop_after_the_same_step(work, request_: str) -> None:
    process = launch("--max_train_epochs", "500", "--logging_dir", "logs", "--log_with", "tensorboard")
    out = Path("out")
    wait_for(lambda: any(path.stat().st_size for path in Path("logs").glob("*/metrics.jsonl")), process)
    (out / "save").touch()
    wait_for(lambda: list(out.glob("*-step*.safetensors")), process)
    if request_ == "file":
        (out / "stop").touch()
    else:
        os.kill(children(process)[1], signal.SIGTERM)
    printed = output(process)
    assert (process.returncode == 0) == (request_ == "file"), printed
    assert "Traceback (most recent call last):\n  File \"<" not in printed and "Timed out" not in printed
    states = sorted(out.glob("*-step*-state"), key=step_of)
    assert len(states) == 2 and len(list(out.glob("*-step*.safetensors"))) == 1, printed
    (log,) = Path("logs").iterdir()
    assert json.loads((log / "ended.json").read_text())["step"] == step_of(states[-1])
