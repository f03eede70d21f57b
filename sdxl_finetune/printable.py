"""Makes control characters visible in everything that is printed for people.

Names of files, captions, metadata and names of tensors come from others. They may hold escape sequences, which clear
a terminal or change its title. They may also hold line breaks, with which a value looks like a message of this program,
and marks that reverse the direction of text.
"""

import copy
import logging
import re
from pathlib import PurePath
from typing import Any

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, marks of lines and of direction, and surrogates, which stand for bytes that are not UTF-8."""
IN_LINES = re.compile(r"(?![\t\n])" + CONTROL.pattern)
_COLOUR_NUMBER = r"(?:[0-4]|22|3[0-79]|9[0-7])"
COLOUR = re.compile(rf"\x1b\[(?:{_COLOUR_NUMBER}(?:;{_COLOUR_NUMBER})*)?m")
"""Escape sequence of a library for a colour or a bold text. None of them hides or moves text."""
CURSOR = re.compile(r"(?:[\r\n]|\x1b\[A)*")
"""Movements of the cursor that a progress bar writes alone. Before its text it only goes to the start of the line."""


def printable(text: object, letters: int | None = None) -> str:
    """A text in one line. Control characters are shown as \\x.. or \\u...., and \\n stands for a line break.

    A text that is longer than `letters` is cut.
    """
    line = CONTROL.sub(_visible, str(text))
    return line if letters is None or len(line) <= letters else line[: letters - 1] + "…"


def printable_lines(text: str) -> str:
    """A text of several lines, with visible control characters. Line breaks and tabs stay."""
    return IN_LINES.sub(_visible, text)


def encodable(text: str) -> str:
    """A text that every file can hold as UTF-8. Surrogates are written as \\u...., and all else stays."""
    return text.encode("utf-8", "backslashreplace").decode()


def _visible(found: "re.Match[str]") -> str:
    return found[0].encode("unicode_escape").decode()


class PrintableFormatter(logging.Formatter):
    """Formats log records without control characters. Each text or path among the arguments stays in its line.

    A text that is the whole message, or that stands below its first line, may have several lines.
    """

    def format(self, record: logging.LogRecord) -> str:
        if isinstance(record.args, tuple) and record.args:
            record = copy.copy(record)
            *others, last = record.args or ()
            has_lines = record.msg == "%s" or str(record.msg).endswith("\n%s")
            record.args = (*map(_in_one_line, others), last if has_lines else _in_one_line(last))
        return printable_lines(super().format(record))


def _in_one_line(value: object) -> object:
    return printable(value) if isinstance(value, (str, PurePath)) else value


class PrintableStream:
    """A text stream, such as stdout, that shows no control characters."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(printable_lines(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class PrintableMessages(PrintableStream):
    """A text stream for messages, such as stderr. Progress bars may move in it, and libraries may write in colour."""

    def write(self, text: str) -> int:
        start = len(text) if CURSOR.fullmatch(text) else int(text.startswith("\r"))
        self.stream.write(text[:start] + _with_colours(text[start:]))
        return len(text)


def _with_colours(text: str) -> str:
    parts, end = [], 0
    for colour in COLOUR.finditer(text):
        parts += [printable_lines(text[end : colour.start()]), colour[0]]
        end = colour.end()
    return "".join([*parts, printable_lines(text[end:])])
