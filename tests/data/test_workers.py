"""Processes beside the run: one that is killed is replaced or named, and all of them end with the main process."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool

import psutil
import pytest
import torch
from torch import Tensor
from torch.utils.data._utils import signal_handling

from sdxl_finetune.data.child_processes import process_pool
from sdxl_finetune.data.workers import make_ahead


def spawned(process: psutil.Process | None = None) -> list[psutil.Process]:
    """The processes that `process`, or else this one, has started to work beside it."""
    children = (process or psutil.Process()).children()
    return [child for child in children if "--multiprocessing-fork" in child.cmdline()]


class Tenfold(torch.utils.data.Dataset):
    def __getitem__(self, place: int) -> Tensor:
        return torch.tensor(10 * place)


def test_a_worker_that_is_killed_while_workers_are_started_is_replaced(monkeypatch) -> None:
    """torch asks for the first places while it starts the workers, and has an own handler of SIGCHLD by then."""
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)  # as in a new process

    def places() -> Iterator[int]:
        for place in range(6):
            if place == 1:
                worker = spawned()[0]
                worker.kill()
                while worker.status() != psutil.STATUS_ZOMBIE:  # the library of the workers takes its exit status
                    time.sleep(0.01)
            yield place

    items = make_ahead(Tenfold(), places(), workers=2, pin_memory=False, describe=str)
    assert [int(item) for item in items] == [0, 10, 20, 30, 40, 50]
    assert not spawned()


class Megabytes(torch.utils.data.Dataset):
    """Items that fill the pipe to the main process, so that workers wait until it has read."""

    def __getitem__(self, place: int) -> bytes:
        return bytes(1 << 20)


def load() -> None:
    """A main process with two workers. It says when they are started, and when they have made items ahead."""

    def places() -> Iterator[int]:
        print("started", flush=True)
        yield from range(100)

    items = make_ahead(Megabytes(), places(), workers=2, pin_memory=False, describe=str)
    next(items)
    print("at work", flush=True)
    signal.pause()


def wait_for_work() -> None:
    """A main process with a pool of two processes. It says when they are started, and when they wait for more work."""
    with process_pool(2) as pool:
        first = pool.submit(os.getpid)
        print("started", flush=True)
        first.result()
        print("at work", flush=True)
        signal.pause()


@pytest.mark.skipif(not hasattr(signal, "pause"), reason="Windows has other signals")
@pytest.mark.parametrize("moment", ["started", "at work"])
@pytest.mark.parametrize("main", [load, wait_for_work], ids=lambda main: main.__name__)
def test_processes_end_with_a_main_process_that_is_killed(main, moment: str) -> None:
    """Also if it is killed while they still import their modules, and while they wait for it to take their items."""
    command = [sys.executable, __file__, main.__name__]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as run:
        assert run.stdout
        while run.stdout.readline().strip() != moment:
            assert run.poll() is None
        workers = spawned(psutil.Process(run.pid))
        run.kill()
    assert len(workers) == 2
    _, alive = psutil.wait_procs(workers, timeout=120)
    for worker in alive:
        worker.kill()
    assert not alive


def test_a_process_of_a_pool_that_is_killed_while_others_start_is_named() -> None:
    """The message is that of a killed process, whenever it is killed."""
    with process_pool(4) as pool, pytest.raises(BrokenProcessPool):
        first = pool.submit(os.getpid)
        assert len(spawned()) == 4, "the pool looks for killed processes when it has started all of them"
        spawned()[0].kill()
        first.result()
        while True:
            pool.submit(os.getpid).result()
    assert not spawned()


if __name__ == "__main__":
    {"load": load, "wait_for_work": wait_for_work}[sys.argv[1]]()
