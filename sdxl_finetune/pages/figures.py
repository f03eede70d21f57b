"""Charts as figures of plotly. They name no colours: charts.js sets those of a dark or a light page.

Captions and file names are foreign text, and plotly reads markup in labels. `label` escapes it.
"""

import html
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from sdxl_finetune.printable import printable

CHART_HEIGHT = 320
"""Pixels of a chart without horizontal bars."""
LETTERS, HOVER_LETTERS = 26, 120
"""Letters of a label on an axis, and of the text that appears where one points."""


def label(text: str, letters: int | None = None) -> str:
    """Foreign text as a label: in one line, escaped, and cut to this number of letters."""
    return html.escape(printable(text, letters), quote=False)


def log_axis(ticks: Mapping[float, str]) -> dict:
    """The settings of a logarithmic axis with these texts at these values."""
    return {"type": "log", "tickvals": list(ticks), "ticktext": list(ticks.values())}


def figure_of(traces: Sequence[go.Bar | go.Heatmap | go.Scatter], height: int) -> go.Figure:
    """A figure of this height in pixels, with a legend if it has several traces."""
    layout = {"height": height, "margin": {"l": 10, "r": 10, "t": 12, "b": 10}, "showlegend": None, "template": None}
    figure = go.Figure(list(traces), layout)
    figure.update_layout(showlegend=len(traces) > 1)
    figure.update_xaxes(automargin=True, zeroline=False)
    return figure.update_yaxes(automargin=True, zeroline=False)
