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


LEAVE = """
import subprocess
import sys
from pathlib import Path
from scripts.benchmarks import interrupt

interrupt.cli.train = lambda: sys.exit(bool(subprocess.Popen(["sleep", "500"]).returncode))
subprocess.Popen(["sleep", "400"])
for _ in range(2):
    run = interrupt.Process([], 1, Path("run.log"))
    print(run.wait(), run.outlived_by(1), run.outlived_by(1))
"""


def test_a_process_that_outlives_its_run_is_found_and_ended(tmp_path: Path) -> None:
    """A run of one process is forked. A process beside the run is none of its own."""
    command, root = [sys.executable, "-c", LEAVE], str(Path(__file__).parents[2])
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        start_new_session=True,
    ) as program:
        try:
            assert program.stdout and [program.stdout.readline() for _ in range(2)] == ["0 ['sleep 500'] []\n"] * 2
        finally:
            os.killpg(program.pid, signal.SIGKILL)


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
