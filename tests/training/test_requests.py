"""Limits of time and request files save and stop a run, on all ranks after the same step."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from scripts.benchmarks.interrupt import read_metrics, same, saved_names
from sdxl_finetune.output.log import Log
from sdxl_finetune.runtime import signals
from sdxl_finetune.training import requests
from sdxl_finetune.training.state import load_state
from tests.runtime.test_processes import launch, output, wait_for
from tests.training.test_resume import run

ALONE = ["--no-save_state", "--save_every_n_steps", "", "--save_every_n_epochs", "", "--resume", "auto"]
"""No checkpoint and no training state is due before the end."""
OUT = Path("one/out")


@pytest.fixture
def act(monkeypatch: pytest.MonkeyPatch) -> dict[int, Callable[[], object]]:
    """Functions by the number of the step after which they are called. Requests are looked for after each step."""
    actions: dict[int, Callable[[], object]] = {}
    record = Log.record

    def record_and_act(log: Log, step) -> None:
        record(log, step)
        actions.get(step.number, lambda: None)()

    monkeypatch.setattr(Log, "record", record_and_act)
    monkeypatch.setattr(signals, "LOOK_EVERY", 0.0)
    return actions


def reason(folder: str) -> str:
    """The reason for which the last run in the folder ended."""
    log = max(Path(folder, "logs").iterdir())
    return json.loads((log / "ended.json").read_text())["reason"]


def test_files_save_and_stop_a_run(work, act, caplog) -> None:
    act[2], act[4] = (OUT / "save").touch, (OUT / "style.stop").touch
    assert run("one", *ALONE) == 0
    assert saved_names(Path("one")) == [
        "style-step00000003-state",
        "style-step00000003.safetensors",
        "style-step00000004-state",
    ]
    assert "style.stop: stopping" in caplog.text
    assert reason("one") == "Interrupt: stopped by the file one/out/style.stop"
    act.clear()
    (OUT / "stop").touch()
    (OUT / "save").write_bytes(b"x" * 2000)
    assert run("one", *ALONE, "--save_state_on_train_end") == 0 and run("two", *ALONE) == 0
    assert not (OUT / "stop").exists() and "stop is older than this run" in caplog.text
    assert (OUT / "save").exists(), "a large file is no request"
    assert (OUT / "style-step00000003-state").exists() and not (OUT / "style-step00000004-state").exists()
    assert read_metrics(Path("one")) == read_metrics(Path("two")) and len(read_metrics(Path("two"))) == 6
    assert same(*(load_file(f"{folder}/out/style.safetensors") for folder in ("one", "two")))


def test_files_save_and_stop_that_come_together_are_both_followed(work, act) -> None:
    """Step 2 is being looked at already when both files appear. The run then stops after step 2."""

    def ask() -> None:
        (OUT / "save").touch()
        (OUT / "stop").touch()

    act[2] = ask
    assert run("one", *ALONE) == 0
    assert saved_names(Path("one")) == ["style-step00000002-state", "style-step00000002.safetensors"]
    assert not load_state(OUT / "style-step00000002-state").is_interrupted
    assert reason("one").endswith("out/stop")


def test_a_file_save_in_the_last_step_is_followed(work, act) -> None:
    act[6] = (OUT / "save").touch
    assert run("one", *ALONE) == 0
    last = ["style-step00000006-state", "style-step00000006.safetensors"]
    assert saved_names(Path("one")) == [*last, "style.safetensors"]


def test_a_folder_in_the_place_of_a_request_is_named_once(work, act, caplog) -> None:
    OUT.mkdir(parents=True)
    (OUT / "save").mkdir()
    act[1] = (OUT / "stop").mkdir
    assert run("one", *ALONE) == 0
    assert saved_names(Path("one")) == ["save", "stop", "style.safetensors"]
    for name in ("save", "stop"):
        assert caplog.text.count(f"one/out/{name} is no request, because a request is a file") == 1


@pytest.mark.skipif(not shutil.which("chattr") or os.geteuid() != 0, reason="needs root and chattr")
def test_a_request_that_cannot_be_removed_is_followed_once(work, act, caplog) -> None:
    def ask() -> None:
        (OUT / "save").touch()
        if os.system(f"chattr +i {OUT / 'save'}"):
            pytest.skip("this file system has no immutable files")

    act[1] = ask
    try:
        assert run("one", *ALONE) == 0
        assert caplog.text.count("save cannot be removed") == 1
        assert [path.name for path in OUT.glob("*-state")] == ["style-step00000002-state"]
    finally:
        os.system(f"chattr -i {OUT / 'save'}")


def test_max_train_hours_ends_a_run_with_its_state(work, act, caplog, monkeypatch) -> None:
    """The disk is taken to be so slow that the save needs all the time that is left after the first step."""
    monkeypatch.setattr(requests, "SPEED", 1e-3)
    hours = [*ALONE, "--max_train_hours", "1000"]
    assert run("one", *hours) == 0
    assert "max_train_hours = 1000: stopping" in caplog.text
    assert saved_names(Path("one")) == ["style-step00000001-state"]
    assert reason("one") == "Interrupt: stopped by max_train_hours = 1000"
    assert run("one", *hours) == 0
    assert saved_names(Path("one")) == ["style-step00000002-state"], "the limit counts from each start"


def test_max_train_hours_that_have_passed_end_the_preparation(work) -> None:
    assert run("one", *ALONE, "--max_train_hours", "1e-9") == 0
    assert not saved_names(Path("one")) and reason("one").endswith("max_train_hours = 1e-09")


def test_states_by_the_minute_replace_one_another(work, act, caplog) -> None:
    caplog.set_level("INFO")
    every = [*ALONE, "--save_state_every_minutes", "1e-9"]
    assert run("one", *every, "--max_train_steps", "4") == 0
    said = [message for message in caplog.messages if message.startswith(("saved", "removed")) and "-state" in message]
    names = [f"{OUT}/style-step{step:08d}-state" for step in (1, 2, 3, 4)]
    saves, removals = [f"saved {name}" for name in names], [f"removed {name}" for name in names]
    assert said == [saves[0], saves[1], removals[0], saves[2], removals[1], saves[3], removals[2]]
    assert saved_names(Path("one")) == ["style-step00000004-state", "style.safetensors"]
    assert run("one", *ALONE, "--save_state_on_train_end", "--max_train_steps", "5") == 0
    assert saved_names(Path("one")) == ["style-state", "style.safetensors"]
    assert [row["step"] for row in read_metrics(Path("one"))] == [1, 2, 3, 4, 5]


def test_two_ranks_save_and_stop_after_the_same_step(work) -> None:
    process = launch("--max_train_epochs", "500", "--logging_dir", "logs", "--log_with", "tensorboard")
    out = Path("out")
    while not any(path.stat().st_size for path in Path("logs").glob("*/metrics.jsonl")):
        assert process.poll() is None, output(process)
        time.sleep(0.1)
    (out / "save").touch()
    wait_for(out, "*-step*.safetensors", process)
    (out / "stop").touch()
    printed = output(process)
    assert process.returncode == 0 and "Traceback" not in printed, printed
    steps = sorted(json.loads(path.read_text())["step"] for path in out.glob("*-step*-state/state.json"))
    assert len(steps) == 2 and len(list(out.glob("*-step*.safetensors"))) == 1, printed
    (log,) = Path("logs").iterdir()
    ended = json.loads((log / "ended.json").read_text())
    assert ended["step"] == steps[-1] and ended["reason"].endswith("stopped by the file out/stop")


def test_two_ranks_save_what_is_asked_for_when_they_stop_already(work) -> None:
    """The file `stop` is there after step 2, and `save` after step 3, which is the last one."""
    program = [str(Path(__file__).parent / "ask_late.py")]
    process = launch("--max_train_epochs", "500", "--logging_dir", "logs", program=program)
    printed = output(process)
    assert process.returncode == 0 and "Traceback" not in printed, printed
    names = [path.name for path in Path("out").glob("*-step*")]
    assert sorted(names) == ["style-step00000003-state", "style-step00000003.safetensors"], printed
    assert not load_state(Path("out/style-step00000003-state")).is_interrupted


def test_two_ranks_wait_for_storage_until_a_file_stop_ends_the_wait(work) -> None:
    """A folder stands where the final checkpoint belongs."""
    Path("out/style.safetensors/folder").mkdir(parents=True)
    process = launch("--max_train_epochs", "1", "--save_retry_minutes", "5", "--console_log_file", "said.log")
    while not (Path("said.log").exists() and "the run waits at most 5 minutes" in Path("said.log").read_text()):
        assert process.poll() is None, output(process)
        time.sleep(0.1)
    Path("out/stop").touch()
    printed = output(process, 60)
    assert process.returncode == 1 and printed.count("Traceback (most") == 1, "only the launcher's: " + printed
    assert "error: style could not be saved in out before the file out/stop ended the wait" in printed
