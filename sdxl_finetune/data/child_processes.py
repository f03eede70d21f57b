"""Processes that work beside the main process: a pool of them, and how they end if the main process is killed."""

import multiprocessing
import os
import signal
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor


def end_with_parent() -> None:
    """Ends this process, started by `multiprocessing`, as soon as the process that started it has ended.

    No signal tells a child that its parent was killed, and it would wait for the next task for ever. Each child holds
    both ends of the pipe of tasks, so the pipe never closes. The parent may be gone before this function is called.
    """
    threading.Thread(target=_wait_and_exit, name="end with parent", daemon=True).start()


def _wait_and_exit() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)  # a normal exit would wait until the parent has taken all results


def process_pool(processes: int) -> ProcessPoolExecutor:
    """A pool of processes that are new Python interpreters. They leave Ctrl-C to this process and give no warnings.

    If a process is killed, the pool raises BrokenProcessPool. All processes are started before the pool begins to look
    for killed ones. Otherwise a process that is killed during the start raises OSError in some versions of Python.
    """
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_start)
    pool._safe_to_dynamically_spawn_children = False  # type: ignore[attr-defined]
    return pool


def _start() -> None:
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
