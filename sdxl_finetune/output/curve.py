"""The picture of a curve, for trackers that show pictures."""

import math
from collections.abc import Mapping

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 720, 400
"""Pixels of the picture."""
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 40, 40
"""Pixels between the picture's edges and the axes."""
STEPS = (1, 2, 5)
"""First digits of the marks on the logarithmic axis."""


def draw_curve(points: Mapping[float, float], title: str) -> Image.Image:
    """Draws positive values by their place: places on a linear axis from left to right, values on a logarithmic one.

    The axes have the range of the points. The axis of values has at least a factor of 2, so that a constant is a line.
    """
    places, values = list(points), [math.log10(value) for value in points.values()]
    middle, half = (max(values) + min(values)) / 2, max(max(values) - min(values), math.log10(2)) / 2 * 1.05
    low, high = middle - half, middle + half

    def at(place: float, logarithm: float) -> tuple[float, float]:
        across = (place - places[0]) / max(places[-1] - places[0], 1e-9)
        up = (logarithm - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    pen.text((WIDTH / 2, TOP / 2), title, fill="black", font=font, anchor="mm")
    for mark in _marks(low, high):
        (left, height), (right, _) = at(places[0], math.log10(mark)), at(places[-1], math.log10(mark))
        pen.line((left, height, right, height), fill="#d8dce2")
        pen.text((LEFT - 6, height), f"{mark:g}", fill="black", font=font, anchor="rm")
    for part in range(6):
        place = places[0] + (places[-1] - places[0]) * part / 5
        x, y = at(place, low)
        pen.line((x, TOP, x, y), fill="#d8dce2")
        pen.text((x, y + 6), f"{place:.0f}", fill="black", font=font, anchor="mt")
    pen.line([at(place, value) for place, value in zip(places, values, strict=True)], fill="#1f5fbf", width=2)
    return picture


def _marks(low: float, high: float) -> list[float]:
    """Round numbers between 10^low and 10^high: tenths within a factor of 10, else 1, 2 and 5 of each power of ten."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    steps = STEPS if high - low >= 1 else tuple(step / 10 for step in range(10, 100, 5 if high - low > 0.5 else 2))
    marks = [step * 10.0**power for power in powers for step in steps]
    return [mark for mark in marks if low <= math.log10(mark) <= high]
