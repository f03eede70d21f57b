"""Trials that kill one of the two processes of a run with kill -9 at a random instant (see torture.py).

The launcher must end the run by itself. The run is resumed on two processes, and must end with the files of an
undisturbed run of two processes. No process of a run may outlive it.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import psutil

from scripts.benchmarks.interrupt import Process, sleep
from scripts.benchmarks.torture import Trial
from scripts.benchmarks.torture_runs import finish, outlived, phase, prepare, randoms, start, table, torn, trial_folder

PROCESSES = 2


def try_once(number: int, seed: int, folder: Path) -> Trial:
    """Kills one process, resumes the run and compares it with the undisturbed run."""
    rng, name = randoms(seed, number), f"trial{number}"
    rank, share = rng.randrange(PROCESSES), rng.random()
    with trial_folder(folder, name):
        seconds = prepare(PROCESSES)
        run = start(name, PROCESSES)
        while not run.ended() and len(_ranks(run)) < PROCESSES:
            sleep(run, 0.05)
        sleep(run, share * seconds)
        victim, when = _ranks(run).get(rank), phase(name)
        if victim is None:
            what, status = "nothing, after its end", run.wait()
            faults = [f"ended with status {status}: {run.log.read_text()[-2000:]}"] if status else []
        else:
            what = f"rank {rank}, {when}"
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
            status = run.wait(1800)
            faults = torn(name) if status else []
        faults = faults + outlived(run) or finish(name, PROCESSES)
        if faults:
            Path(name).rename(f"failed{number}")
    return Trial(number, what, "; ".join(faults) or None)


def _ranks(run: Process) -> dict[int, psutil.Process]:
    """The processes of a launched run by rank."""
    found = {}
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(run.pid).children():
            with contextlib.suppress(psutil.Error):
                if "RANK" in (environment := child.environ()):
                    found[int(environment["RANK"])] = child
    return found


def figures(trials: Sequence[Trial]) -> str:
    """The trials by rank and phase."""
    return table(trials, "killed")
