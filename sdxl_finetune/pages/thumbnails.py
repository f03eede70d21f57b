"""Small pictures of single images, as data URLs in the page. Only images that the page shows are decoded."""

import base64
import contextlib
import io
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from sdxl_finetune.data.images import ImageError, load_image

SIDE = 176
"""Pixels of the longest side."""
QUALITY = 72
"""Quality of the JPEG, 1 to 100: about 6 kB a picture."""
MOST_PIXELS = 1 << 26
"""Images that are larger are not decoded for a thumbnail, because that would take seconds and gigabytes."""


def thumbnail(read: Callable[[], bytes], side: int = SIDE) -> str | None:
    """The data URL of a JPEG of an image, or None if it cannot be decoded. `read` returns the content of the file.

    The longest side has at most `side` pixels.
    """
    with contextlib.suppress(OSError, ValueError, ImageError, Image.DecompressionBombError):
        data = read()
        with Image.open(io.BytesIO(data)) as image:  # reads only the header
            size = image.size
        if size[0] * size[1] > MOST_PIXELS:
            return None
        scale = min(1.0, side / max(size))
        at_least = (max(1, int(size[0] * scale)), max(1, int(size[1] * scale)))
        picture = Image.fromarray(load_image(Path("thumbnail"), at_least=at_least, data=data))
        return picture_url(picture, side)
    return None


def picture_url(picture: Image.Image, side: int = SIDE) -> str:
    """The data URL of a JPEG of a picture, of at most `side` pixels. The picture itself may become smaller."""
    picture.thumbnail((side, side))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
