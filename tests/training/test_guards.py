"""Two runs are kept apart: by the names under which they save, and by the folder into which they encode."""

import contextlib
import threading
from pathlib import Path

import psutil

from sdxl_finetune.data import scan
from sdxl_finetune.latents import alone
from tests.runtime.test_locks import hold, pytestmark  # noqa: F401
from tests.training.test_resume import refusal, run

SHORT = ["--max_train_steps", "1", "--no-save_state", "--validation_split", "0"]


def test_a_second_run_under_the_same_names_is_refused(work) -> None:
    with hold(Path("one/out/.style.lock")) as process:
        said = refusal("one", *SHORT)
        assert "output_dir = 'one/out': another run (process " in said and str(process.pid) in said
        assert "set another output_name" in said
        assert run("one", *SHORT, "--output_name", "other") == 0, "other names do not collide"
        process.kill()
    assert run("one", *SHORT) == 0, "a killed run leaves no lock"
    assert not list(Path("one/out").glob(".*"))


def test_a_second_run_with_the_same_fallback_is_refused(work) -> None:
    with hold(Path("other/.style.lock")) as process:
        said = refusal("one", *SHORT, "--save_fallback_dir", "other")
        assert "save_fallback_dir = 'other': another run (process " in said and str(process.pid) in said
        process.kill()
    assert run("one", *SHORT, "--save_fallback_dir", "other") == 0
    assert not list(Path("other").iterdir()) and not list(Path("one/out").glob(".*"))


def test_a_second_run_waits_until_the_cache_is_filled(work, caplog, monkeypatch) -> None:
    """The other process holds the lock of the cache until this run has said that it waits."""
    monkeypatch.setattr(alone, "WAIT", 0.1)
    assert run("one", *SHORT, "--cache_dir", "cache") == 0
    (folder,) = {path.parent for path in Path("cache").rglob("*.latents")}
    for shard in folder.glob("*.latents"):
        shard.unlink()
    said = threading.Event()
    with hold(folder / alone.LOCK) as holder:

        def end_holder(record) -> bool:
            if "which encodes into this folder" in record.getMessage() and not said.is_set():
                assert holder.stdin and f"process {holder.pid}" in record.getMessage()
                holder.stdin.close()
                said.set()
            return True

        alone.logger.addFilter(end_holder)
        try:
            assert run("two", *SHORT, "--cache_dir", "cache") == 0
        finally:
            alone.logger.removeFilter(end_holder)
            holder.kill()
    assert said.is_set() and list(folder.glob("*.latents")) and not (folder / alone.LOCK).exists()


def test_a_killed_process_of_the_scan_ends_the_run_with_one_message(work, monkeypatch) -> None:
    monkeypatch.setattr(scan, "IN_PROCESS", -1)
    monkeypatch.setattr(scan, "CHUNK", 1)
    ended = threading.Event()

    def kill_children() -> None:
        while not ended.wait(0.01):
            for child in psutil.Process().children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if "--multiprocessing-fork" in child.cmdline():
                        child.kill()

    killer = threading.Thread(target=kill_children)
    killer.start()
    try:
        said = refusal("one", *SHORT)
    finally:
        ended.set()
        killer.join()
    assert "a process that reads image files was killed" in said and "\n" not in said
