"""What is wrong with the user's input: collected, then said all at once, never as a traceback."""

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SECONDS_FOR_THE_FIRST = 8
"""So much later than the first process the others speak: what all of them find wrong is then said once."""


@dataclass(frozen=True)
class Problem:
    """One thing that the user has to change."""

    message: str
    """What is wrong and what to do about it, in one or two sentences."""
    key: str | None = None
    """The option (or the key of a dataset file) it is about."""
    value: object = None
    """The value that was given; shown only together with `key`."""
    file: str | None = None
    """The file it stands in, with `:line` where known; `command line` where it was typed."""

    def __str__(self) -> str:
        where = f"{self.file}: " if self.file else ""
        if self.key is None:
            return where + self.message
        given = "" if self.value is None else f" = {self.value!r}"
        return f"{where}{self.key}{given}: {self.message}"


class UserError(Exception):
    """The user's input is wrong. The command line prints `problems`, one a line, and exits with status 2."""

    def __init__(self, problems: Sequence[Problem] | Problem | str) -> None:
        if isinstance(problems, str):
            problems = Problem(problems)
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


def say_errors(*errors: object, cause: bool = True) -> None:
    """Prints why this process ends, a line each, and tells the launcher of several processes. It shows as the root
    cause what the first of them to fail has left in the file that it gave each (torch's elastic launcher); an end
    that is no `cause` but follows from another's is dated later.
    """
    now = int(time.time()) + (0 if cause else 3600)
    if os.environ.get("RANK", "0") != "0":
        # If the first process fails as well, the launcher ends this one meanwhile.
        time.sleep(SECONDS_FOR_THE_FIRST)
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    if told := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        reason = {"message": "\n".join(map(str, errors)), "timestamp": now}
        Path(told).write_text(json.dumps(reason), encoding="utf-8")
