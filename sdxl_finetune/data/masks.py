"""Masks: how much each part of an image counts in the loss, from 0 to 1.

A mask is an image file of the same name and size in `conditioning_data_dir`, of which the red channel counts, or the
alpha channel of the image (`alpha_mask`). It is resized and cropped as its image, then averaged over the pixels of each
latent, as in the reference (`apply_masked_loss` of library/custom_train_functions.py).
"""

import io
import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from sdxl_finetune.data.images import ImageError, image_extensions, image_size, load_channel, resize_and_crop
from sdxl_finetune.data.index import Entry, Index
from sdxl_finetune.data.remarks import report_bad_images
from sdxl_finetune.errors import Problem, Tally
from sdxl_finetune.progress import track
from sdxl_finetune.storage import Location

logger = logging.getLogger(__name__)

LOOKED_AT = 100
"""Images of which the header is read to find out if any has an alpha channel."""


def find_mask(entry: Entry) -> Path | None:
    """The file that holds the image's mask. None: the alpha channel of the image is the mask.

    Raises ImageError if the mask file is missing.
    """
    folder = entry.subset.conditioning_data_dir
    if folder is None:
        return None
    for ending in image_extensions():
        for spelling in (ending, ending.upper()):
            path = folder / (entry.path.stem + spelling)
            if path.is_file():
                return path
    raise ImageError(str(entry.path), f"its mask is missing: put '{entry.path.stem}.png' into {folder}")


def load_mask(
    entry: Entry, resized: tuple[int, int], left_top: tuple[int, int], data: bytes | None = None
) -> UInt8[np.ndarray, "H W"]:
    """The mask of an image's crop, 0 to 255. Raises ImageError if it is missing, unreadable or of another size.

    `resized` and `left_top` are those of the image. `data` is the content of the mask file, or of the image if the mask
    is its alpha channel, if it was read.
    """
    path = find_mask(entry)
    if path is None:
        mask = load_channel(entry.path, "A", entry.read() if data is None else data)
    else:
        mask = load_channel(path, "R", data)
    _check_size(path or entry.path, mask.shape[::-1], entry)
    return resize_and_crop(mask, resized, left_top, (entry.bucket.width, entry.bucket.height), entry.interpolation)


def latent_mask(mask: UInt8[np.ndarray, "H W"], pixels_per_latent: int) -> Float32[np.ndarray, "h w"]:
    """The mean of the mask, 0 to 1, over the pixels of each latent."""
    height, width = (side // pixels_per_latent for side in mask.shape)
    blocks = mask.reshape(height, pixels_per_latent, width, pixels_per_latent)
    return blocks.mean(axis=(1, 3), dtype=np.float32) / np.float32(255)


def without_bad_masks(index: Index, on_bad_image: str) -> Index:
    """Looks for every mask file and reads its size. No mask is decoded.

    Masks that are missing or of another size than their image raise one UserError with all their names, if
    `on_bad_image` is "stop". If it is "skip", a warning names them, and the index leaves their images out.
    """
    rows = np.flatnonzero(index.used & index.has_mask_file).tolist()
    bad: dict[int, Problem] = {}
    with track("reading sizes of masks", len(rows), "masks", shown=bool(rows)) as progress:
        for row in rows:
            entry = index[row]
            progress.update()
            try:
                if path := find_mask(entry):
                    _check_size(path, image_size(path), entry)
            except ImageError as error:
                bad[row] = Problem(error.reason, file=error.path)
    report_bad_images(Tally(bad.values()), on_bad_image)
    return index.without(bad) if bad else index


def remark_on_alpha(index: Index) -> None:
    """Warns if `alpha_mask` finds nothing to mask, because no image that is looked at has an alpha channel.

    At most LOOKED_AT images are opened, evenly over the index. No image is decoded.
    """
    rows = np.flatnonzero(index.used & index.has_mask & ~index.has_mask_file)
    looked_at = rows[:: max(1, -(-len(rows) // LOOKED_AT))].tolist()
    for row in looked_at:
        with suppress(OSError, ImageError), Image.open(io.BytesIO(index[row].read())) as image:
            if image.has_transparency_data:
                return
    if looked_at:
        message = "alpha_mask = true: none of the images looked at (%d) has an alpha channel, so nothing is masked"
        logger.warning(f"{message}: save images with transparency as .png, or remove alpha_mask", len(looked_at))


def _check_size(path: Location, size: Sequence[int], entry: Entry) -> None:
    if tuple(size) != entry.size:
        (width, height), (own_width, own_height) = size, entry.size
        message = f"the mask has {width}x{height} pixels, but its image {own_width}x{own_height}: make them equal"
        raise ImageError(str(path), message)
