"""Data-loader workers: processes that make items ahead of the training loop. A worker that dies is replaced.

An item depends on nothing but its place, so that another worker makes the same item again. torch's DataLoader sends
the items. Its own handler of SIGCHLD is not used: it raises an error wherever the main process is, as within a step or
while the workers are started.
"""

import atexit
import contextlib
import logging
import os
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import chain, islice
from multiprocessing import connection
from typing import Any, TypeVar

import cv2
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from sdxl_finetune.data.child_processes import end_with_parent

logger = logging.getLogger(__name__)

T = TypeVar("T")

MOST_DEATHS = 3
"""Deaths at one item after which the run ends. An image that needs too much memory would kill every new worker."""
DYING = 30.0
"""Seconds that a killed process takes at most to end. The system may have much memory to free."""
STOP_SIGNALS = {getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)}


class WorkersDied(Exception):
    """Workers died again and again while they made one item. The message says which item, and what to do."""


class _WorkerDied(Exception):
    """A worker has died. The text says how."""


def make_ahead(
    dataset: "Dataset[Any]", places: Iterable[T], *, workers: int, pin_memory: bool, describe: Callable[[T], str]
) -> Generator[Any, None, None]:
    """Yields the item of each place in order. Up to `workers` processes make them ahead; with 0 this process does.

    If a worker dies, one worker makes the first item that was not yielded, and then all workers are started again. An
    item that kills its worker is therefore known. `describe` names it. Raises WorkersDied. Close the generator to end
    the workers.
    """
    left: Iterator[T] = iter(places)
    unfinished = deque[T]()
    deaths = 0
    while True:
        left, is_alone = chain(list(unfinished), left), deaths > 0
        unfinished.clear()
        noted = _noted(islice(left, 1) if is_alone else left, unfinished)
        ahead = min(workers, 1) if is_alone else 2 * workers
        making = _make(dataset, noted, workers=min(workers, ahead), ahead=ahead, pin_memory=pin_memory)
        with contextlib.closing(making) as items:
            while True:
                try:
                    item = next(items, None)
                except _WorkerDied as death:
                    deaths += 1
                    _check_deaths(deaths, str(death), describe(unfinished[0]))
                    break
                if item is None:
                    return
                unfinished.popleft()
                deaths = 0
                yield item
                if is_alone:
                    break


def _check_deaths(deaths: int, how: str, item: str) -> None:
    """Warns of a death. Raises WorkersDied for one too many."""
    advice = "If memory runs out, lower max_data_loader_n_workers"
    if deaths < MOST_DEATHS:
        logger.warning("%s; workers are started again. %s", how, advice)
        return
    message = f"{how}, {deaths} times in a row, while it made {item}. {advice}, or look at these images"
    raise WorkersDied(message)


def _noted(places: Iterator[T], unfinished: deque[T]) -> Iterator[T]:
    for place in places:
        unfinished.append(place)
        yield place


def _make(
    dataset: "Dataset[Any]", places: Iterator[Any], *, workers: int, ahead: int, pin_memory: bool
) -> Generator[Any, None, None]:
    """Yields the items of one start of the workers, which make `ahead` items ahead. Raises _WorkerDied."""
    loader: DataLoader[Any] = DataLoader(
        dataset,
        sampler=places,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=ahead // workers if workers else None,
        pin_memory=pin_memory,
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # without it the loader draws from the main process's global generator
    )
    signal_handling._SIGCHLD_handler_set = True  # torch then installs none
    with _signals_apart() if workers else contextlib.nullcontext():
        running = iter(loader)
    # Workers ignore SIGTERM, by which an exiting process would end them, and the exit would wait for ever. torch ends
    # them when nothing refers to the iterator any more, but an exception's traceback may refer to it for a long time.
    processes = getattr(running, "_workers", [])
    shut_down = getattr(running, "_shutdown_workers", lambda: None)

    def end_workers() -> None:
        shut_down()
        for process in processes:  # a worker that died with a lock in its hands lets no other one end
            if process.is_alive():
                process.kill()

    atexit.register(end_workers)
    try:
        while True:
            try:
                item = next(running, None)
            except Exception as error:
                if dead := _dead(processes):
                    raise _WorkerDied(_death(dead[0])) from error
                raise
            if item is None:
                return
            yield item
    finally:
        end_workers()
        atexit.unregister(end_workers)


def _dead(processes: Sequence[Any]) -> list[Any]:
    """The processes that have failed. Connections to a process that is being killed are lost before it has ended."""
    if processes:
        ending = connection.wait([process.sentinel for process in processes], DYING)
        for process in processes:
            if process.sentinel in ending:
                process.join(DYING)
    return [process for process in processes if process.exitcode]


def _death(process: Any) -> str:
    code = process.exitcode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    return f"data-loader worker {process.pid} {how}"


@contextlib.contextmanager
def _signals_apart() -> Iterator[None]:
    """Processes that are started in this context never receive SIGINT and SIGTERM.

    Launchers and terminals send these signals to all processes. Only the main process acts on them: it ends its workers
    after the step.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    from multiprocessing import resource_tracker  # POSIX alone has it

    # Otherwise the first worker would start the resource tracker, which unblocks both signals.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(_number: int) -> None:
    # torch's worker looks for the death of its parent only between two items, and not before it has started itself.
    end_with_parent()
    # Python ends threads that are in C++ code at its own exit, and C++ then aborts the process. The thread that sends
    # batches may be there if the main process ends the workers early.
    atexit.register(_exit_at_once)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    cv2.setNumThreads(0)  # torch sets its own number of threads in a worker, but not OpenCV's


def _exit_at_once() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
