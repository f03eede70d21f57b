"""Stopping a run by SIGINT or SIGTERM: the first signal ends it after the current step, a second one at once."""

import logging
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

logger = logging.getLogger(__name__)

STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]
"""Signals that ask for a stop. Windows sends SIGBREAK for Ctrl-Break; its SIGTERM comes from this process alone."""
SAME_SIGNAL = 1.0
"""Seconds after the first signal in which further signals are ignored. A launcher passes on a signal that the terminal
has already sent to all processes."""

KILL_AFTER = 30.0
"""Seconds after which torch's elastic launcher kills the processes to which it has passed on a signal.
TORCH_ELASTIC_SHUTDOWN_TIMEOUT in the environment changes this time."""
TIME_TO_EXIT = 5.0
"""Seconds that a process needs to end before it is killed."""


class Interrupt(BaseException):
    """Ends the run after a signal. It is no Exception, so that no handler for mistakes catches it."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(f"stopped by {signal.Signals(number).name}")

    @property
    def exit_status(self) -> int:
        return 128 + self.number


class StopRequest:
    """Remembers that SIGINT or SIGTERM asked this process to stop."""

    def __init__(self) -> None:
        self.number: int | None = None
        """The signal that asked; None if none did."""
        self._received_at = 0.0

    def seconds_left(self) -> float:
        """Seconds until a launcher kills this process, less TIME_TO_EXIT. Infinite if no launcher does this."""
        if self.number is None or "TORCHELASTIC_RUN_ID" not in os.environ:
            return math.inf
        try:
            seconds = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", KILL_AFTER))
        except ValueError:
            seconds = KILL_AFTER
        return max(0.0, self._received_at + seconds - TIME_TO_EXIT - time.monotonic())

    def check(self) -> None:
        """Raises Interrupt if a stop was requested."""
        if self.number is not None:
            raise Interrupt(self.number)

    def end(self) -> NoReturn:
        """Raises Interrupt, because this process or another process of the run was asked to stop."""
        raise Interrupt(self.number or signal.SIGTERM)

    def _receive(self, number: int, _frame: object) -> None:
        if self.number is None:
            self.number, self._received_at = number, time.monotonic()
            logger.warning("%s: stopping after this step; send it again to stop at once", signal.Signals(number).name)
        elif time.monotonic() - self._received_at > SAME_SIGNAL:
            raise Interrupt(number)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Within the context, SIGINT and SIGTERM request a stop between two steps; a second signal raises Interrupt."""
    request = StopRequest()
    previous = {number: signal.signal(number, request._receive) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
