"""A lock keeps two processes apart, names the one that holds it, and goes with it however it ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sdxl_finetune.runtime.locks import Lock, Locked

HOLD = """
import sys
from pathlib import Path
from sdxl_finetune.runtime.locks import Lock
lock = Lock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
sys.stdin.read()
lock.release()
"""
pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no flock")


def hold(path: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("end", ["kill", "release"])
def test_a_lock_names_its_holder_and_ends_with_it(tmp_path: Path, end: str) -> None:
    path, lock = tmp_path / "out" / ".lock", Lock(tmp_path / "out" / ".lock")
    with hold(path) as process:
        with pytest.raises(Locked) as caught:
            lock.acquire()
        assert f"another run (process {process.pid} on {os.uname().nodename}, since 2" in str(caught.value)
        process.send_signal(signal.SIGKILL) if end == "kill" else process.stdin.close()
    assert path.exists() == (end == "kill"), "a killed process leaves its file, which is no lock"
    lock.acquire()
    with pytest.raises(Locked, match=f"process {os.getpid()} "):
        Lock(path).acquire()
    lock.release()
    assert not path.exists()
    lock.release()


def test_a_folder_without_locks_is_named(tmp_path: Path, caplog) -> None:
    (tmp_path / "file").touch()
    lock = Lock(tmp_path / "file" / ".lock")
    lock.acquire()
    lock.release()
    assert "cannot be locked" in caplog.text and "no other run uses it" in caplog.text


@pytest.mark.parametrize("content", ["", "[" * 9_000, "[1]", "3", '{"process": 1}', "\xff", '{"a": ' * 5_000])
def test_a_lock_with_a_damaged_text_still_holds(tmp_path: Path, content: str) -> None:
    lock = Lock(tmp_path / ".lock")
    lock.acquire()
    (tmp_path / ".lock").write_text(content, encoding="latin-1")
    with pytest.raises(Locked) as caught:
        Lock(tmp_path / ".lock").acquire()
    assert str(caught.value) == "another run"
    lock.release()


def test_a_lock_whose_folder_was_replaced_leaves_the_lock_of_another_run(tmp_path: Path) -> None:
    """As after a mount that was away: the file of the lock is elsewhere, and another run has locked a new one."""
    path = tmp_path / "out" / ".lock"
    lock = Lock(path)
    lock.acquire()
    path.parent.rename(tmp_path / "away")
    with hold(path) as process:
        lock.release()
        with pytest.raises(Locked, match=f"process {process.pid} "):
            Lock(path).acquire()
        process.kill()
