"""Progress of long work: a bar on a terminal, and otherwise a line in the log every minute."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from sdxl_finetune.printable import printable

logger = logging.getLogger(__name__)

PERIOD = 60
"""Seconds between two lines in the log."""


class Progress:
    """Counts finished work of a known size, and shows the count.

    On a terminal that is a progress bar. A log receives a line every PERIOD seconds, the first after PERIOD, with the
    rate and the time that is left. Work that takes less time writes nothing to the log.
    """

    def __init__(self, what: str, total: int, unit: str, *, shown: bool = True) -> None:
        self._what, self._total, self._unit = printable(what), total, unit
        self._done, self._began = 0, time.monotonic()
        is_terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=self._what, unit=f" {unit}", disable=not (shown and is_terminal))
        self._next_line = self._began + PERIOD if shown and not is_terminal else float("inf")

    def update(self, count: int = 1) -> None:
        """Adds this number of finished items."""
        self._done += count
        self._bar.update(count)
        now = time.monotonic()
        if now >= self._next_line:
            self._next_line = now + PERIOD
            logger.info("%s", self._line(now - self._began))

    def close(self) -> None:
        """Removes the bar."""
        self._bar.close()

    def _line(self, seconds: float) -> str:
        rate = self._done / seconds
        left = f"{duration((self._total - self._done) / rate)} left" if rate else "time left unknown"
        return f"{self._what}: {self._done:,} of {self._total:,} {self._unit}, {rate:,.0f} a second, {left}"


@contextmanager
def track(what: str, total: int, unit: str, *, shown: bool = True) -> Iterator[Progress]:
    """Shows the progress of `total` items of work until the context ends. `shown` is False on ranks that are silent."""
    progress = Progress(what, total, unit, shown=shown)
    try:
        yield progress
    finally:
        progress.close()


def duration(seconds: float) -> str:
    """Seconds as text: `0:42`, `12:07` or `3:05:00`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
