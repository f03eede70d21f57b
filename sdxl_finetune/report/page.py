"""Writes the report as one HTML page that loads nothing: styles, scripts, plotly.js and pictures stand in the page.

jinja2 escapes all text. The page's Content-Security-Policy allows only the scripts that it names by their hash. Thus no
caption and no file name can run a script, and nothing is loaded from a network.
"""

import base64
import hashlib
import importlib.util
import json
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from sdxl_finetune import __version__
from sdxl_finetune.errors import UNPRINTABLE, UserError
from sdxl_finetune.files import atomic_path
from sdxl_finetune.report.collect import Report
from sdxl_finetune.report.findings import Example
from sdxl_finetune.report.summary import number, percent, summarize

FOLDER = Path(__file__).parent
LIBRARIES = ("plotly", "jinja2")
SHOWN_ROWS = 60
"""Rows of a table, and rare tags in the list."""


def check_libraries() -> None:
    """Raises UserError if a library of the page is not installed."""
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"sdxl-data report needs {' and '.join(missing)}, which draws the page: run pip install {' '.join(missing)}"
        )


def write_page(report: Report, output: Path) -> None:
    """Writes the page of a report. Raises OSError."""
    page = render(report)
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(output) as temporary:
        temporary.write_text(page, encoding="utf-8")


def render(report: Report) -> str:
    """The HTML text of a report's page."""
    import jinja2
    from plotly.offline import get_plotlyjs

    from sdxl_finetune.report.charts import build_figures

    loader = jinja2.FileSystemLoader(FOLDER)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.filters |= {"shown": shown, "percent": percent, "count": "{:,}".format}
    figures = build_figures(report)
    scripts = {"plotly": get_plotlyjs(), "page": (FOLDER / "page.js").read_text(encoding="utf-8")}
    return environment.get_template("page.html").render(
        report=report,
        remarks=summarize(report),
        figures=script_json(figures),
        charts=set(figures),
        scripts=scripts,
        hashes=[f"'sha256-{_sha256(script)}'" for script in scripts.values()],
        style=(FOLDER / "page.css").read_text(encoding="utf-8"),
        picture=partial(_picture, report),
        number=number,
        rows=SHOWN_ROWS,
        made=time.strftime("%Y-%m-%d %H:%M"),
        version=__version__,
    )


def shown(text: object, letters: int | None = None) -> str:
    """Foreign text in one line. Control characters and bytes that are not UTF-8 are shown as \\x.. or \\u...."""
    line = UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))
    return line if letters is None or len(line) <= letters else line[: letters - 1] + "…"


def script_json(value: Mapping[str, Any]) -> str:
    """JSON that may stand in a script element: no text in it can end the element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _picture(report: Report, example: Example | int) -> str | None:
    """The data URL of a thumbnail of an example or of a row; None if it cannot be decoded."""
    from sdxl_finetune.report.thumbnails import thumbnail

    row = example if isinstance(example, int) else example.row
    if row is not None:
        return thumbnail(report.index[row].read)
    assert isinstance(example, Example)
    return thumbnail(Path(example.name).read_bytes) if example.name else None
