"""The summary of a tag report in plain words: how many tags are learned, and what to do next."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from sdxl_finetune.pages.words import number, percent
from sdxl_finetune.printable import printable
from sdxl_finetune.tag_report.tables import TagRow, median_exposures
from sdxl_finetune.tag_report.trends import Moment
from sdxl_finetune.tag_report.underfitted import MOST_REPEATS, Suggestions

NAMED = 5
"""Tags that a sentence names."""
FEW = 10
"""Tags up to which a share in percent says nothing."""


@dataclass(frozen=True)
class Remark:
    """A sentence of the summary."""

    level: Literal["problem", "warning", "note", "good"]
    text: str
    todo: str = ""
    """Advice: what the reader should do about it."""
    code: str = ""
    """A line of the config that does it."""


def summarize(rows: Sequence[TagRow], moments: Sequence[Moment], suggestions: Suggestions, file: str) -> list[Remark]:
    """The remarks of a report, the most serious ones first. `file` is the path of the suggested repeats."""
    remarks = [
        *_on_learned(rows),
        *_on_underfitted(rows, suggestions, file),
        *_on_contradictory(rows),
        *_on_unclear(rows),
        *_on_changes(moments),
        *_on_images(rows),
    ]
    order = ("problem", "warning", "good", "note")
    return sorted(remarks, key=lambda remark: order.index(remark.level))


def _on_learned(rows: Sequence[TagRow]) -> Iterator[Remark]:
    learned = [row for row in rows if row.state == "learned"]
    if rows and len(learned) == len(rows):
        yield Remark("good", "All tags are learned.", "There is nothing to repeat.")
    elif learned:
        verb = "is" if len(learned) == 1 else "are"
        share = f" ({percent(len(learned) / len(rows))})" if len(rows) > FEW else ""
        yield Remark(
            "note", f"{len(learned):,} of {number(len(rows), 'tag')}{share} {verb} learned: {_names(learned)}."
        )
    elif rows:
        yield Remark("note", f"None of the {number(len(rows), 'tag')} is learned yet.")


def _on_underfitted(rows: Sequence[TagRow], suggestions: Suggestions, file: str) -> Iterator[Remark]:
    tags = [row for row in rows if row.state == "underfitted"]
    if tags and all(row.exposures == 0 for row in rows):
        yield Remark("note", "Nothing is trained yet. These are the figures of the model before training.")
        return
    if suggestions.underfitted:
        few = [one.row for one in suggestions.underfitted]
        most = max(one.repeats for one in suggestions.underfitted)
        need, their = ("needs", "its") if len(few) == 1 else ("need", "their")
        seen = _seen(rows, few, suggestions)
        bound = f" {most} is the most that it suggests: add images if you can." if most == MOST_REPEATS else ""
        todo = f"Train on with {file}, which shows {their} images {'up to ' * (len(few) > 1)}{most} times as often"
        used = ", counted without the repeats that they have now" if any((row.repeats or 1) != 1 for row in few) else ""
        text = f"{_names(few, quantity=True)} {need} more: training has seen {seen}."
        yield Remark("problem", text, f"{todo}{used}.{bound} Set in the config:", f'image_weights = "{file}"')
    if own := suggestions.satisfied:
        is_are = "is" if len(own) == 1 else "are"
        yield Remark("problem", f"{_names(own)} {is_are} not learned yet, though seen most often. Train longer.")


def _seen(rows: Sequence[TagRow], few: Sequence[TagRow], suggestions: Suggestions) -> str:
    """How often training has seen the tags that need more, and the tags to which they are compared."""
    target = suggestions.target
    if target is None or any(row.exposures is None for row in few):
        return "each of them too seldom"
    counts = sorted(row.exposures or 0 for row in few)
    own = f"{counts[0]:,}" if counts[0] == counts[-1] else f"from {counts[0]:,} to {counts[-1]:,}"
    whom = "the median learned tag" if suggestions.is_learned else "the most frequent tag"
    alike = [row for row in rows if row.state == "learned"] if suggestions.is_learned else list(suggestions.satisfied)
    if len(alike) == 1:
        whom = f"“{printable(alike[0].tag, 40)}”"
    subject = "it" if len(few) == 1 else "them"
    return f"{subject} {own} times, and {whom} {target:,.0f} times"


def _on_contradictory(rows: Sequence[TagRow]) -> Iterator[Remark]:
    if tags := [row for row in rows if row.state == "contradictory"]:
        is_are = "is" if len(tags) == 1 else "are"
        text = f"{_names(tags, quantity=True)} {is_are} contradictory: seen often, and yet told worse than rarer tags."
        todo = "Look at the images: some may be mislabelled, or show two styles under one name. Repeats do not help."
        yield Remark("warning", text, todo)


def _on_unclear(rows: Sequence[TagRow]) -> Iterator[Remark]:
    if tags := [row for row in rows if row.state == "unclear"]:
        is_are, their = ("is", "its") if len(tags) == 1 else ("are", "their")
        text = f"{_names(tags, quantity=True)} {is_are} unclear: the figures disagree or are too rough."
        yield Remark(
            "note",
            text,
            f"Measure more of {their} images (tag_report_images), and look for tags of the list that look alike.",
        )


def _on_changes(moments: Sequence[Moment]) -> Iterator[Remark]:
    if len(moments) < 2:
        return
    before, now = moments[-2], moments[-1]
    both = [(before.rows[tag], row) for tag, row in now.rows.items() if tag in before.rows]
    won = [row for old, row in both if old.state != "learned" and row.state == "learned"]
    lost = [row for old, row in both if old.state == "learned" and row.state != "learned" and _is_worse(old, row)]
    since = f"since step {before.step:,}"
    if won:
        yield Remark("note", f"{number(len(won), 'tag was', 'tags were')} learned {since}: {_names(won)}.")
    if lost:
        text = f"{number(len(lost), 'tag was', 'tags were')} lost {since}: {_names(lost)}."
        yield Remark("warning", text, "Lower the learning rate or raise their repeats." if len(lost) > 1 else "")


def _is_worse(before: TagRow, now: TagRow) -> bool:
    """True if gain or accuracy fell by more than the standard error of the difference."""
    for figure in ("gain", "accuracy"):
        errors = [getattr(row, f"{figure}_error") or 0.0 for row in (before, now)]
        if getattr(before, figure) - getattr(now, figure) > math.hypot(*errors):
            return True
    return False


def _on_images(rows: Sequence[TagRow]) -> Iterator[Remark]:
    if rows and not any(row.held_out for row in rows):
        text = "No image was held out: all figures come from images that were trained on, and may be too good."
        yield Remark("note", text, "Hold images out in the next run:", "validation_split = 0.02")
    if rows and all(row.exposures is None for row in rows):
        text = (
            "It is not known how often the tags were seen, so contradictory tags cannot be told from underfitted ones."
        )
        yield Remark("note", text, "Measure a model that sdxl-train saved, with the config of its run.")
    median = median_exposures(rows)
    never = [row for row in rows if row.exposures == 0]
    if never and median:
        yield Remark("note", f"{number(len(never), 'tag was', 'tags were')} never seen in training: {_names(never)}.")


def _names(tags: Sequence[TagRow], *, quantity: bool = False) -> str:
    """The first tags by name, and the number of the others. `quantity` puts the number of several tags before them."""
    names = ", ".join(f"“{printable(row.tag, 40)}”" for row in tags[:NAMED])
    if len(tags) > NAMED:
        names += f" and {len(tags) - NAMED:,} more"
    return f"{len(tags):,} tags ({names})" if quantity and len(tags) > 1 else names
