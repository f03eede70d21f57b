"""The page of a tag report, as HTML text that loads nothing (pages/rendering.py)."""

from collections.abc import Sequence
from pathlib import Path

from sdxl_finetune.pages.rendering import render, script_json
from sdxl_finetune.tag_report.charts import build_figures
from sdxl_finetune.tag_report.gallery import WORST_FIRST, Exhibit, worst_first
from sdxl_finetune.tag_report.schema import Facts
from sdxl_finetune.tag_report.summary import summarize
from sdxl_finetune.tag_report.tables import TagRow, median_exposures
from sdxl_finetune.tag_report.trends import Moment
from sdxl_finetune.tag_report.underfitted import suggest_repeats

FOLDER = Path(__file__).parent
MOST_BYTES = 8_000_000
"""Bytes of all pictures on the page. With plotly.js the page then has at most 15 MB."""
TREND_DIGITS = 3
"""Decimals of gains and accuracies in the curves of single tags."""


def render_page(
    facts: Facts, rows: Sequence[TagRow], moments: Sequence[Moment], exhibits: Sequence[Exhibit], file: str
) -> str:
    """The HTML text of the page.

    `moments` are the reports whose trends are shown, with this one as the last. `file` is the path of the suggested
    repeats, as the config names it.
    """
    rows = sorted(rows, key=worst_first)
    suggestions = suggest_repeats(rows)
    places = {row.tag: place for place, row in enumerate(rows)}
    ordered = sorted((one for one in exhibits if one.tag in places), key=lambda one: places[one.tag])
    fitting = _fitting(ordered)
    context = {
        "facts": facts,
        "rows": rows,
        "counts": {state: sum(row.state == state for row in rows) for state in WORST_FIRST},
        "remarks": summarize(rows, moments, suggestions, file),
        "file": file,
        "repeats": {one.row.tag: one.repeats for one in suggestions.underfitted},
        "median": median_exposures(rows),
        "exhibits": fitting,
        "left_out": len(ordered) - len(fitting),
        "places": places,
        "has_last": any(row.gain_since_last is not None for row in rows),
        "has_exposures": any(row.exposures is not None for row in rows),
        "chances": sorted({row.chance for row in rows}),
        "trends": script_json(_trends(rows, moments)),
        "signed": signed,
        "points": points,
    }
    return render(FOLDER / "tags.html", build_figures(rows, moments), context, [FOLDER / "tags.js"])


def points(share: float) -> str:
    """A share in percent with one decimal and without its sign %. A value that rounds to 0 has no sign."""
    text = f"{share * 100:.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def signed(change: float | None) -> str:
    """A change of a share in percentage points, such as `+1.2` or `−0.4`; a dash if it is unknown."""
    if change is None:
        return "–"
    text = points(change)
    return text if text == "0.0" or change < 0 else f"+{text}"


def _fitting(exhibits: Sequence[Exhibit]) -> list[Exhibit]:
    """The first exhibits that have at most MOST_BYTES together."""
    fitting, total = [], 0
    for one in exhibits:
        total += one.bytes
        if total > MOST_BYTES:
            break
        fitting.append(one)
    return fitting


def _trends(rows: Sequence[TagRow], moments: Sequence[Moment]) -> dict[str, list]:
    """The curves of the single tags: gain and accuracy of each row, report by report. None where a report lacks it."""
    if len(moments) < 2:
        return {"steps": [], "gain": [], "accuracy": []}
    curves: dict[str, list] = {"steps": [moment.step for moment in moments]}
    for value in ("gain", "accuracy"):
        curves[value] = [
            [
                round(getattr(moment.rows[row.tag], value), TREND_DIGITS) if row.tag in moment.rows else None
                for moment in moments
            ]
            for row in rows
        ]
    return curves
