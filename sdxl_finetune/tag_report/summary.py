"""The summary of a tag report in plain words: how many tags are learned, and what to do next."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from sdxl_finetune.pages.words import number, percent, shown
from sdxl_finetune.tag_report.tables import TagRow, median_exposures
from sdxl_finetune.tag_report.trends import Moment
from sdxl_finetune.tag_report.underfitted import MOST_REPEATS, Suggestions

NAMED = 5
"""Tags that a sentence names."""


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
    else:
        share = f" ({percent(len(learned) / len(rows))})" if rows else ""
        verb = "is" if len(learned) == 1 else "are"
        yield Remark("note", f"{len(learned):,} of {number(len(rows), 'tag')}{share} {verb} learned.")


def _on_underfitted(rows: Sequence[TagRow], suggestions: Suggestions, file: str) -> Iterator[Remark]:
    tags = [row for row in rows if row.state == "underfitted"]
    if not tags:
        return
    text = f"{number(len(tags), 'tag is', 'tags are')} underfitted: {_names(tags)}. The model needs more of them."
    if suggestions.underfitted:
        most = max(one.repeats for one in suggestions.underfitted)
        times = f"{most} times" if len(suggestions.underfitted) == 1 else f"up to {most} times"
        bound = " A tag at this bound may need more images instead." if most == MOST_REPEATS else ""
        todo = f"Train on with repeats: {file} shows their images {times} as often.{bound} Set in the config:"
        yield Remark("problem", text, todo, f'image_weights = "{file}"')
    else:
        yield Remark("problem", text, "No tag is learned and these were seen as often as any other. Train on.")


def _on_contradictory(rows: Sequence[TagRow]) -> Iterator[Remark]:
    if tags := [row for row in rows if row.state == "contradictory"]:
        are = number(len(tags), "tag is", "tags are")
        text = f"{are} contradictory: {_names(tags)}. The model saw such a tag often and has not learned it."
        todo = "Look at the images: some may be mislabelled, or show two styles under one name. Repeats do not help."
        yield Remark("warning", text, todo)


def _on_unclear(rows: Sequence[TagRow]) -> Iterator[Remark]:
    if tags := [row for row in rows if row.state == "unclear"]:
        are = number(len(tags), "tag is", "tags are")
        text = f"{are} unclear: {_names(tags)}. The error is too large to decide."
        yield Remark(
            "note", text, "Measure more images of them (tag_report_images), or add images if a tag has only a few."
        )


def _on_changes(moments: Sequence[Moment]) -> Iterator[Remark]:
    if len(moments) < 2:
        return
    before, now = moments[-2], moments[-1]
    both = [(before.rows[tag], row) for tag, row in now.rows.items() if tag in before.rows]
    won = [row for old, row in both if old.state != "learned" and row.state == "learned"]
    lost = [row for old, row in both if old.state == "learned" and row.state != "learned"]
    since = f"since step {before.step:,}"
    if won:
        yield Remark("note", f"{number(len(won), 'tag was', 'tags were')} learned {since}: {_names(won)}.")
    if lost:
        text = f"{number(len(lost), 'tag was', 'tags were')} lost {since}: {_names(lost)}."
        yield Remark("warning", text, "If several are lost at once, lower the learning rate or raise their repeats.")


def _on_images(rows: Sequence[TagRow]) -> Iterator[Remark]:
    if rows and not any(row.held_out for row in rows):
        text = "No image was held out: all figures come from images that were trained on, and may be too good."
        yield Remark("note", text, "Hold images out in the next run:", "validation_split = 0.02")
    if rows and all(row.exposures is None for row in rows):
        text = "It is not known how often the tags were seen, so underfitted and contradictory tags look alike."
        yield Remark("note", text, "Measure a model that sdxl-train saved, with the config of its run.")
    median = median_exposures(rows)
    never = [row for row in rows if row.exposures == 0]
    if never and median:
        yield Remark("note", f"{number(len(never), 'tag was', 'tags were')} never seen in training: {_names(never)}.")


def _names(tags: Sequence[TagRow]) -> str:
    """The first tags by name, and the number of the others."""
    names = ", ".join(f"“{shown(row.tag, 40)}”" for row in tags[:NAMED])
    return f"{names} and {len(tags) - NAMED:,} more" if len(tags) > NAMED else names
