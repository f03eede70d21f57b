"""A slice of the trials that kill runs, and proof that their judgement finds incomplete files and differences."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from scripts.benchmarks.interrupt import MARK, Process
from scripts.benchmarks.torture_runs import pictures, torn
from sdxl_finetune.training.state import TrainingState, save_state


@pytest.mark.parametrize(("kind", "trials"), [("kills", 2), ("kills_of_ranks", 1)])
def test_killed_runs_end_like_undisturbed_ones(tmp_path: Path, kind: str, trials: int) -> None:
    """The first two trials of this seed kill a data-loader worker and the main process; that of two ranks, rank 1."""
    command = [sys.executable, "-m", "scripts.benchmarks.torture", kind, "--trials", str(trials), "--seed", "3"]
    done = subprocess.run([*command, "--folder", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("as it must be") == trials
    assert f"| **all** | {trials} | 0 |" in done.stdout


def test_a_process_that_outlives_its_run_is_found(tmp_path: Path) -> None:
    """A child of the main process is of the run, and one that runs beside it is not."""
    with subprocess.Popen(["sleep", "600"]) as other:
        run = Process(["--help"], 2, tmp_path / "run.log")
        run.wait()
        assert run.outlived_by() == []
        with subprocess.Popen(["sleep", "500"], env={**os.environ, MARK: str(run.log.resolve())}) as worker:
            assert run.outlived_by(1) == ["sleep 500"]
            assert worker.wait() == -signal.SIGKILL
        assert other.poll() is None
        other.kill()


def test_incomplete_files_are_found(tmp_path: Path, base: Path) -> None:
    out = tmp_path / "run" / "out"
    (out / "sample").mkdir(parents=True)
    shutil.copy(base, out / "whole.safetensors")
    picture = out / "sample" / "style_000003_00_20260101120000_1.png"
    Image.new("RGB", (64, 64), "red").save(picture)
    save_state(out / "whole-state", TrainingState(step=1, epoch=0), {}, {})
    with contextlib.chdir(tmp_path):
        assert torn("run") == []
        ((name, _),) = pictures("run")
        assert name == "style_000003_00_1"
        (out / "cut.safetensors").write_bytes(base.read_bytes()[:-100])
        shutil.copytree(out / "whole-state", out / "cut-state")
        (out / "cut-state" / "manifest.json").unlink()
        picture.write_bytes(picture.read_bytes()[:-20])
        assert sorted(fault.partition(" ")[0] for fault in torn("run")) == [
            "cut-state",
            "cut.safetensors",
            picture.name,
        ]
