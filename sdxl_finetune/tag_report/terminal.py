"""A tag report in the terminal: a short table, the worst tags first, and what to do next."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from sdxl_finetune.printable import printable
from sdxl_finetune.tag_report.gallery import worst_first
from sdxl_finetune.tag_report.schema import Report, report_name
from sdxl_finetune.tag_report.summary import summarize
from sdxl_finetune.tag_report.tables import TagRow, tag_rows
from sdxl_finetune.tag_report.trends import read_moments
from sdxl_finetune.tag_report.underfitted import ENDING, path_in_config, suggest_repeats

MOST = 40
"""Tags in the table."""
HEADINGS = ("tag", "state", "images", "seen", "gain", "since base", "accuracy", "since base")


def describe(report: Report, folder: Path) -> Iterator[str]:
    """The lines of a report whose files lie in the folder."""
    rows = sorted(tag_rows(report.tags), key=worst_first)
    yield from table(rows[:MOST])
    if len(rows) > MOST:
        yield f"and {len(rows) - MOST} more tags that are better"
    yield from describe_remarks(report, folder)


def describe_remarks(report: Report, folder: Path) -> Iterator[str]:
    """The summary of a report whose files lie in the folder, a line for each remark."""
    rows = sorted(tag_rows(report.tags), key=worst_first)
    path = path_in_config(folder / f"{report_name(report.facts)}{ENDING}")
    for remark in summarize(rows, read_moments(folder, report), suggest_repeats(rows), path):
        yield " ".join(filter(None, (remark.text, remark.todo, remark.code)))


def table(rows: Sequence[TagRow]) -> Iterator[str]:
    """The rows in columns, below their headings."""
    cells = [HEADINGS, *map(_cells, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(HEADINGS))]
    for row in cells:
        text = [cell.ljust(width) if column < 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
        yield "  ".join(text).rstrip()


def _cells(row: TagRow) -> tuple[str, ...]:
    images = f"{row.images} ({row.held_out} held out)" if row.held_out else f"{row.images}"
    return (
        printable(row.tag),
        row.state,
        images,
        "?" if row.exposures is None else f"{row.exposures:,}",
        f"{row.gain:.1%}{_error(row.gain_error, percent=True)}",
        "" if row.gain_since_base is None else f"{row.gain_since_base:+.1%}",
        f"{row.accuracy:.2f}{_error(row.accuracy_error)}",
        "" if row.accuracy_since_base is None else f"{row.accuracy_since_base:+.2f}",
    )


def _error(error: float | None, *, percent: bool = False) -> str:
    if error is None:
        return ""
    return f" ± {100 * error:.1f}" if percent else f" ± {error:.2f}"
