"""Keeps two runs from encoding into one folder at the same time. The second run waits, and then finds the records."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from accelerate.utils import gather_object

from sdxl_finetune.runtime.locks import Lock, Locked
from sdxl_finetune.runtime.signals import StopRequest

if TYPE_CHECKING:
    from sdxl_finetune.latents.together import Team

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

WAIT = 5.0
"""Seconds between two attempts. All processes of the run meet at each, so that none of them waits too long."""
LOCK = ".encoding.lock"


class FilledMeanwhile(Exception):
    """Another run encoded while this one waited. The missing records have to be looked for again."""


@contextmanager
def alone(team: "Team", stop: StopRequest | None) -> Iterator[None]:
    """Within the context, no other run on this machine or this shared folder encodes into the team's folder.

    All processes of the run call this together. Raises FilledMeanwhile after another run has encoded, and Interrupt if
    a stop is requested while this run waits.
    """
    lock = Lock(team.shelf.catalogue.with_name(LOCK)) if team.shelf and not team.rank else None
    has_waited, is_free = False, False
    try:
        while not is_free:
            if has_waited:
                time.sleep(WAIT)
            other = _acquire(lock)
            everyone = gather_object([(other, stop and stop.cause)])
            if causes := [cause for _, cause in everyone if cause]:
                raise causes[0]
            is_free = everyone[0][0] is None
            if not is_free and not has_waited:
                has_waited = True
                if lock:
                    logger.warning("%s: waiting for %s, which encodes into this folder", lock.path.parent, other)
        if has_waited:
            raise FilledMeanwhile
        yield
    finally:
        if lock:
            lock.release()


def again_if_filled(function: Callable[P, T]) -> Callable[P, T]:
    """Calls the function again each time that it raises FilledMeanwhile."""

    @wraps(function)
    def repeated(*arguments: P.args, **options: P.kwargs) -> T:
        while True:
            with suppress(FilledMeanwhile):
                return function(*arguments, **options)

    return repeated


def _acquire(lock: Lock | None) -> str | None:
    """Takes the lock; returns the text about the process that holds it, or None."""
    try:
        if lock:
            lock.acquire()
    except Locked as held:
        return str(held)
    return None
