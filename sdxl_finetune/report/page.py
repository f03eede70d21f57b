"""Writes the report as one self-contained HTML page (pages/rendering.py)."""

from functools import partial
from pathlib import Path

from sdxl_finetune.errors import UserError
from sdxl_finetune.pages import rendering
from sdxl_finetune.report.collect import Report
from sdxl_finetune.report.findings import Example
from sdxl_finetune.report.summary import summarize

TEMPLATE = Path(__file__).parent / "page.html"
SHOWN_ROWS = 60
"""Rows of a table, and rare tags in the list."""


def check_libraries() -> None:
    """Raises UserError if a library of the page is not installed."""
    if missing := rendering.missing_libraries():
        raise UserError(f"sdxl-data report {missing}")


def write_page(report: Report, output: Path) -> None:
    """Writes the page of a report. Raises OSError."""
    rendering.write_page(render(report), output)


def render(report: Report) -> str:
    """The HTML text of a report's page."""
    from sdxl_finetune.report.charts import build_figures

    picture = partial(_picture, report)
    context = {"report": report, "remarks": summarize(report), "picture": picture, "rows": SHOWN_ROWS}
    return rendering.render(TEMPLATE, build_figures(report), context)


def _picture(report: Report, example: Example | int) -> str | None:
    """The data URL of a thumbnail of an example or of a row; None if it cannot be decoded."""
    from sdxl_finetune.pages.thumbnails import thumbnail

    row = example if isinstance(example, int) else example.row
    if row is not None:
        return thumbnail(report.index[row].read)
    assert isinstance(example, Example)
    return thumbnail(Path(example.name).read_bytes) if example.name else None
