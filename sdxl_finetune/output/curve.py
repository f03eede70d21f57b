"""The picture of a curve over timesteps, for trackers that show pictures."""

import math
from collections.abc import Iterator, Mapping

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 720, 400
"""Pixels of the picture."""
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 40, 40
"""Pixels between the picture's edges and the axes."""
MARKS = 5
"""Most marks on the axis of timesteps, but for the first one."""
GRID, CURVE = "#d8dce2", "#1f5fbf"
"""Colours."""


def draw_curve(points: Mapping[float, float], title: str) -> Image.Image:
    """Draws positive values by timestep: timesteps on a linear axis from left to right, values on a logarithmic one.

    The axes have the range of the points. The axis of values has at least a factor of 10, so that noise looks small.
    """
    places, values = list(points), [math.log10(value) for value in points.values()]
    middle, half = (max(values) + min(values)) / 2, max(1.05 * (max(values) - min(values)), 1.0) / 2

    def at(place: float, logarithm: float) -> tuple[float, float]:
        across = (place - places[0]) / max(places[-1] - places[0], 1e-9)
        up = (logarithm - middle + half) / (2 * half)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    pen.text((WIDTH / 2, TOP / 2), title, fill="black", font=font, anchor="mm")
    for mark in _round_values(middle - half, middle + half):
        _, y = at(places[0], math.log10(mark))
        pen.line((LEFT, y, WIDTH - RIGHT, y), fill=GRID)
        pen.text((LEFT - 6, y), f"{mark:g}", fill="black", font=font, anchor="rm")
    apart = 10 * max(1, math.ceil((places[-1] - places[0]) / MARKS / 10))
    for timestep in range(math.ceil(places[0] / apart) * apart, math.floor(places[-1]) + 1, apart):
        x, y = at(timestep, middle - half)
        pen.line((x, TOP, x, y), fill=GRID)
        pen.text((x, y + 6), str(timestep), fill="black", font=font, anchor="mt")
    pen.line([at(place, value) for place, value in zip(places, values, strict=True)], fill=CURVE, width=2)
    return picture


def _round_values(low: float, high: float) -> Iterator[float]:
    """Yields 1, 2 and 5 times each power of ten between 10^low and 10^high."""
    for power in range(math.floor(low), math.ceil(high) + 1):
        yield from (value for digit in (1, 2, 5) if low <= math.log10(value := digit * 10.0**power) <= high)
