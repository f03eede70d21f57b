"""Contact sheets: several pictures in one, each with words below it."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

MIN_SIDE, MAX_SIDE = 160, 384
"""Pixels of the longer side of a picture on a sheet."""
LINES = 3
"""Of words below a picture, at most."""
MARGIN, SIZE = 6, 13


def contact_sheet(pictures: Sequence[Image.Image], words: Sequence[str], *, across: int) -> Image.Image:
    """The pictures in rows of `across`, brought to one scale, on white."""
    largest = max(max(picture.size) for picture in pictures)
    scale = -(-MIN_SIDE // largest) if largest < MIN_SIDE else min(1, MAX_SIDE / largest)
    way = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    sizes = [(round(picture.width * scale), round(picture.height * scale)) for picture in pictures]
    width, height = max(width for width, _ in sizes), max(height for _, height in sizes)
    font = ImageFont.load_default(SIZE)
    below = LINES * (SIZE + 3) if any(words) else 0
    rows = -(-len(pictures) // across)
    across = min(across, len(pictures))
    page = Image.new("RGB", (across * (width + MARGIN) + MARGIN, rows * (height + below + MARGIN) + MARGIN), "white")
    pen = ImageDraw.Draw(page)
    letters = max(8, int(width / (0.52 * SIZE)))
    for number, (picture, size, text) in enumerate(zip(pictures, sizes, words, strict=True)):
        left = MARGIN + number % across * (width + MARGIN)
        top = MARGIN + number // across * (height + below + MARGIN)
        page.paste(picture.convert("RGB").resize(size, way), (left, top))
        lines = textwrap.wrap(text, letters, max_lines=LINES, placeholder=" ...")
        pen.multiline_text((left, top + height + 2), "\n".join(lines), fill="black", font=font, spacing=2)
    return page
