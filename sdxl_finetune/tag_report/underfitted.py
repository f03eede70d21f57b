"""Suggests repeats for underfitted tags, as a rule file that `image_weights` takes (data/weights.py).

An underfitted tag was seen too seldom. Its repeats make an epoch show it as often as the median learned tag:

    repeats = exposures of the median learned tag / exposures of the tag x repeats that the run gave it

They are rounded up, and lie from LEAST_REPEATS to MOST_REPEATS. The file takes the place of the `image_weights` of the
run, hence the second factor. If no tag is learned, the tag with the most exposures
takes the place of the median. Contradictory and unclear tags get no repeats: more of the same images would not help.
"""

import contextlib
import glob
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdxl_finetune.data.tags import comparable
from sdxl_finetune.files import atomic_path
from sdxl_finetune.printable import printable
from sdxl_finetune.tag_report.schema import Facts
from sdxl_finetune.tag_report.tables import TagRow, median_exposures

LEAST_REPEATS, MOST_REPEATS = 2, 10
"""Bounds of the suggested repeats. A few images that are repeated more often are learned by heart."""
ENDING = ".underfitted.toml"


@dataclass(frozen=True)
class Suggestion:
    """Repeats for an underfitted tag."""

    row: TagRow
    repeats: int


@dataclass(frozen=True)
class Suggestions:
    """Repeats for all underfitted tags, the fewest first."""

    target: float | None
    """Exposures that a tag should have: those of the median learned tag. None if no exposures are known."""
    is_learned: bool
    """True if the target is that of learned tags."""
    underfitted: Sequence[Suggestion]
    satisfied: Sequence[TagRow]
    """Underfitted tags that were seen as often as any other tag, while no tag is learned."""


def suggest_repeats(rows: Sequence[TagRow]) -> Suggestions:
    """The repeats of the underfitted tags among `rows`, by the rule of this module."""
    median = median_exposures(rows)
    target = median
    if target is None:
        target = max((row.exposures for row in rows if row.exposures is not None), default=None)
    suggestions, satisfied = [], []
    for row in rows:
        if row.state != "underfitted":
            continue
        ratio = 0.0  # Without exposures nothing says how many repeats are missing, so the least number is suggested.
        if target is not None and row.exposures is not None:
            if median is None and row.exposures >= target:
                satisfied.append(row)
                continue
            ratio = target / max(1, row.exposures) * (row.repeats or 1)
        repeats = min(MOST_REPEATS, max(LEAST_REPEATS, math.ceil(ratio)))
        suggestions.append(Suggestion(row, repeats))
    suggestions.sort(key=lambda one: (one.repeats, one.row.tag))
    return Suggestions(target, median is not None, suggestions, satisfied)


def write_underfitted(path: Path, rows: Sequence[TagRow], facts: Facts) -> bool:
    """Writes the rule file. Returns False, and removes an older file of this name, if there is nothing to repeat.

    A rule file without rules would be an error in a config.
    """
    suggestions = suggest_repeats(rows)
    if not suggestions.underfitted:
        path.unlink(missing_ok=True)
        return False
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(_lines(path, rows, suggestions, facts)) + "\n", encoding="utf-8")
    return True


def rule_pattern(tag: str) -> str:
    """The pattern of a rule that matches this tag and no other, up to case, underscores and brackets of weights."""
    name = comparable(tag)
    if not set(name) & set("*?["):
        return tag
    pattern = glob.escape(name)
    if comparable(pattern) == pattern:
        return pattern
    # [?] would be read as the tag ? in brackets of a weight, and would then match every letter. [?[] is not read so.
    return f"[{name[0]}[]{glob.escape(name[1:])}"


def path_in_config(path: Path) -> str:
    """The path as a config may name it: relative to the current folder if it lies there, with forward slashes."""
    with contextlib.suppress(ValueError):
        return path.absolute().relative_to(Path.cwd()).as_posix()
    return path.as_posix()


def _lines(path: Path, rows: Sequence[TagRow], suggestions: Suggestions, facts: Facts) -> Iterator[str]:
    step = "" if facts.step is None else f" after {facts.step:,} steps"
    yield f"# Repeats for the underfitted tags of {printable(facts.model)}{step}. Set in the config:"
    yield f"#     image_weights = {_toml_string(path_in_config(path))}"
    if suggestions.target is None:
        yield f"# Exposures are not known, so each of these tags is used {LEAST_REPEATS} times as often."
    else:
        whose = "of the median learned tag" if suggestions.is_learned else "of the tag that was seen most"
        yield f"# repeats: exposures {whose} ({suggestions.target:,.0f}) / exposures of the tag"
        if any((row.repeats or 1) != 1 for row in rows):
            yield "# x repeats of the image_weights that the run had, whose place this file takes,"
        yield f"# rounded up, from {LEAST_REPEATS} to {MOST_REPEATS}. They multiply the repeats that an image has."
    yield "# An image with several of these tags gets the repeats of the last one, which has the most."
    yield ""
    yield "[tags]"
    # Tags that differ in case alone may have one pattern, and a key must not stand twice. The most repeats count.
    rules = {rule_pattern(one.row.tag): one for one in suggestions.underfitted}
    for pattern, one in sorted(rules.items(), key=lambda rule: rule[1].repeats):
        yield f"{_toml_string(pattern)} = {{ repeats = {one.repeats} }}  # {describe(one.row)}"
    median = median_exposures(rows)
    often = "" if median is None else f" The median learned tag was seen {median:,.0f} times."
    yield from _comments(
        rows,
        "contradictory",
        f"Contradictory tags. They were seen often and are not learned.{often} Do not repeat them: look at their"
        " images, which may be mislabelled or show several styles.",
    )
    yield from _comments(rows, "unclear", "Unclear tags. Measure more images of them before you decide.")
    if suggestions.satisfied:
        yield "\n# Seen as often as any other tag, while no tag is learned. Train on instead of repeating them."
        yield from (f"#     {printable(row.tag)}: {describe(row)}" for row in suggestions.satisfied)


def _comments(rows: Sequence[TagRow], state: str, heading: str) -> Iterator[str]:
    """The tags of a state as comments, because they get no rule."""
    if tags := [row for row in rows if row.state == state]:
        yield ""
        yield from (f"# {sentence}" for sentence in heading.replace(". ", ".\n").split("\n"))
        yield from (f"#     {printable(row.tag)}: {describe(row)}" for row in tags)


def describe(row: TagRow) -> str:
    """The figures of a tag in words, such as `gain 1.2 %, accuracy 0.24 (chance 0.20), seen 4,000 times`."""
    seen = "" if row.exposures is None else f", seen {row.exposures:,} times"
    return f"gain {row.gain:.1%}, accuracy {row.accuracy:.2f} (chance {row.chance:.2f}){seen}".replace("%", " %")


def _toml_string(text: str) -> str:
    """A basic string of TOML: like one of JSON, but DEL must be escaped."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
