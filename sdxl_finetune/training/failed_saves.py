"""Saves that storage refuses: said with the space that is needed, written elsewhere if the options name a place, and
tried again.

A refused save never ends training. It is tried again at the next save and every few minutes, with the weights of that
moment. Checkpoints and training states have clocks of their own. All ranks must save together, so the time of the next
attempt is a number of steps that the first rank chooses. Nothing has to be shared in between. At the end of a run the
weights do not change any more. The same saves are then tried again for `save_retry_minutes`, until a file `stop`, a
signal or `max_train_hours` ends the wait.
"""

import errno
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from accelerate.utils import broadcast_object_list, gather_object

from sdxl_finetune.config import Config
from sdxl_finetune.errors import listed
from sdxl_finetune.files import check_mounted, free_bytes, mount_of, size_text
from sdxl_finetune.output.checkpoints import Save, step_name
from sdxl_finetune.runtime.signals import LOOK_EVERY, Interrupt, Wish
from sdxl_finetune.training.requests import STOP
from sdxl_finetune.training.saves import STATE_SUFFIX, Due, Refused

logger = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_AFTER = 180.0
"""Seconds after a refused save until the next attempt during training: 3 minutes."""
RETRY_MINUTES = 30.0
"""Default of save_retry_minutes: time for a person to read the message and to free space."""
OPTION = "save_retry_minutes"
"""Name of the option, and of what ends the wait for storage if nothing else does."""
LONGEST_PAUSE = 60.0
"""Seconds between two attempts at the end of a run. The first pauses are shorter: 1, 2, 4, ... seconds."""


class SaveFailed(Exception):
    """Storage did not take the last saves of a run until the end of `save_retry_minutes`."""


@dataclass(frozen=True)
class _Pending:
    """Saves of one kind, checkpoints or training states, that storage refused when this kind was saved last."""

    is_refused: bool = False
    retry_at: int = 0
    """Step of the next attempt."""
    is_asked: bool = False
    """True if a file `save` asked for them."""

    def is_due(self, step: int, is_saving: bool) -> bool:
        """True if the next attempt is made at this step. `is_saving` is true if something else is saved now."""
        return self.is_refused and (is_saving or step >= self.retry_at)


class FailedSaves:
    """The saves of one run that storage has refused, and when they are tried again."""

    def __init__(self, config: Config) -> None:
        """Remembers where the disks of the save folders are mounted."""
        self._config = config
        self.begin(0)
        asked = config.save_retry_minutes
        self._minutes = RETRY_MINUTES if asked is None else asked
        self._mounts = {folder: mount_of(folder) for folder in config.save_folders}
        self._weights = self._states = _Pending()

    def begin(self, first_step: int) -> None:
        """Starts the clock of a run, before which `first_step` steps were made."""
        self._first_step, self._began = first_step, time.monotonic()

    def write(self, name: str, size: float, write: Callable[[Path], T]) -> T | None:
        """Calls `write` with the folder of `output_dir`, and if storage refuses, with `save_fallback_dir`.

        `size` is the number of bytes to write. Returns the result of `write`, or None if no folder takes the save.
        """
        folders = self._config.save_folders
        for folder, next_folder in zip(folders, [*folders[1:], None], strict=True):
            result = self._try(name, folder, size, write, next_folder)
            if result is not None:
                if folder != folders[0]:
                    missing = " and is not uploaded" if self._config.uploads_saves else ""
                    logger.warning("%s stands in %s (save_fallback_dir)%s", name, folder, missing)
                return result
        return None

    def _try(
        self, name: str, folder: Path, size: float, write: Callable[[Path], T], next_folder: Path | None
    ) -> T | None:
        try:
            self._check(folder, size)
            return write(folder)
        except OSError as error:
            advice = "free space or repair the disk. The save is tried again"
            logger.error(
                "%s could not be saved in %s (%s): it needs %s, and %s is free. Earlier saves are untouched: %s",
                name,
                folder,
                error.strerror or error,
                size_text(size),
                size_text(free_bytes(folder)),
                f"it is saved in {next_folder} instead" if next_folder else advice,
            )
            return None

    def check_disk(self) -> None:
        """Raises OSError if the disk of `output_dir` is not mounted any more."""
        check_mounted(self._mounts[self._config.output_folder])

    def has_disk(self, what: str, step: int) -> bool:
        """True if the disk of `output_dir` is still mounted. If not, logs that `what` of this step is left out."""
        try:
            self.check_disk()
        except OSError as error:
            logger.error("no %s after step %d: %s. Training goes on", what, step, error.strerror)
            return False
        return True

    def note(self, step: int, due: Due, refused: Refused) -> Refused:
        """Notes what became of the saves of a step on the first rank. All ranks call it, and receive the same."""
        seconds = (time.monotonic() - self._began) / max(1, step - self._first_step)
        shared = [(refused, step + max(1, round(RETRY_AFTER / max(seconds, 1e-6))))]
        broadcast_object_list(shared)
        refused, retry_at = shared[0]
        was_refused = self._weights.is_refused or self._states.is_refused
        if due.weights:
            self._weights = _Pending(bool(refused.weights), retry_at)
        if due.states:
            self._states = _Pending(bool(refused.states), retry_at, due.is_asked and bool(refused.states))
        if was_refused and not (self._weights.is_refused or self._states.is_refused):
            logger.info("storage takes saves again: the run is saved up to step %d", step)
        return refused

    def with_retries(self, due: Due, step: int) -> Due:
        """Adds the saves that stand in at this step for those that were refused before.

        They are due at the next save, and some minutes after the last attempt for this kind of save.
        """
        name, is_saving, is_asked = step_name(self._config, step), bool(due), due.is_asked
        weights, states = due.weights, due.states
        if not weights and self._weights.is_due(step, is_saving):
            weights = [Save(name=name)]
        if self._states.is_due(step, is_saving):
            states = states or [Save(name=name + STATE_SUFFIX)]
            is_asked |= self._states.is_asked
        return Due(weights, states, is_temporary=due.is_temporary and not is_asked, is_asked=is_asked)

    def at_the_stop(self, step: int, wish: Wish, written: Due) -> Due:
        """All that a run that is stopped has still to save: its training state, and what was asked for or refused.

        `written` is what was saved at this step already.
        """
        name, is_asked = step_name(self._config, step), wish is Wish.CHECKPOINT or self._states.is_asked
        has_weights = any(save.name == name for save in written.weights)
        has_state = written.states and not (is_asked and written.is_temporary)
        weights = [Save(name=name)] if self._weights.is_refused or (wish is Wish.CHECKPOINT and not has_weights) else []
        states = [] if has_state else [Save(name=name + STATE_SUFFIX)]
        return Due(weights, states, is_temporary=not is_asked, is_asked=is_asked)

    def at_the_end(self, step: int, final: Due) -> Due:
        """The last saves of a run, and a training state that a file `save` asked for and storage refused."""
        if final.states or not self._states.is_asked:
            return final
        return replace(final, states=[Save(name=step_name(self._config, step) + STATE_SUFFIX)], is_asked=True)

    def wait(self, attempt: int, began: float, end_of_wait: Callable[[], str]) -> str:
        """Waits before another attempt at the end of the run. Returns what ended the wait; empty to try again.

        `attempt` counts from 0, and the first attempt was made at the time `began`. `end_of_wait` is asked every
        LOOK_EVERY seconds what ends the wait on this rank. All ranks call this together.
        """
        next_attempt = time.monotonic() + min(2.0 ** min(attempt, 10), LONGEST_PAUSE)
        end, is_said = began + 60 * self._minutes, attempt > 0
        while True:
            now, asked = time.monotonic(), end_of_wait()
            answers = gather_object([(asked or (OPTION if now >= end else ""), now >= next_attempt)])
            source, is_over = next((answer for answer in answers if answer[0]), answers[0])
            if source or is_over:
                return str(source)
            if not is_said:
                most = "" if self._minutes == math.inf else f" at most {self._minutes:g} minutes"
                message = "the run waits%s for storage to take its last saves (%s). A file %s or a signal ends the wait"
                logger.info(message, most, OPTION, self._config.output_folder / STOP)
                is_said = True
            time.sleep(max(0.0, min(LOOK_EVERY, next_attempt - now, end - now)))

    def failure(self, refused: Refused, end: str, cause: Interrupt | None) -> SaveFailed:
        """The error that ends a run whose last saves were refused until `end` ended the wait for storage.

        `cause` is what stopped the run; None for a run that has made all its steps.
        """
        where = f"in {' or '.join(map(str, self._config.save_folders))}"
        until = f"within {self._minutes:g} minutes {where}" if end == OPTION else f"{where} before {end} ended the wait"
        message = f"{listed([*refused.states, *refused.weights])} could not be saved {until}"
        message += ": free space or repair the disk, and resume from the last save with resume = auto"
        return SaveFailed(f"{cause}: {message}" if cause else message)

    def _check(self, folder: Path, size: float) -> None:
        """Raises OSError if the folder's disk has too little room, or is not mounted any more."""
        check_mounted(self._mounts[folder])
        if free_bytes(folder) < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
