"""Requests to a run: the files `save` and `stop` in `output_dir`, limits of time, and signals.

The first rank looks at the clock and for files. What it finds goes to all ranks with the sums of the next step.
Therefore all ranks save and stop after the same step, and nothing waits for the device.
"""

import logging
import math
import stat
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from sdxl_finetune.config import Config
from sdxl_finetune.output.checkpoints import final_name
from sdxl_finetune.output.delayed_scalars import Arrived, DelayedScalars
from sdxl_finetune.runtime.signals import Interrupt, StopRequest, Wish

logger = logging.getLogger(__name__)

SAVE, STOP = "save", "stop"
"""Names of the files. `{output_name}.save` and `{output_name}.stop` reach one of several runs with one `output_dir`."""
LARGEST = 1024
"""Bytes of the largest file that counts as a request. A larger file of that name is not removed."""
BYTES_OF_PARAMETER = 16
"""Bytes of a parameter in a training state with float32 weights, both moments of AdamW, and an EMA."""
SPEED = 200e6
"""Bytes that are written in a second, until a save was measured: the speed of a slow disk."""


class Requests:
    """The requests to one rank of a run, and when all ranks act on them."""

    def __init__(self, config: Config, accelerator: Accelerator, stop: StopRequest) -> None:
        """Removes request files that are older than the run. Call this when no other run has the folder."""
        self.stop = stop
        self.wish = Wish.NOTHING
        """The save that all ranks make after the current step."""
        self._config, self._ranks = config, accelerator.num_processes
        self._is_stop_agreed = False
        self._queue: DelayedScalars[None] = DelayedScalars(delay=1)
        now = time.monotonic()
        self._started = now - max(0.0, time.time() - psutil.Process().create_time())
        self._step_at, self._saved_at = now, float("inf")
        self._longest_step = self._assumed_save = 0.0
        self._slowest_save: float | None = None
        self._kept: set[tuple[Path, int]] = set()
        self._named: set[Path] = set()
        self._answered: tuple[int | None, str] = (None, "")
        if accelerator.is_main_process:
            for name in (SAVE, STOP):
                if path := self._take(name):
                    logger.warning(
                        "%s is older than this run: nothing is done, and the file is removed if possible", path
                    )
            stop.look = self._look

    def begin(self, parameters: int) -> None:
        """Starts the clock of the first step of a run that trains so many parameters."""
        self._step_at = self._saved_at = time.monotonic()
        self._assumed_save = BYTES_OF_PARAMETER * parameters / SPEED

    def receive(self, requests: torch.Tensor | None) -> None:
        """Notes what all ranks wanted before a step. `requests` is that of the step (see output.log.Step)."""
        now = time.monotonic()
        self._longest_step, self._step_at = max(self._longest_step, now - self._step_at), now
        self.wish = Wish.NOTHING
        if requests is None:
            return
        for arrived in self._queue.push(None, {"stop": requests[0], "wish": requests[1]}):
            self._is_stop_agreed |= arrived.scalars["stop"] > 0
            self.wish = max(self.wish, self._wish_of(arrived))

    def late_wish(self) -> Wish:
        """Returns what is asked for and no rank has acted on, at the last step of a run or when the run is stopped.

        All ranks call this together.
        """
        late = [self._wish_of(arrived) for arrived in self._queue.flush()]
        if self.stop.look:
            self._look_for_save()
        return max(gather_object([max([self.stop.take_wish(), *late])]))

    def note_save(self, seconds: float) -> None:
        """Notes that a training state was saved just now, in so many seconds."""
        self._slowest_save = max(self._slowest_save or 0.0, seconds)
        self._step_at = self._saved_at = time.monotonic()

    @property
    def is_stop_due(self) -> bool:
        """True if the run stops after the current step. Several ranks stop together, one step after a request."""
        return self._is_stop_agreed if self._ranks > 1 else self.stop.cause is not None

    def cause(self) -> Interrupt | None:
        """The cause for which one of the ranks was asked to stop; None if none was. All ranks call this together."""
        own = self.stop.cause
        self._answered = self.stop.number, self.stop.reason
        return next((cause for cause in gather_object([own]) if cause), None)

    def end_of_wait(self) -> str:
        """Returns the name of what ends this rank's wait for storage at the end of a run; empty if nothing does.

        The signal or file that stopped the run does not count. A further one does.
        """
        if self.stop.look and (path := self._take(STOP)):
            return f"the file {path}"
        if self.stop.look and self._seconds_left() <= 0:
            return self._limit
        number, reason = self.stop.number, self.stop.reason
        return Interrupt(number, reason).source if (number, reason) != self._answered else ""

    @property
    def _limit(self) -> str:
        return f"max_train_hours = {self._config.max_train_hours:g}"

    def _seconds_left(self) -> float:
        """Seconds until `max_train_hours` are over. Infinite without this limit."""
        hours = self._config.max_train_hours
        return self._started + 3600 * hours - time.monotonic() if hours else math.inf

    def _wish_of(self, arrived: Arrived[None]) -> Wish:
        return Wish(round(arrived.scalars["wish"] * self._ranks))

    def _look_for_save(self) -> bool:
        path = self._take(SAVE)
        if path:
            logger.info("%s: a checkpoint and a training state are saved after this step", path)
            self.stop.wish = Wish.CHECKPOINT
        return path is not None

    def _look(self) -> None:
        """Asks for what the files in `output_dir` and the clock ask for."""
        minutes, now = self._config.save_state_every_minutes, time.monotonic()
        if not self._look_for_save() and minutes and now >= self._saved_at + 60 * minutes:
            self._saved_at = now
            self.stop.wish = max(self.stop.wish, Wish.STATE)
        if path := self._take(STOP):
            logger.warning("%s: stopping after this step", path)
            self.stop.reason = f"the file {path}"
        left = self._seconds_left()
        save = self._assumed_save if self._slowest_save is None else self._slowest_save
        if left < (2 * self._longest_step + save if self._longest_step else 0.0):
            self.stop.reason = self._limit
            message = "%s: stopping; %.0f seconds are left for a step and for the training state"
            logger.warning(message, self.stop.reason, max(left, 0.0))

    def _take(self, name: str) -> Path | None:
        """Removes the file of a request and returns its path; None if there is no such request.

        A file that cannot be removed is a request once. A folder of that name, or a large file, is named once.
        """
        folder = self._config.output_folder
        for path in (folder / name, folder / f"{final_name(self._config)}.{name}"):
            try:
                status = path.stat()
            except OSError:
                continue
            mark = path, status.st_mtime_ns
            if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST:
                if path not in self._named:
                    self._named.add(path)
                    message = "%s is no request, because a request is a file of at most %d bytes: rename or remove it"
                    logger.warning(message, path, LARGEST)
                continue
            if mark in self._kept:
                continue
            try:
                path.unlink()
            except FileNotFoundError:
                continue
            except OSError as error:
                logger.warning("%s cannot be removed (%s): remove it before the next request", path, error.strerror)
                self._kept.add(mark)
            return path
        return None
