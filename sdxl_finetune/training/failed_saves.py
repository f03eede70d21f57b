"""Saves that storage refuses: said with the space that is needed, written elsewhere if the options name a place, and
tried again.

A refused save never ends training. It is tried again at the next save and after a few minutes, with the weights of
that moment. All ranks must save together, so the time of the next attempt is a number of steps that the first rank
chooses. Nothing has to be shared in between. At the end of a run the weights do not change any more. The same saves are
then tried again for `save_retry_minutes`.
"""

import errno
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from accelerate.utils import broadcast_object_list

from sdxl_finetune.config import Config
from sdxl_finetune.errors import listed
from sdxl_finetune.files import free_bytes, size_text
from sdxl_finetune.output.checkpoints import Save, step_name
from sdxl_finetune.training.saves import STATE_SUFFIX

logger = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_AFTER = 180.0
"""Seconds after a refused save until the next attempt during training: 3 minutes."""
RETRY_MINUTES = 30.0
"""Default of save_retry_minutes: time for a person to read the message and to free space."""
LONGEST_PAUSE = 60.0
"""Seconds between two attempts at the end of a run. The first pauses are shorter: 1, 2, 4, ... seconds."""


class SaveFailed(Exception):
    """Storage did not take the last saves of a run until the end of `save_retry_minutes`."""


@dataclass(frozen=True)
class Refused:
    """The saves of one step that storage refused, by name, and the step of the next attempt. Equal on all ranks."""

    weights: Sequence[str] = ()
    states: Sequence[str] = ()
    retry_at: int = 0

    def __bool__(self) -> bool:
        return bool(self.weights or self.states)


class FailedSaves:
    """The saves of one run that storage has refused, and when they are tried again."""

    def __init__(self, config: Config, first_step: int) -> None:
        """`first_step` is the number of steps made before this run."""
        self._config, self._first_step, self._began = config, first_step, time.monotonic()
        asked = config.save_retry_minutes
        self._minutes = RETRY_MINUTES if asked is None else asked
        self._mount = mount_of(config.output_folder)
        self._refused = Refused()

    def write(self, name: str, size: float, write: Callable[[Path], T]) -> T | None:
        """Calls `write` with the folder of `output_dir`, and if storage refuses, with `save_fallback_dir`.

        `size` is the number of bytes to write. Returns the result of `write`, or None if no folder takes the save.
        """
        folders = self._config.save_folders
        for folder, next_folder in zip(folders, [*folders[1:], None], strict=True):
            result = self._try(name, folder, size, write, next_folder)
            if result is not None:
                if folder != folders[0]:
                    message = "%s stands in %s (save_fallback_dir) and is not uploaded. Move it when there is room"
                    logger.warning(message, name, folder)
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

    def note(self, step: int, weights: Sequence[Save], states: Sequence[Save], refused: Refused) -> Refused:
        """Notes what became of the saves of a step on the first rank. All ranks call it, and receive the same."""
        seconds = (time.monotonic() - self._began) / max(1, step - self._first_step)
        retry_at = step + max(1, round(RETRY_AFTER / max(seconds, 1e-6)))
        shared = [Refused(refused.weights, refused.states, retry_at)]
        broadcast_object_list(shared)
        (refused,) = shared
        before = self._refused
        self._refused = Refused(
            refused.weights if weights else before.weights,
            refused.states if states else before.states,
            refused.retry_at,
        )
        if before and not self._refused:
            logger.info("storage takes saves again: the run is saved up to step %d", step)
        return refused

    def retries_due(self, step: int) -> tuple[list[Save], list[Save]]:
        """The checkpoints and training states that stand in at this step for saves that were refused before."""
        if not self._refused or step < self._refused.retry_at:
            return [], []
        name = step_name(self._config, step)
        weights = [Save(name=name)] if self._refused.weights else []
        return weights, [Save(name=name + STATE_SUFFIX)] if self._refused.states else []

    def wait(self, attempt: int, began: float) -> bool:
        """Waits before another attempt at the end of the run. False once `save_retry_minutes` are over.

        `attempt` counts from 0, and the first attempt was made at the time `began`. All ranks call this together.
        """
        left = began + 60 * self._minutes - time.monotonic()
        pause = [min(2.0 ** min(attempt, 10), LONGEST_PAUSE, left) if left > 0 else None]
        broadcast_object_list(pause)
        if pause[0] is None:
            return False
        if not attempt:
            message = "the run waits at most %g minutes for storage to take its last saves (save_retry_minutes)"
            logger.info(message, self._minutes)
        time.sleep(pause[0])
        return True

    def failure(self, refused: Refused) -> SaveFailed:
        """The error that ends a run whose last saves were refused to the end."""
        names = listed([*refused.states, *refused.weights])
        message = f"{names} could not be saved within {self._minutes:g} minutes"
        message = f"{message} in {self._config.output_folder}: free space or repair the disk, and resume"
        return SaveFailed(f"{message} from the last save with resume = auto")

    def _check(self, folder: Path, size: float) -> None:
        """Raises OSError if the disk has too little room, or if the disk of `output_dir` is not mounted any more."""
        if folder == self._config.output_folder and not os.path.ismount(self._mount):
            raise OSError(errno.ENODEV, f"nothing is mounted at {self._mount} any more")
        if free_bytes(folder) < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def mount_of(folder: Path) -> Path:
    """The place where the file system of this folder is mounted."""
    resolved = folder.absolute().resolve()
    return next((path for path in (resolved, *resolved.parents) if os.path.ismount(path)), Path(resolved.anchor))
