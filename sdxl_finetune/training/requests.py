"""Requests to a run: the files `save` and `stop` in `output_dir`, limits of time, and signals.

The first rank looks at the clock and for files. What it finds goes to all ranks with the sums of the next step.
Therefore all ranks save and stop after the same step, and nothing waits for the device.
"""

import logging
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from sdxl_finetune.config import Config
from sdxl_finetune.output.checkpoints import final_name
from sdxl_finetune.output.delayed_scalars import DelayedScalars
from sdxl_finetune.runtime.signals import StopRequest, Wish

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
        if accelerator.is_main_process:
            for name in (SAVE, STOP):
                if path := self._take(name):
                    logger.warning("%s is older than this run: the file is removed, and nothing else is done", path)
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
            self.wish = max(self.wish, Wish(round(arrived.scalars["wish"] * self._ranks)))

    def note_save(self, seconds: float) -> None:
        """Notes that a training state was saved just now, in so many seconds."""
        self._slowest_save = max(self._slowest_save or 0.0, seconds)
        self._step_at = self._saved_at = time.monotonic()

    @property
    def is_stop_due(self) -> bool:
        """True if the run stops after the current step. Several ranks stop together, one step after a request."""
        return self._is_stop_agreed if self._ranks > 1 else self.stop.cause is not None

    def end(self) -> None:
        """Raises Interrupt with the cause for which one of the ranks was asked to stop."""
        raise next(cause for cause in gather_object([self.stop.cause]) if cause)

    def _look(self) -> None:
        """Asks for what the files in `output_dir` and the clock ask for."""
        options, now = self._config, time.monotonic()
        if path := self._take(SAVE):
            logger.info("%s: a checkpoint and a training state are saved after this step", path)
            self.stop.wish = Wish.CHECKPOINT
        elif options.save_state_every_minutes and now >= self._saved_at + 60 * options.save_state_every_minutes:
            self._saved_at = now
            self.stop.wish = max(self.stop.wish, Wish.STATE)
        if path := self._take(STOP):
            logger.warning("%s: stopping after this step", path)
            self.stop.reason = f"the file {path}"
        if options.max_train_hours:
            left = self._started + 3600 * options.max_train_hours - now
            save = self._assumed_save if self._slowest_save is None else self._slowest_save
            if left < (2 * self._longest_step + save if self._longest_step else 0.0):
                self.stop.reason = f"max_train_hours = {options.max_train_hours:g}"
                message = "%s: stopping; %.0f seconds are left for a step and for the training state"
                logger.warning(message, self.stop.reason, max(left, 0.0))

    def _take(self, name: str) -> Path | None:
        """Removes the file of a request and returns its path; None if there is no such request."""
        folder = self._config.output_folder
        for path in (folder / name, folder / f"{final_name(self._config)}.{name}"):
            try:
                status = path.stat()
                mark = path, status.st_mtime_ns
                if not path.is_file() or status.st_size > LARGEST or mark in self._kept:
                    continue
            except OSError:
                continue
            try:
                path.unlink()
            except OSError as error:
                logger.warning("%s cannot be removed (%s); remove the file", path, error.strerror)
                self._kept.add(mark)
            return path
        return None
