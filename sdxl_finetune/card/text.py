"""The two languages of a page, its open fields, and pieces of Markdown.

Text of foreign files, such as prompts, tags and metadata, is shown letter for letter. It stands in code spans and code
blocks, or passes through `escaping.escape`, so that nothing in it is markup. Its control characters are visible.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from sdxl_finetune.card.facts import Count, InLanguages, Language, Text
from sdxl_finetune.printable import printable, printable_lines

FENCE = re.compile(r"`{3,}")
PIPE = re.compile(r"(?<!\\)\|")


@dataclass
class Words:
    """Writes in one language, and remembers which fields stay open."""

    language: Language
    open_fields: list[str] = field(default_factory=list)
    """How to fill in each open field, in English, for the person who runs the command."""

    def say(self, en: str, zh: str) -> str:
        """The text in this language."""
        return en if self.language == "en" else zh

    def of(self, text: Text) -> str:
        """The author's text in this language."""
        return getattr(text, self.language) if isinstance(text, InLanguages) else text

    def count(self, count: Count) -> str:
        """A number with separators, or the author's text."""
        return f"{count:,}" if isinstance(count, int) else self.of(count)

    def or_open(self, text: Text | None, what: tuple[str, str], remedy: str) -> str:
        """The text in this language. A missing text becomes an open field, which says what the author should add."""
        if text is not None:
            return self.of(text)
        self.open_fields.append(f"{what[0]}: {remedy}")
        return self.say(f"**(to be filled in by the author: {what[0]})**", f"**待作者填写：{what[1]}**")


def code(text: str) -> str:
    """Text as a code span. `table` escapes the bars in it, which elsewhere stand for themselves."""
    line = printable(" ".join(text.split()))
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    if not longest:
        return f"`{line}`"
    marks = "`" * (longest + 1)
    return f"{marks} {line} {marks}"


def code_block(text: str, language: str = "text") -> str:
    """Text as a code block, whatever stands in it."""
    text = printable_lines("\n".join(text.splitlines()))
    longest = max((len(run) for run in FENCE.findall(text)), default=2)
    marks = "`" * (longest + 1)
    return f"{marks}{language}\n{text.rstrip()}\n{marks}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table. The columns in `numbers` are aligned to the right."""
    rule = ["--:" if place in numbers else "---" for place in range(len(head))]
    cells = [head, rule, *rows]
    return "\n".join(
        "| " + " | ".join(PIPE.sub(r"\\|", " ".join(cell.split())) for cell in row) + " |" for row in cells
    )


def facts_table(rows: Iterable[tuple[str, str]], words: Words) -> str:
    """A table of names and values."""
    return table((words.say("what", "项目"), words.say("value", "内容")), rows)


def bullets(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)
