"""The trials on failing storage: they reach every file and every fault, and a few of them are made."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.benchmarks.torture import Trial
from scripts.benchmarks.torture_faults import READERS, WRITE_FAULTS, WRITERS, choose, figures

ROOT = Path(__file__).parents[2]


def test_fifty_trials_meet_each_file_and_each_fault() -> None:
    chosen = [choose(number, 0) for number in range(50)]
    assert chosen == [choose(number, 0) for number in range(50)]
    assert {fault.file for fault in chosen} == {*WRITERS, *READERS}
    assert {fault.kind for fault in chosen} == {*WRITE_FAULTS, "read error"}


def test_figures_leave_out_trials_that_met_no_fault() -> None:
    trials = [
        Trial(0, "no space: metrics", None),
        Trial(1, "no space: scan", "a traceback"),
        Trial(2, "quota: scan (not met)", None),
    ]
    assert figures(trials).splitlines()[0].startswith("3 runs. In 2 of them the fault was met")
    assert "| no space | 2 | 1 |" in figures(trials) and "quota" not in figures(trials)


@pytest.mark.skipif(not sys.platform.startswith("linux") or shutil.which("cc") is None, reason="needs Linux and cc")
def test_a_run_whose_states_are_refused_to_the_end_ends_with_a_message(tmp_path: Path) -> None:
    """The run saves checkpoints, and no training state. A resume ends with the weights of an undisturbed run."""
    seed = 24
    assert choose(0, seed).what == "read-only: training state: optimizer" and choose(0, seed).count == -1
    command = [sys.executable, "-m", "scripts.benchmarks.torture", "faults", "--trials", "1", "--seed", str(seed)]
    done = subprocess.run([*command, "--folder", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "(not met)" not in done.stdout
