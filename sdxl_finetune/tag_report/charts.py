"""The charts of a tag report, as figures of plotly. A trace names its colour in `meta`, which charts.js looks up."""

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from sdxl_finetune.pages.figures import CHART_HEIGHT, LETTERS, figure_of, label, log_axis
from sdxl_finetune.tag_report.gallery import WORST_FIRST
from sdxl_finetune.tag_report.tables import TagRow, median_exposures
from sdxl_finetune.tag_report.trends import Moment

SYMBOLS = {"learned": "circle", "underfitted": "triangle-down", "contradictory": "x", "unclear": "circle-open"}
"""Marks of the states, so that they can be told apart without colours."""
HEIGHT = 400
"""Pixels of the charts of single tags."""
MOST_ERRORS = 60
"""Tags up to which error bars are drawn. More bars would hide the points."""
NEVER = 0.5
"""Place of a tag without exposures on a logarithmic axis."""
FORMATS = {"gain": ".1%", "accuracy": ".0%"}
LEGEND = {"legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"}, "margin": {"t": 60}}
NARROW = 500
"""Ratio of exposures up to which the axis has ticks between the powers of ten."""
FEW = 200
"""Tags up to which points are large."""


def build_figures(rows: Sequence[TagRow], moments: Sequence[Moment]) -> Mapping[str, Any]:
    """Returns the charts by name, as JSON objects for plotly.js. A chart without data is left out."""
    figures = {}
    if any(row.exposures is not None for row in rows):
        figures["gain"] = tag_points(rows, "gain")
        figures["accuracy"] = tag_points(rows, "accuracy")
    if len(moments) > 1:
        figures["gain_trend"] = trend_lines(moments, "gain")
        figures["accuracy_trend"] = trend_lines(moments, "accuracy")
        figures["states_trend"] = state_bars(moments)
    return {name: figure.to_plotly_json() for name, figure in figures.items()}


def tag_points(rows: Sequence[TagRow], value: str) -> go.Figure:
    """Gain or accuracy of each tag against its exposures, with a mark for each state."""
    known = [row for row in rows if row.exposures is not None]
    traces = [
        _points([row for row in known if row.state == state], state, value, len(known))
        for state in reversed(WORST_FIRST)
        if any(row.state == state for row in known)
    ]
    figure = figure_of(traces, HEIGHT)
    if value == "accuracy":
        for chance in sorted({row.chance for row in known if row.chance < 1}):
            note = {"text": "chance", "font": {"size": 11}}
            figure.add_hline(chance, line={"dash": "dot", "width": 1.5}, annotation=note)
        figure.update_yaxes(range=[0, 1.05])
    if median := median_exposures(rows):
        figure.add_vline(median, line={"dash": "dot", "width": 1.5})
    seen = [max(1, row.exposures or 0) for row in known]
    digits = (1, 2, 5) if max(seen) < NARROW * min(seen) else (1,)
    ticks = {float(digit * 10**k): f"{digit * 10**k:,}" for k in range(10) for digit in digits}
    figure.update_xaxes(title="exposures", **log_axis({NEVER: "0", **ticks}))
    figure.update_yaxes(title=value, tickformat=FORMATS[value])
    return figure.update_layout(showlegend=True, **LEGEND)


def _points(rows: Sequence[TagRow], state: str, value: str, total: int) -> go.Scatter:
    errors = [getattr(row, f"{value}_error") or 0 for row in rows]
    return go.Scatter(
        x=[max(NEVER, row.exposures or 0) for row in rows],
        y=[getattr(row, value) for row in rows],
        error_y={"array": errors, "thickness": 1, "width": 2, "visible": total <= MOST_ERRORS},
        mode="markers",
        marker={"symbol": SYMBOLS[state], "size": 9 if total <= FEW else 6, "opacity": 0.85},
        name=state,
        meta={"color": state},
        customdata=[
            [label(row.tag, LETTERS), f"{row.gain:.1%}", f"{row.accuracy:.0%}", f"{row.exposures or 0:,}"]
            for row in rows
        ],
        hovertemplate="%{customdata[0]}<br>gain %{customdata[1]}, accuracy %{customdata[2]}<br>"
        f"seen %{{customdata[3]}} times, {state}<extra></extra>",
    )


def trend_lines(moments: Sequence[Moment], value: str) -> go.Figure:
    """Median and worst tenth of gain or accuracy, report by report."""
    lines = [
        go.Scatter(
            x=[moment.step for moment in moments],
            y=[moment.overall.get(f"{value}/{part}") for moment in moments],
            mode="lines+markers",
            name=part.replace("_", " "),
            hovertemplate="step %{x:,}: %{y:.1%}<extra></extra>",
        )
        for part in ("median", "worst_tenth")
    ]
    figure = figure_of(lines, CHART_HEIGHT)
    figure.update_layout(**LEGEND)
    return figure.update_xaxes(title="optimizer steps").update_yaxes(title=value, tickformat=FORMATS[value])


def state_bars(moments: Sequence[Moment]) -> go.Figure:
    """Number of tags in each state, report by report."""
    places = list(range(len(moments)))
    bars = [
        go.Bar(
            x=places,
            y=[moment.overall[f"states/{state}"] for moment in moments],
            name=state,
            meta={"color": state},
            customdata=[f"{moment.step:,}" for moment in moments],
            hovertemplate=f"step %{{customdata}}: %{{y:,}} {state}<extra></extra>",
        )
        for state in reversed(WORST_FIRST)
    ]
    figure = figure_of(bars, CHART_HEIGHT)
    every = -(-len(moments) // 10)
    ticks = [f"{moment.step:,}" if place % every == 0 else "" for place, moment in enumerate(moments)]
    figure.update_xaxes(title="optimizer steps", tickvals=places, ticktext=ticks, showgrid=False)
    figure.update_layout(barmode="stack", **LEGEND)
    return figure.update_yaxes(title="tags")
