"""What is wrong with the user's input: collected, then said all at once, never as a traceback."""

from collections.abc import Sequence
from dataclasses import dataclass


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
