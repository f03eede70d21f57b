"""Trials that kill a run of one process with kill -9 at a random instant (see torture.py).

The run encodes latents, trains with two data-loader workers, validates, draws previews and saves. A trial kills the
whole run, or its main process alone, or one of its workers. A run without a worker must go on by itself. A killed run
is resumed. It must end with the files of the undisturbed run. No process of a run may outlive it.
"""

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import psutil

from scripts.benchmarks.interrupt import Process, sleep
from scripts.benchmarks.torture import Trial
from scripts.benchmarks.torture_runs import finish, outlived, phase, prepare, randoms, start, table, torn, trial_folder

WORKERS = ["--max_data_loader_n_workers", "2"]


def try_once(number: int, seed: int, folder: Path) -> Trial:
    """Kills one run, resumes it and compares it with the undisturbed run."""
    rng, name = randoms(seed, number), f"trial{number}"
    victim = rng.choice(["the whole run", "the main process", "a worker"])
    share = rng.random()
    with trial_folder(folder, name):
        seconds = prepare(1, *WORKERS)
        run = start(name, 1, *WORKERS)
        sleep(run, share * seconds)
        if victim == "a worker":
            victim = _kill_worker(run, rng.random())
        when = phase(name)
        if victim == "a worker":
            status = run.wait(1800)
            faults = [f"ended with status {status}: {run.log.read_text()[-2000:]}"] if status else []
        elif run.ended():
            victim, when = "nothing", "after its end"
            run.wait()
            faults = []
        elif victim == "the whole run":
            run.kill()
            faults = torn(name)
        else:
            os.kill(run.pid, signal.SIGKILL)
            run.wait()
            faults = torn(name)
        faults = faults + outlived(run) or finish(name, 1, *WORKERS)
        trial = Trial(number, f"{victim}, {when}", "; ".join(faults) or None)
        if faults:
            Path(name).rename(f"failed{number}")
    return trial


def _kill_worker(run: Process, choice: float) -> str:
    """Waits for a data-loader worker and kills it. Returns what was killed."""
    while not run.ended():
        children = psutil.Process(run.pid).children()
        workers = [child for child in children if _is_worker(child)]
        if workers:
            workers[int(choice * len(workers))].kill()
            return "a worker"
        sleep(run, 0.02)
    return "nothing"


def _is_worker(process: psutil.Process) -> bool:
    try:
        return "--multiprocessing-fork" in process.cmdline()
    except psutil.Error:
        return False


def figures(trials: Sequence[Trial]) -> str:
    """The trials by victim and phase."""
    return table(trials, "killed")
