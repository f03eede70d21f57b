"""Contact sheets: several images in one, each with a text below it."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

MIN_SIDE, MAX_SIDE = 160, 384
"""Pixels of the longest side of an image on the sheet. Smaller images are enlarged, larger images are reduced."""
LINES = 3
"""Most lines of text below an image. The rest of the text is cut off."""
MARGIN, FONT_SIZE, HEADING_SIZE = 6, 13, 18
"""Pixels."""
HEADING_COLORS = ("white", "#30343c")
"""Text and background of a heading."""


def stack(pages: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Puts pictures below each other, each under its heading."""
    bar = 2 * HEADING_SIZE
    width = max(image.width for _, image in pages)
    font = ImageFont.load_default(HEADING_SIZE)
    width = max(width, *(int(font.getlength(heading)) + 4 * MARGIN for heading, _ in pages))
    sheet = Image.new("RGB", (width, sum(bar + image.height for _, image in pages)), "white")
    pen, top = ImageDraw.Draw(sheet), 0
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
    cell_width = max(width for width, _ in sizes) + MARGIN
    letters = max(8, int((cell_width - MARGIN) / (0.52 * FONT_SIZE)))  # a letter is about half as wide as high
    wrapped = [_wrap(text, letters, lines) for text in texts]
    text_height = max(len(own) for own in wrapped) * (FONT_SIZE + 3)
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
    wrapped = [part for line in text.split("\n") for part in textwrap.wrap(line, letters)]
    return wrapped if len(wrapped) <= lines else [*wrapped[: lines - 1], wrapped[lines - 1][: letters - 4] + " ..."]
