"""Requests to save and to stop. The first SIGINT or SIGTERM ends a run after the current step, a second one at once.

Limits of time and files in `output_dir` ask for the same (training/requests.py).
"""

import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum

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


LOOK_EVERY = 1.0
"""Seconds between two looks at the clock and for files. On a network disk, each look costs milliseconds."""


class Interrupt(BaseException):
    """Ends the run after a signal or a request. It is no Exception, so that no handler for mistakes catches it."""

    def __init__(self, number: int | None, reason: str = "") -> None:
        """`number` is that of the signal, or None for a request or a limit, which `reason` names."""
        self.number, self.reason = number, reason
        super().__init__(number, reason)

    def __str__(self) -> str:
        return f"stopped by {self.source}"

    @property
    def source(self) -> str:
        """Name of the signal, request or limit."""
        return self.reason if self.number is None else signal.Signals(self.number).name

    @property
    def exit_status(self) -> int:
        """0 after a request or at a limit: the run has done what its user wanted."""
        return 0 if self.number is None else 128 + self.number


class Wish(IntEnum):
    """A save after the next step, or none."""

    NOTHING = 0
    STATE = 1
    """A training state that the next one replaces."""
    CHECKPOINT = 2
    """A checkpoint and a training state, which both stay."""


class StopRequest:
    """Remembers that a signal, a file or a limit asked this process to stop or to save."""

    def __init__(self) -> None:
        self.number: int | None = None
        """The signal that asked for a stop; None if none did."""
        self.reason = ""
        """The file or limit that asked for a stop; empty if none did."""
        self.wish = Wish.NOTHING
        self.look: Callable[[], None] | None = None
        """Looks for further requests, and sets `reason` and `wish`."""
        self._received_at = 0.0
        self._looked_at = -math.inf

    @property
    def cause(self) -> Interrupt | None:
        """The stop that was asked for, or None. Looks for further requests every LOOK_EVERY seconds."""
        number = self.number
        if number is None and not self.reason and self.look and time.monotonic() >= self._looked_at + LOOK_EVERY:
            self._looked_at = time.monotonic()
            self.look()
        return Interrupt(number, self.reason) if number is not None or self.reason else None

    def take_wish(self) -> Wish:
        """Returns what shall be saved, and forgets it, so that all processes save it once."""
        wish, self.wish = self.wish, Wish.NOTHING
        return wish

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
        if cause := self.cause:
            raise cause

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
