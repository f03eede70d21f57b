"""Contact sheets: several images in one, each with a text below it."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

MIN_SIDE, MAX_SIDE = 160, 384
"""Pixels of the longest side of an image on the sheet. Smaller images are enlarged, larger images are reduced. The text
below an image is at least MIN_SIDE wide."""
LINES = 3
"""Most lines of text below an image. The rest of the text is cut off."""
MARGIN, FONT_SIZE, HEADING_SIZE = 6, 13, 18
"""Pixels."""
LINE_HEIGHT = FONT_SIZE + 3
"""Pixels."""
LEGEND_LINES = 20
"""Most lines of a legend."""
HEADING_COLORS = ("white", "#30343c")
"""Text and background of a heading."""


def stack(pages: Sequence[tuple[str, Image.Image]], legend: str = "") -> Image.Image:
    """Puts pictures below each other, each under its heading. The legend stands above all of them."""
    bar = 2 * HEADING_SIZE
    width = max(image.width for _, image in pages)
    font = ImageFont.load_default(HEADING_SIZE)
    width = max(width, *(int(font.getlength(heading)) + 4 * MARGIN for heading, _ in pages))
    lines = _wrap(legend, _letters(width - 4 * MARGIN), LEGEND_LINES)
    top = len(lines) * LINE_HEIGHT + 4 * MARGIN if lines else 0
    sheet = Image.new("RGB", (width, top + sum(bar + image.height for _, image in pages)), "white")
    pen = ImageDraw.Draw(sheet)
    small = ImageFont.load_default(FONT_SIZE)
    pen.multiline_text((2 * MARGIN, 2 * MARGIN), "\n".join(lines), fill="black", font=small, spacing=2)
    text_color, background = HEADING_COLORS
    for heading, image in pages:
        pen.rectangle((0, top, width, top + bar - 1), fill=background)
        pen.text((2 * MARGIN, top + bar // 2), heading, fill=text_color, font=font, anchor="lm")
        sheet.paste(image, (0, top + bar))
        top += bar + image.height
    return sheet


def contact_sheet(
    images: Sequence[Image.Image], texts: Sequence[str], *, columns: int, lines: int = LINES
) -> Image.Image:
    """Puts images of any sizes, scaled by one factor, into a white grid with at most `columns` columns.

    Below each image stand at most `lines` lines of its text, but no empty space that no text of the page needs.
    """
    longest = max(max(image.size) for image in images)
    scale = -(-MIN_SIDE // longest) if longest < MIN_SIDE else min(1, MAX_SIDE / longest)
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    sizes = [(round(image.width * scale), round(image.height * scale)) for image in images]
    columns, rows = min(columns, len(images)), -(-len(images) // columns)
    cell_width = max(MIN_SIDE, *(width for width, _ in sizes)) + MARGIN
    wrapped = [_wrap(text, _letters(cell_width - MARGIN), lines) for text in texts]
    text_height = max(len(own) for own in wrapped) * LINE_HEIGHT
    image_height = max(height for _, height in sizes)
    cell_height = image_height + text_height + MARGIN
    page = Image.new("RGB", (columns * cell_width + MARGIN, rows * cell_height + MARGIN), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(FONT_SIZE)
    for number, (image, size, own) in enumerate(zip(images, sizes, wrapped, strict=True)):
        left, top = MARGIN + number % columns * cell_width, MARGIN + number // columns * cell_height
        page.paste(image.convert("RGB").resize(size, method), (left, top))
        pen.multiline_text((left, top + image_height + 2), "\n".join(own), fill="black", font=font, spacing=2)
    return page


def _wrap(text: str, letters: int, lines: int) -> list[str]:
    """The lines of a text, of at most `letters` letters. If there are more than `lines`, the last one ends in dots."""
    wrapped: list[str] = []
    for line in text.split("\n") if text else ():
        room = lines - len(wrapped)
        wrapped += textwrap.wrap(line, letters, max_lines=room, placeholder=" ...") if room else []
    return wrapped


def _letters(width: int) -> int:
    """Letters that fit in so many pixels: a letter is about half as wide as high."""
    return int(width / (0.52 * FONT_SIZE))
