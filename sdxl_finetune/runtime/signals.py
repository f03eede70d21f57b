"""Stopping a run by SIGINT or SIGTERM: the first signal ends it after the current step, a second one at once."""

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

logger = logging.getLogger(__name__)

SAME_SIGNAL = 1.0
"""Seconds within which a signal that comes again is taken for the same."""


class Interrupt(BaseException):
    """The run was asked to stop by `signal`, at the end of a step; no Exception handler may swallow it."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(f"stopped by {signal.Signals(number).name}")

    @property
    def exit_status(self) -> int:
        return 128 + self.number


class StopRequest:
    """What SIGINT and SIGTERM leave behind: the first asks the run to stop after this step, a second ends it at once.

    Launchers pass on a signal that the terminal has sent to all, so that the second counts from a second later on.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._since = 0.0

    def check(self) -> None:
        """Raises Interrupt if a stop was asked for."""
        if self.number is not None:
            raise Interrupt(self.number)

    def end(self) -> NoReturn:
        """Raises Interrupt: this process, or another of the run, was asked to stop."""
        raise Interrupt(self.number or signal.SIGTERM)

    def _receive(self, number: int, _frame: object) -> None:
        if self.number is None:
            self.number, self._since = number, time.monotonic()
            logger.warning("%s: stopping after this step; once more stops at once", signal.Signals(number).name)
        elif time.monotonic() - self._since > SAME_SIGNAL:
            raise Interrupt(number)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Within it, SIGINT and SIGTERM end the run between two steps."""
    request = StopRequest()
    previous = {number: signal.signal(number, request._receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
