"""Storage that fails: a disk that fills up, a folder that is gone. Training goes on, and no earlier save is lost."""

import math
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from scripts.benchmarks.interrupt import differences, same, saved_names
from sdxl_finetune.config import Config
from sdxl_finetune.errors import UserError
from sdxl_finetune.files import free_bytes
from sdxl_finetune.output.checkpoints import Save
from sdxl_finetune.runtime import signals
from sdxl_finetune.training import failed_saves
from sdxl_finetune.training.requests import Requests
from sdxl_finetune.training.saves import Due, Refused
from sdxl_finetune.training.state import load_state
from tests.training.small_runs import DISK, mount, run


class Filling:
    """A folder that takes no more data for a while: a full file system, or a limit on the size of files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.is_mounted = mount(folder)
        self.reason = "No space left on device" if self.is_mounted else "File too large"
        if not self.is_mounted:
            self._resource = pytest.importorskip("resource")
            self._before = self._resource.getrlimit(self._resource.RLIMIT_FSIZE)
            self._handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill(self) -> None:
        """Fills the file system to the last byte, or sets the limit."""
        if not self.is_mounted:
            self._resource.setrlimit(self._resource.RLIMIT_FSIZE, (1 << 20, self._before[1]))
            return
        with (self._folder / "ballast").open("wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(1 << 20)):
                pass
        assert free_bytes(self._folder) == 0

    def empty(self) -> None:
        """Removes what `fill` has written, or the limit."""
        if self.is_mounted:
            (self._folder / "ballast").unlink(missing_ok=True)
        else:
            self._resource.setrlimit(self._resource.RLIMIT_FSIZE, self._before)

    def close(self) -> None:
        self.empty()
        if self.is_mounted:
            subprocess.run(["umount", "-l", str(self._folder)], check=True)
        else:
            signal.signal(signal.SIGXFSZ, self._handler)


@pytest.fixture
def filling(work) -> Iterator[Filling]:
    """The folder `disk`, which can be filled."""
    filling = Filling(work / "disk")
    yield filling
    filling.close()


def forget(folder: str, *names: str) -> None:
    """Removes what a run has saved under these names."""
    for name in names:
        path = Path(folder) / "out" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_a_disk_that_fills_up_and_is_emptied_by_hand_costs_nothing(filling, on_message, caplog) -> None:
    """It is full from the save after step 2 on, until the third attempt to save the end of the run."""
    assert run("undisturbed") == 0
    on_message("saved disk/out/style-step00000002.safetensors", filling.fill)
    on_message("style could not be saved", filling.empty, number=3)
    assert run("disk") == 0
    text = caplog.text
    assert f"style-step00000004-state could not be saved in disk/out ({filling.reason}): it needs 76" in text
    assert "0 bytes is free" in text or not filling.is_mounted
    assert "storage takes saves again: the run is saved up to step 4" in text
    forget("undisturbed", "style-step00000004-state", "style-step00000004.safetensors")
    assert differences(Path("undisturbed"), Path("disk")) == []
    assert load_state(Path("disk/out/style-step00000002-state")).step == 2
    assert not list(Path("disk/out").glob(".*.tmp"))


class Vanishing:
    """A folder in whose place there is a file for a while."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._away = folder, folder.with_name("away")

    def hide(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._folder.rename(self._away)
        self._folder.touch()

    def give_back(self) -> None:
        self._folder.unlink()
        self._away.rename(self._folder)


def test_a_refused_save_is_tried_again_during_training(work, on_message, monkeypatch, caplog) -> None:
    """The folder is gone at the saves after step 2 only. The next step saves both in their place."""
    monkeypatch.setattr(failed_saves, "RETRY_AFTER", 0.0)
    out = Vanishing(Path("one/out"))
    on_message("training unet:", out.hide)
    on_message("style-step00000002 could not be saved", out.give_back)
    kept: list[bool] = []
    on_message(
        "saved one/out/style-step00000003.s", lambda: kept.append(Path("one/out/style-step00000003-state").exists())
    )
    assert run("one") == 0
    assert "style-step00000002-state could not be saved in one/out (File exists)" in caplog.text
    assert "storage takes saves again: the run is saved up to step 3" in caplog.text and kept == [True]
    names = [f"style-step0000000{step}{ending}" for step in (3, 4) for ending in ("-state", ".safetensors")]
    # The state after step 3 goes when the one after step 4 is complete, as that of an interrupted run does.
    assert saved_names(Path("one")) == sorted(
        {*names, "style-state", "style.safetensors"} - {"style-step00000003-state"}
    )


def test_saves_go_to_another_disk_and_a_resume_finds_them_there(work, on_message, caplog) -> None:
    out = Vanishing(Path("one/out"))
    on_message("saved one/out/style-step00000002.safetensors", out.hide)
    assert run("one", "--save_fallback_dir", "other") == 0
    assert "it is saved in other instead" in caplog.text and "style stands in other (save_fallback_dir)" in caplog.text
    assert sorted(path.name for path in Path("other").iterdir()) == sorted(
        {f"style{name}{ending}" for name in ("-step00000004", "") for ending in ("-state", ".safetensors")}
    )
    out.give_back()
    assert run("one", "--save_fallback_dir", "other", "--resume", "auto") == 0
    assert "from the training state other/style-state" in caplog.text
    assert "nothing to do: all 4 steps are made and the final checkpoint is saved" in caplog.text
    assert not list(Path("one/out").glob("style-step00000004*")) and not Path("one/out/style.safetensors").exists()
    assert run("one", "--resume", "other/style-state") == 0
    assert same(load_file("one/out/style.safetensors"), load_file("other/style.safetensors"))


def test_a_batch_that_cannot_be_read_costs_no_step(work, on_message) -> None:
    """The latents are damaged after step 2, at which no training state is saved."""

    def damage() -> None:
        for path in Path("cache/latents").rglob("*.latents"):
            path.write_bytes(b"")

    on_message("saved one/out/style-step00000002.safetensors", damage)
    with pytest.raises(UserError, match="damaged"):
        run("one", "--no-save_state")
    state = load_state(Path("one/out/style-step00000002-state"))
    assert (state.step, state.is_interrupted) == (2, True)


def test_a_run_that_cannot_save_its_end_says_so_and_fails(work, on_message, capsys) -> None:
    on_message("training unet:", Vanishing(Path("one/out")).hide)
    assert run("one", "--max_train_steps", "1", "--save_retry_minutes", "0") == 1
    message = "error: style-state, style could not be saved within 0 minutes in one/out: free space or repair the disk"
    assert message in capsys.readouterr().err


def stop_by_signal() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_that_is_stopped_and_cannot_save_its_state_says_so_and_fails(work, on_message, capsys) -> None:
    on_message("training unet:", Vanishing(Path("one/out")).hide)
    on_message("style-step00000002 could not be saved", stop_by_signal)
    assert run("one", "--save_retry_minutes", "0") == 1
    message = (
        "error: stopped by SIGTERM: style-step00000002-state, style-step00000002 could not be saved within 0 minutes"
    )
    assert f"{message} in one/out: free space or repair the disk, and resume" in capsys.readouterr().err


def test_a_second_signal_ends_the_wait_of_a_stopped_run(work, on_message, capsys, monkeypatch) -> None:
    monkeypatch.setattr(signals, "SAME_SIGNAL", 0.0)
    on_message("training unet:", Vanishing(Path("one/out")).hide)
    on_message("style-step00000002 could not be saved", stop_by_signal)
    on_message("the run waits for storage", stop_by_signal)
    assert run("one", "--save_retry_minutes", "inf") == 1
    message = "error: stopped by SIGTERM: style-step00000002-state, style-step00000002 could not be saved in one/out"
    assert f"{message} before SIGTERM ended the wait: free space" in capsys.readouterr().err


def test_a_file_stop_ends_the_wait_of_a_finished_run(filling, on_message, capsys) -> None:
    on_message("saved disk/out/style-step00000002.safetensors", filling.fill)
    on_message("the run waits at most 0.5 minutes", Path("disk/out/style.stop").touch)
    assert run("disk", "--save_retry_minutes", "0.5") == 1
    message = (
        "error: style-state, style could not be saved in disk/out before the file disk/out/style.stop ended the wait"
    )
    assert message in capsys.readouterr().err and not Path("disk/out/style.stop").exists()


def test_a_signal_and_max_train_hours_end_the_wait(tmp_path) -> None:
    """They end it even if there is no bound of minutes. Before, the run waits until the next attempt is due."""
    config = Config(output_dir=tmp_path, save_retry_minutes=math.inf)
    saves, stop = failed_saves.FailedSaves(config), signals.StopRequest()
    try:
        accelerator = Accelerator(cpu=True)
        requests = Requests(config, accelerator, stop)
        assert saves.wait(0, time.monotonic(), requests.end_of_wait) == ""
        stop.number = signal.SIGINT
        assert saves.wait(9, time.monotonic(), requests.end_of_wait) == "SIGINT"
        assert str(requests.cause()) == "stopped by SIGINT"
        assert requests.end_of_wait() == "", "the signal that stopped the run does not end its wait"
        limited = config.model_copy(update={"max_train_hours": 1e-9})
        requests = Requests(limited, accelerator, signals.StopRequest())
        assert saves.wait(9, time.monotonic(), requests.end_of_wait) == "max_train_hours = 1e-09"
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_states_that_are_saved_do_not_put_off_a_refused_checkpoint(work, on_message, monkeypatch, caplog) -> None:
    """A folder stands where the checkpoint after step 2 belongs. A training state is saved after each step."""
    caplog.set_level("INFO")
    monkeypatch.setattr(signals, "LOOK_EVERY", 0.0)
    in_the_way = Path("one/out/style-step00000002.safetensors/folder")
    on_message("training unet:", lambda: in_the_way.mkdir(parents=True))
    assert run("one", "--save_state_every_minutes", "1e-9") == 0
    assert "style-step00000002 could not be saved in one/out (Is a directory)" in caplog.text
    said = [text for text in caplog.messages if text.startswith("saved") and "step00000003" in text]
    assert said == [f"saved one/out/style-step00000003{ending}" for ending in ("-state", ".safetensors")]


def test_each_kind_of_refused_save_has_its_own_clock(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(failed_saves, "RETRY_AFTER", 0.0)
    saves = failed_saves.FailedSaves(Config(output_dir=tmp_path, output_name="m"))
    both = Due([Save(name="m-step00000010")], [Save(name="m-step00000010-state")])
    try:
        Accelerator(cpu=True)
        saves.note(10, both, Refused(["m-step00000010"], []))
        monkeypatch.setattr(failed_saves, "RETRY_AFTER", 1e9)
        saves.note(11, Due(states=[Save(name="m-step00000011-state")]), Refused([], ["m-step00000011-state"]))
        due = saves.with_retries(Due(is_temporary=True), 12)
        assert [save.name for save in due.weights] == ["m-step00000012"] and not due.states
        saves.note(12, due, Refused(["m-step00000012"], []))
        assert not saves.with_retries(Due(), 13), "both clocks are far from their next attempt"
        due = saves.with_retries(Due(weights=[Save(name="m-000001")]), 13)
        assert [save.name for save in due.states] == ["m-step00000013-state"], (
            "a save is a new attempt for the other kind"
        )
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_a_resumed_run_needs_room_for_no_more_than_it_has_to_save(disk, caplog) -> None:
    """All steps are made, and the final checkpoint alone is missing. It takes a third of the saves of a step."""
    length = ["--save_every_n_steps", "9", "--save_state_on_train_end"]
    assert run("disk", *length) == 0
    weights = load_file("disk/out/style.safetensors")
    forget("disk", "style.safetensors")
    (disk / "ballast").write_bytes(bytes(int(free_bytes(disk)) - (60 << 20)))
    assert run("disk", *length, "--resume", "auto") == 0
    assert same(load_file("disk/out/style.safetensors"), weights) and "could not be saved" not in caplog.text


def test_a_refused_save_that_a_file_asked_for_stays_once_it_is_made(work, on_message, monkeypatch) -> None:
    """Storage refuses the save after step 1 and takes it after step 2. The state after step 4 replaces neither."""
    monkeypatch.setattr(failed_saves, "RETRY_AFTER", 0.0)
    monkeypatch.setattr(signals, "LOOK_EVERY", 0.0)  # the file is found in step 1, however quick that is
    out = Vanishing(Path("one/out"))
    on_message("training unet:", Path("one/out/save").touch)
    on_message("one/out/save: a checkpoint and a training state are saved", out.hide)
    on_message("style-step00000001 could not be saved", out.give_back)
    assert run("one", "--save_every_n_steps", "4") == 0
    assert {"style-step00000002-state", "style-step00000002.safetensors"} <= {*saved_names(Path("one"))}
    assert not load_state(Path("one/out/style-step00000002-state")).is_interrupted
    assert load_state(Path("one/out/style-step00000004-state")).step == 4


def test_a_disk_without_room_for_one_save_is_named_before_the_first_step(disk) -> None:
    (disk / "ballast").write_bytes(bytes(DISK - (60 << 20)))
    wanted = r"output_dir = 'disk/out': the disk has \d\d\.\d MiB free, and one save takes 114\.\d MiB: free space"
    with pytest.raises(UserError, match=wanted):
        run("disk")
    assert [path.stat().st_size for path in Path("disk/logs").glob("*/metrics.jsonl")] == [0]
