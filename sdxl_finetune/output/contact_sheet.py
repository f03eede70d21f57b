"""Contact sheets: several images in one, each with a text below it."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

MIN_SIDE, MAX_SIDE = 160, 384
"""Pixels of the longest side of an image on the sheet. Smaller images are enlarged, larger images are reduced."""
LINES = 3
"""Most lines of text below an image. The rest of the text is cut off."""
MARGIN, FONT_SIZE = 6, 13
"""Pixels."""


def contact_sheet(images: Sequence[Image.Image], texts: Sequence[str], *, columns: int) -> Image.Image:
    """Puts images of any sizes, scaled by one factor, into a white grid with at most `columns` columns."""
    longest = max(max(image.size) for image in images)
    scale = -(-MIN_SIDE // longest) if longest < MIN_SIDE else min(1, MAX_SIDE / longest)
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    sizes = [(round(image.width * scale), round(image.height * scale)) for image in images]
    columns, rows = min(columns, len(images)), -(-len(images) // columns)
    text_height = LINES * (FONT_SIZE + 3) if any(texts) else 0
    cell_width = max(width for width, _ in sizes) + MARGIN
    image_height = max(height for _, height in sizes)
    cell_height = image_height + text_height + MARGIN
    page = Image.new("RGB", (columns * cell_width + MARGIN, rows * cell_height + MARGIN), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(FONT_SIZE)
    letters = max(8, int((cell_width - MARGIN) / (0.52 * FONT_SIZE)))  # a letter is about half as wide as high
    for number, (image, size, text) in enumerate(zip(images, sizes, texts, strict=True)):
        left, top = MARGIN + number % columns * cell_width, MARGIN + number // columns * cell_height
        page.paste(image.convert("RGB").resize(size, method), (left, top))
        lines = textwrap.wrap(text, letters, max_lines=LINES, placeholder=" ...")
        pen.multiline_text((left, top + image_height + 2), "\n".join(lines), fill="black", font=font, spacing=2)
    return page
