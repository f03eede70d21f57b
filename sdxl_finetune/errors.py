"""Problems in the user's input. They are collected and printed all at once, without a traceback."""

import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sdxl_finetune.printable import printable, printable_lines
from sdxl_finetune.redaction import is_secret_name, known_secrets, redacted

T = TypeVar("T")

WAIT_FOR_RANK_0 = 8
"""Seconds that other ranks wait before they print their errors. The launcher ends them within this time if rank 0 fails
as well, so that an error of all ranks is printed once."""
VARYING = re.compile(r"\d+(?:x\d+)*|'[^']*'|\"[^\"]*\"|\([^()]*\)")
"""The parts of a message that differ between problems of one kind: numbers, sizes, quotations and remarks."""
LONGEST = 4000
"""Letters of a problem that are shown: the first and the last ones."""
SHOWN = 20
"""Problems of one kind that are listed; more would hide the other messages, and millions would fill the memory."""
CONSEQUENCE_DELAY = 3600
"""Seconds added to the time of an error that another process caused. The launcher then reports the other error."""


@dataclass(frozen=True)
class Problem:
    """One thing that the user has to change. As text: `file: key = value: message`."""

    message: str
    """Says what is wrong and what to do, in one or two sentences."""
    key: str | None = None
    """Option, or key of a dataset file, that the problem is about."""
    value: object = None
    """Value that the user gave. It is shown only together with `key`."""
    file: str | None = None
    """File that holds the value, with `:line` if known, or `command line`."""

    def __str__(self) -> str:
        where = f"{self.file}: " if self.file else ""
        is_hidden = isinstance(self.value, str) and is_secret_name(self.key or "")
        value = "" if self.value is None or is_hidden else f" = {self.value!r}"
        key = "" if self.key is None else f"{self.key}{value}: "
        # A file name may hold line breaks and bytes that are no text, but a problem is one line.
        text = printable(redacted(where + key + self.message))
        if len(text) > LONGEST:  # a damaged file may hold names and values of megabytes
            text = f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"
        return text


class UserError(Exception):
    """The user's input is wrong. The command line prints each problem on a line and exits with status 2."""

    def __init__(self, problems: Sequence[Problem] | Problem | str) -> None:
        if isinstance(problems, str):
            problems = Problem(problems)
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class Problems:
    """Collects the problems of several checks, to report them all at once."""

    def __init__(self) -> None:
        self.found: list[Problem] = []

    def attempt(self, function: Callable[..., T], *arguments: object, **options: object) -> T | None:
        """Returns the function's result. If it raises UserError, notes the problems and returns None."""
        try:
            return function(*arguments, **options)
        except UserError as error:
            self.found += [problem for problem in error.problems if problem not in self.found]
            return None

    def raise_if_any(self) -> None:
        """Raises UserError with all problems, if there are any."""
        if self.found:
            raise UserError(self.found)


class Tally:
    """Counts problems by kind, and keeps the first SHOWN of each kind.

    Problems are of one kind if their messages differ only in numbers, quotations and text in parentheses.
    """

    def __init__(self, problems: Iterable[Problem] = ()) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, list[Problem]] = {}
        for problem in problems:
            self.add(problem)

    def __len__(self) -> int:
        return sum(self._counts.values())

    def add(self, problem: Problem, count: int = 1) -> None:
        """Adds a problem, or `count` problems of its kind of which this is the first."""
        kind = VARYING.sub("…", problem.message)
        self._counts[kind] += count
        first = self._first.setdefault(kind, [])
        if len(first) < SHOWN:
            first.append(problem)

    def add_all(self, other: "Tally") -> None:
        """Adds all that another Tally has counted."""
        for problem, count in other.counted():
            self.add(problem, count)

    def counted(self) -> Iterator[tuple[Problem, int]]:
        """Yields the first problems of each kind, each with the number of problems that it stands for."""
        for kind, first in self._first.items():
            yield from ((problem, 1) for problem in first[:-1])
            yield first[-1], self._counts[kind] - len(first) + 1

    def problems(self) -> list[Problem]:
        """The first problems of each kind, each kind followed by the number of those that are not listed."""
        listed = []
        for kind, first in self._first.items():
            listed += first
            if more := self._counts[kind] - len(first):
                listed.append(Problem(f"and {more:,} more of this kind: {first[-1].message}"))
        return listed


def listed(names: Iterable[str], most: int = 10) -> str:
    """Returns the first names of a list and the number of the others: "a, b and 3 more"."""
    names = list(names)
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def counted(count: int, noun: str) -> str:
    """Returns a number and its noun: "1 image", "3 images", "2 batches"."""
    return f"{count} {noun}" + ("" if count == 1 else "es" if noun.endswith(("s", "ch", "x")) else "s")


def say_errors(*errors: object, cause: bool = True) -> None:
    """Prints the errors that end this process, one a line, and passes them to the launcher of several processes.

    The launcher (torch elastic) gives each process a file for its error. It reports the earliest error as the cause of
    the end. `cause` is False for an error that follows from the end of another process.
    """
    seconds = int(time.time()) + (0 if cause else CONSEQUENCE_DELAY)
    if os.environ.get("RANK", "0") != "0":
        time.sleep(WAIT_FOR_RANK_0)
    with suppress(OSError):  # the terminal may be a file on a full disk
        for error in errors:
            print(printable_lines(f"error: {error}"), file=sys.stderr)
    message = printable_lines(redacted("\n".join(map(str, errors)), known_secrets()))
    if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        reason = {"message": message, "timestamp": seconds}
        with suppress(OSError):
            Path(error_file).write_text(json.dumps(reason), encoding="utf-8")
