"""Makes one HTML page that loads nothing: styles, scripts, plotly.js and pictures stand in the page.

jinja2 escapes all text. The page's Content-Security-Policy allows only the scripts that it names by their hash. Thus no
caption and no file name can run a script, and nothing is loaded from a network.
"""

import base64
import hashlib
import importlib.util
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdxl_finetune import __version__
from sdxl_finetune.files import atomic_path
from sdxl_finetune.pages.words import number, percent
from sdxl_finetune.printable import printable

FOLDER = Path(__file__).parent
LIBRARIES = ("plotly", "jinja2")


def missing_libraries() -> str | None:
    """Says which libraries of a page are not installed and how to install them; None if all are there."""
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return f"needs {' and '.join(missing)}, which draws the page: run pip install {' '.join(missing)}"


def write_page(page: str, output: Path) -> None:
    """Writes the HTML text of a page, complete or not at all. Raises OSError."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(output) as temporary:
        temporary.write_text(page, encoding="utf-8")


def render(template: Path, figures: Mapping[str, Any], context: Mapping[str, Any], scripts: Sequence[Path] = ()) -> str:
    """The HTML text of a page.

    `template` extends base.html. A file of styles beside it with its name is added to page.css. `figures` are the
    charts by name, as JSON objects of plotly. `scripts` run after charts.js, which draws the charts.
    """
    import jinja2
    from plotly.offline import get_plotlyjs

    loader = jinja2.FileSystemLoader([template.parent, FOLDER])
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.filters |= {"shown": printable, "percent": percent, "count": "{:,}".format}
    styles = [FOLDER / "page.css", template.with_suffix(".css")]
    sources = [get_plotlyjs(), *(_read(path) for path in (FOLDER / "charts.js", *scripts))]
    return environment.get_template(template.name).render(
        context,
        figures=script_json(figures),
        charts=set(figures),
        scripts=sources,
        hashes=[f"'sha256-{_sha256(source)}'" for source in sources],
        style="\n".join(_read(path) for path in styles if path.is_file()),
        number=number,
        made=time.strftime("%Y-%m-%d %H:%M"),
        version=__version__,
    )


def script_json(value: Any) -> str:
    """JSON that may stand in a script element: no text in it can end the element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
