"""Watches the processes of a run: one that is stopped, that has died unseen, or that hangs takes the whole run down.

A thread of each process tells the others every few seconds that the process lives, and where its main thread is. It
uses the store through which the processes found one another, and no collective operation. torch alone would notice a
stopped process after `ddp_timeout`, 10 or 30 minutes by default, with a message that does not name it.
"""

import contextlib
import datetime
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed import constants, distributed_c10d

from sdxl_finetune.config import HardwareOptions
from sdxl_finetune.errors import say_errors

logger = logging.getLogger(__name__)

BEAT = 5.0
"""Seconds between two signs of life of a process."""
SILENT = 180.0
"""Seconds without a sign of life after which a process counts as hanging. A machine that swaps delays such signs."""
MARGIN = 20.0
"""Seconds before torch's own limit at which the run ends, so that the message names the process that is late."""
TURN = 15.0
"""Seconds that each process leaves to the one before it for its message. The launcher ends all others meanwhile."""
MOST_TURNS = 4
"""Turns after which all other processes say their message, as on machines with launchers of their own."""
PACKAGE = str(Path(__file__).parents[1])
WAITING = (
    *("torch/distributed/", "torch/nn/parallel/", "torch/autograd/"),
    *("accelerate/utils/operations.py", "output/delayed_scalars.py"),
)
"""Parts of the paths of files in which a main thread waits for other processes, or for the device."""


@dataclass(frozen=True)
class Sign:
    """A sign of life."""

    number: int
    process: int
    host: str
    place: str
    """Place of the main thread in the program."""
    waits: bool
    """True if other processes or the device may let the main thread wait there."""
    is_last: bool = False
    """True if the process leaves the run."""


class Watch:
    """The thread of one process, from `start` to `close`."""

    def __init__(self, rank: int, ranks: int, limit: float) -> None:
        """`limit` is the number of seconds after which torch ends a process that waits for another one."""
        self._rank, self._limit = rank, limit
        self._others = [other for other in range(ranks) if other != rank]
        store: Any = distributed_c10d._get_default_store()
        self._store = store.clone()
        self._store.set_timeout(datetime.timedelta(seconds=SILENT))
        self._main = threading.main_thread().ident
        self._number = 0
        self._switches, self._halted_at = "", time.monotonic()
        self._signs: dict[int, Sign] = {}
        self._heard: dict[int, float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Starts watching."""
        self._thread.start()

    def close(self) -> None:
        """Ends watching, and tells the others that this process leaves the run."""
        self._ended.set()
        self._thread.join(BEAT)
        with contextlib.suppress(Exception):  # the first process, and its store with it, may have gone before
            self._tell(is_last=True)

    def _run(self) -> None:
        looked = answered = time.monotonic()
        self._heard = dict.fromkeys(self._others, looked)
        while not self._ended.wait(BEAT):
            if (switches := _switches()) != self._switches or not switches:
                self._switches, self._halted_at = switches, time.monotonic()
            if time.monotonic() > looked + SILENT / 2:  # all processes were halted together, as by Ctrl-Z
                answered = time.monotonic()
                self._heard = dict.fromkeys(self._others, answered)
            looked = time.monotonic()
            try:
                self._tell()
                self._listen()
                answered = time.monotonic()
            except Exception as error:
                if self._ended.is_set() or (self._signs and all(sign.is_last for sign in self._signs.values())):
                    return
                if time.monotonic() > answered + SILENT:
                    self._end(f"the launcher, or the machine of the first process, does not answer ({error})", turn=0)
                continue
            self._judge()

    def _sign(self, *, is_last: bool = False) -> Sign:
        frames = list(_stack(self._main))
        own = next((frame for frame in frames if frame.f_code.co_filename.startswith(PACKAGE)), None)
        return Sign(
            number=self._number,
            process=os.getpid(),
            host=socket.gethostname(),
            place=_describe(own) if own else "outside of this program",
            waits=any(part in frame.f_code.co_filename for frame in frames[:8] for part in WAITING),
            is_last=is_last,
        )

    def _tell(self, *, is_last: bool = False) -> None:
        self._number += 1
        self._store.set(_key(self._rank), json.dumps(asdict(self._sign(is_last=is_last))))

    def _listen(self) -> None:
        for rank in self._others:
            if self._store.check([_key(rank)]):
                sign = Sign(**json.loads(self._store.get(_key(rank))))
                if rank not in self._signs or sign.number != self._signs[rank].number:
                    self._signs[rank], self._heard[rank] = sign, time.monotonic()

    def _judge(self) -> None:
        """Ends this process if another one is silent, or if this one has waited for others up to the limit."""
        now, own = time.monotonic(), self._sign()
        alive = {rank: sign for rank, sign in self._signs.items() if not sign.is_last}
        left = self._signs.keys() - alive.keys()
        silent = [rank for rank in self._others if rank not in left and now > self._heard[rank] + SILENT]
        turn = sum(rank < self._rank and rank not in silent for rank in alive)
        if silent:
            named = ", ".join(self._name(rank) for rank in silent)
            message = f"no sign of life for {SILENT:.0f} seconds from {named}: it was stopped or killed, or its machine"
            self._end(f"{message} was lost. Start the run again with resume = auto", turn)
        elif own.waits and now > self._halted_at + self._limit - MARGIN:
            late = [f"{self._name(rank)} is {sign.place}" for rank, sign in alive.items() if not sign.waits]
            cause = "; ".join(late) or f"all of them wait, this one {own.place}"
            seconds = now - self._halted_at
            message = f"the processes of this run have waited {seconds:.0f} seconds for one another: {cause}"
            self._end(f"{message}. If this is no fault, raise ddp_timeout", turn)

    def _name(self, rank: int) -> str:
        sign = self._signs.get(rank)
        return f"rank {rank}" + (f" (process {sign.process} on {sign.host})" if sign else "")

    def _end(self, message: str, turn: int) -> None:
        """Ends this process with a message, unless another process says it first."""
        if not self._ended.wait(TURN * min(turn, MOST_TURNS)):
            logger.error("%s", message)
            say_errors(message)
            os._exit(1)


@contextlib.contextmanager
def watched(options: HardwareOptions, accelerator: Accelerator) -> Iterator[None]:
    """Within the context, the processes of the run watch one another. All of them call this together."""
    if accelerator.num_processes == 1:
        yield
        return
    watch = Watch(accelerator.process_index, accelerator.num_processes, _limit(options))
    watch.start()
    try:
        yield
    finally:
        watch.close()


def _limit(options: HardwareOptions) -> float:
    """Seconds after which torch ends a process that waits for another one."""
    if options.ddp_timeout:
        return 60.0 * options.ddp_timeout
    is_nccl = torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl"
    default = constants.default_pg_nccl_timeout if is_nccl else constants.default_pg_timeout
    return default.total_seconds() if default else 600.0


def _key(rank: int) -> str:
    return f"sdxl_finetune/watch/{rank}"


def _switches() -> str:
    """How often the main thread has run so far. It stays the same while the thread waits; empty on other systems."""
    try:
        lines = Path(f"/proc/self/task/{os.getpid()}/status").read_text().splitlines()
    except OSError:
        return ""
    return " ".join(line for line in lines if "ctxt_switches" in line)


def _stack(thread: int | None) -> Iterator[FrameType]:
    """The frames of a thread, the innermost first."""
    frame = sys._current_frames().get(thread or 0)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _describe(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename).relative_to(PACKAGE).as_posix()
    return f"in {frame.f_code.co_name} ({path}:{frame.f_lineno})"
