"""The charts of the report, as figures of plotly."""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float64

from sdxl_finetune.pages.figures import CHART_HEIGHT, HOVER_LETTERS, LETTERS, figure_of, label, log_axis
from sdxl_finetune.report.captions import Lengths
from sdxl_finetune.report.collect import Report
from sdxl_finetune.report.sizes import BucketRow, Histogram, Sizes
from sdxl_finetune.report.tags import Tags, Together

MOST_BARS = 40
BAR_HEIGHT = 21
"""Pixels of a horizontal bar with its gap."""
TOKENS_IN_BAR = 5
MAP_HEIGHT = 500
"""Least height of the chart of buckets, and height of the map beside it, in pixels."""
TALL = 385
"""Height of two charts that stand beside MOST_BARS bars, in pixels."""
RANKS = 400
"""Points of the curve of tag frequencies."""


SCALE_TICKS = {value: f"{value:g}" for value in (0.125, 0.25, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 4.0, 8.0)}
MEGAPIXEL_TICKS = {value: f"{value:g}" for value in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)}
PIXEL_TICKS = {side * 2**power: f"{side * 2**power:g}" for power in range(5, 15) for side in (1.0, 1.5)}
RATIO_TICKS = {
    1 / 4: "1:4",
    1 / 3: "1:3",
    1 / 2: "1:2",
    2 / 3: "2:3",
    1.0: "1:1",
    3 / 2: "3:2",
    2.0: "2:1",
    3.0: "3:1",
    4.0: "4:1",
}


def build_figures(report: Report) -> Mapping[str, dict]:
    """Returns the charts by name, as JSON objects for plotly.js. A chart without data is left out."""
    figures = {
        "sizes": size_map(report.sizes),
        "buckets": bucket_bars(report.sizes.buckets),
        "cuts": histogram_bars(report.sizes.cuts, "share of pixels cut off", ".0%"),
        "scales": histogram_bars(report.sizes.scales, "scale factor", ".2f", ticks=SCALE_TICKS),
        "ratios": histogram_bars(report.sizes.ratios, "width / height", ".2f", ticks=RATIO_TICKS),
        "megapixels": histogram_bars(report.sizes.megapixels, "megapixels", ".2f", ticks=MEGAPIXEL_TICKS),
        "tokens": token_bars(report.lengths),
    }
    if len(report.tags.names):
        names, images = report.tags.names[:MOST_BARS], report.tags.images[:MOST_BARS].tolist()
        figures["tags"] = horizontal_bars(list(zip(names, images, strict=True)), "images")
        figures["ranks"] = rank_curve(report.tags)
        figures["per_image"] = tags_per_image(report.tags)
    if len(report.together.names) > 1:
        figures["together"] = together_map(report.together)
    if report.lengths.lost_tags:
        figures["lost_tags"] = horizontal_bars(report.lengths.lost_tags, "captions")
    if report.scores and report.scores.scores:
        figures["scores"] = histogram_bars(report.scores.scores, "score", ".3f")
        for bound in report.scores.bounds:
            figures["scores"].add_vline(bound, line={"dash": "dot", "width": 1.5})
    if report.scores and report.scores.quality:
        figures["quality"] = horizontal_bars(report.scores.quality, "images", CHART_HEIGHT)
    if report.scores and report.scores.weights:
        weights = [(f"{weight:g}", images) for weight, images in report.scores.weights]
        figures["weights"] = horizontal_bars(weights[:MOST_BARS], "images")
    if len(report.sizes.repeats) > 1:
        repeats = [(f"{number} ×", images) for number, images in report.sizes.repeats]
        figures["repeats"] = horizontal_bars(repeats[:MOST_BARS], "images")
    return {name: figure.to_plotly_json() for name, figure in figures.items()}


def horizontal_bars(counts: Sequence[tuple[str, int]], unit: str, height: int = 0) -> go.Figure:
    """Bars with their names at the left, in the given order from the top. `height` is the least one in pixels."""
    places = list(range(len(counts)))
    bars = go.Bar(
        y=places,
        x=[count for _, count in counts],
        orientation="h",
        customdata=[label(name, HOVER_LETTERS) for name, _ in counts],
        text=[f"{count:,}" for _, count in counts],
        textposition="outside",
        cliponaxis=False,
        hovertemplate=f"%{{customdata}}<br>%{{x:,}} {unit}<extra></extra>",
    )
    figure = figure_of([bars], max(height, len(counts) * BAR_HEIGHT + 50))
    ticks = [label(name, LETTERS) for name, _ in counts]
    figure.update_yaxes(tickvals=places, ticktext=ticks, range=[len(counts) - 0.4, -0.6], showgrid=False)
    most = max((count for _, count in counts), default=1)  # the number stands right of the longest bar
    return figure.update_xaxes(title=unit, range=[0, most * 1.15], tickformat="~s")


def bucket_bars(buckets: Sequence[BucketRow]) -> go.Figure:
    """Images of the fullest buckets."""
    shown = buckets[:MOST_BARS]
    figure = horizontal_bars([(bucket.label, bucket.images) for bucket in shown], "images", MAP_HEIGHT)
    figure.data[0].customdata = [
        [one.label, f"{one.occurrences:,}", f"{one.cut:.1%}", f"{one.scale:.2f}", f"{one.enlarged:,}"] for one in shown
    ]
    figure.data[0].hovertemplate = (
        "%{customdata[0]}<br>%{x:,} images, %{customdata[1]} with repeats<br>%{customdata[2]} cut off on average<br>"
        "scale factor %{customdata[3]} on average, %{customdata[4]} enlarged<extra></extra>"
    )
    return figure


def size_map(sizes: Sizes) -> go.Figure:
    """Images by width and height, with the buckets as open squares."""
    found = sizes.map
    logarithms = np.log10(np.where(found.counts > 0, found.counts, np.nan))
    cells = go.Heatmap(
        x=found.width_edges.tolist(),
        y=found.height_edges.tolist(),
        z=[[None if np.isnan(value) else value for value in row] for row in logarithms.tolist()],
        customdata=found.counts.tolist(),
        coloraxis="coloraxis",
        hovertemplate="about %{x:.0f}×%{y:.0f}<br>%{customdata:,} images<extra></extra>",
        name="images",
        hoverongaps=False,
    )
    buckets = go.Scatter(
        x=[bucket.width for bucket in sizes.buckets],
        y=[bucket.height for bucket in sizes.buckets],
        mode="markers",
        marker={"symbol": "square-open", "size": 9, "line": {"width": 2}},
        customdata=[f"{bucket.label}<br>{bucket.images:,} images" for bucket in sizes.buckets],
        hovertemplate="bucket %{customdata}<extra></extra>",
        name="buckets",
        showlegend=True,
    )
    figure = figure_of([cells, buckets], MAP_HEIGHT)
    powers = list(range(8))
    figure.update_layout(
        coloraxis={"cmin": 0, "colorbar": {"tickvals": powers, "ticktext": [f"{10**k:,}" for k in powers]}},
        legend={"orientation": "h", "y": 1.08},
        margin={"t": 30},
    )
    figure.update_xaxes(title="width in pixels", **log_axis(PIXEL_TICKS))
    return figure.update_yaxes(title="height in pixels", **log_axis(PIXEL_TICKS))


def histogram_bars(found: Histogram, title: str, number: str, *, ticks: Mapping[float, str] | None = None) -> go.Figure:
    """Bars of a histogram. With `ticks` the axis is logarithmic. `number` is the format of the edges."""
    low, high = found.edges[:-1], found.edges[1:]
    middle: Float64[np.ndarray, " bars"] = np.sqrt(low * high) if ticks else (low + high) / 2
    bars = go.Bar(
        x=middle.tolist(),
        y=found.counts.tolist(),
        width=((high - low) * 0.92).tolist(),
        customdata=[
            f"{start:{number}} to {end:{number}}" for start, end in zip(low.tolist(), high.tolist(), strict=True)
        ],
        hovertemplate="%{customdata}<br>%{y:,} images<extra></extra>",
    )
    figure = figure_of([bars], CHART_HEIGHT).update_yaxes(title="images", tickformat="~s")
    axis = log_axis(ticks) if ticks else {"tickformat": ".0%" if number.endswith("%") else None}
    return figure.update_xaxes(title=title, showgrid=False, **axis)


def token_bars(lengths: Lengths) -> go.Figure:
    """Lengths of captions in tokens: what fits and what is cut, with a line at each limit."""
    limit = lengths.configured.tokens
    most = max(int(lengths.lengths.max()), limit) + TOKENS_IN_BAR
    # A caption of exactly the limit fits, so that bars end after a multiple of five.
    edges = np.arange(0.5 - TOKENS_IN_BAR, most + TOKENS_IN_BAR, TOKENS_IN_BAR)
    counts = np.histogram(lengths.lengths, edges)[0]
    middle = (edges[:-1] + edges[1:]) / 2
    fits = middle < limit
    figure = figure_of(
        [
            go.Bar(
                x=middle[own].tolist(),
                y=counts[own].tolist(),
                width=TOKENS_IN_BAR * 0.92,
                name=name,
                customdata=[f"{max(0, int(end - 4.5))} to {int(end)}" for end in edges[1:][own].tolist()],
                hovertemplate="%{customdata} tokens<br>%{y:,} captions<extra></extra>",
            )
            for own, name in ((fits, "fits"), (~fits, "cut off"))
            if counts[own].any()
        ],
        CHART_HEIGHT,
    )
    for one in lengths.limits:
        if one.tokens <= most:
            text = f"<b>{one.tokens}</b>" if one.configured else f"{one.tokens}"
            dash = "solid" if one.configured else "dot"
            figure.add_vline(
                one.tokens + 0.5, line={"dash": dash, "width": 1.5}, annotation={"text": text, "yshift": 14}
            )
    figure.update_layout(legend={"orientation": "h", "y": 1.18}, barmode="overlay", margin={"t": 60})
    return figure.update_xaxes(title="tokens", showgrid=False).update_yaxes(title="captions", tickformat="~s")


def rank_curve(tags: Tags) -> go.Figure:
    """Images of each tag against the tag's rank, both logarithmic."""
    ranks = np.unique(np.geomspace(1, len(tags.names), min(RANKS, len(tags.names))).round().astype(int))
    line = go.Scatter(
        x=ranks.tolist(),
        y=tags.images[ranks - 1].tolist(),
        mode="lines+markers" if len(ranks) < 50 else "lines",
        customdata=[label(tags.names[rank - 1], LETTERS) for rank in ranks.tolist()],
        hovertemplate="rank %{x:,}: %{customdata}<br>%{y:,} images<extra></extra>",
        fill="tozeroy",
    )
    powers = {10.0**k: f"{10**k:,}" for k in range(8)}
    figure = figure_of([line], TALL).update_xaxes(title="rank of the tag", **log_axis(powers))
    return figure.update_yaxes(title="images", **log_axis(powers))


def tags_per_image(tags: Tags) -> go.Figure:
    """Number of images with each number of tags."""
    counts = tags.per_image[:100].copy()
    counts[-1] += tags.per_image[100:].sum()
    bars = go.Bar(
        x=list(range(len(counts))), y=counts.tolist(), hovertemplate="%{x} tags<br>%{y:,} images<extra></extra>"
    )
    figure = figure_of([bars], TALL).update_yaxes(title="images", tickformat="~s")
    return figure.update_xaxes(title="tags in a caption", showgrid=False)


def together_map(together: Together) -> go.Figure:
    """Share of the images with one tag that have the other one too."""
    own = np.diag(together.counts).clip(min=1)
    share = together.counts / own[:, None]
    count = len(own)
    names = [label(name, LETTERS) for name in together.names]
    hover = [
        [f"of “{a}”, {share[y, x]:.0%} have “{b}”<br>{together.counts[y, x]:,} images" for x, b in enumerate(names)]
        for y, a in enumerate(names)
    ]
    cells = go.Heatmap(
        z=[[None if x == y else share[y, x] for x in range(count)] for y in range(count)],
        customdata=hover,
        coloraxis="coloraxis",
        xgap=1,
        ygap=1,
        hovertemplate="%{customdata}<extra></extra>",
        hoverongaps=False,
    )
    figure = figure_of([cells], count * 20 + 170)
    figure.update_layout(coloraxis={"cmin": 0, "colorbar": {"tickformat": ".0%"}})
    places = list(range(count))
    figure.update_xaxes(tickvals=places, ticktext=names, tickangle=-90, showgrid=False)
    return figure.update_yaxes(tickvals=places, ticktext=names, autorange="reversed", showgrid=False)
