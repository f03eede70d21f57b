"""Fixtures of runs that something happens to."""

import logging
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.training.small_runs import mount


@pytest.fixture
def disk(work) -> Iterator[Path]:
    """A file system of DISK bytes, as the folder `disk`."""
    folder = work / "disk"
    if not mount(folder):
        pytest.skip("this process may not mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


class Watch(logging.Handler):
    """Calls a function at the nth message that holds a text."""

    def __init__(self, text: str, number: int, act: Callable[[], None]) -> None:
        super().__init__()
        self._text, self._left, self._act = text, number, act

    def emit(self, record: logging.LogRecord) -> None:
        if self._text in record.getMessage():
            self._left -= 1
            if self._left == 0:
                self._act()


@pytest.fixture
def on_message() -> Iterator[Callable[..., None]]:
    """on_message(text, act, number=1): calls `act` at the nth message that holds the text."""
    logger, watches = logging.getLogger("sdxl_finetune"), []

    def watch(text: str, act: Callable[[], None], number: int = 1) -> None:
        watches.append(Watch(text, number, act))
        logger.addHandler(watches[-1])

    yield watch
    for one in watches:
        logger.removeHandler(one)
