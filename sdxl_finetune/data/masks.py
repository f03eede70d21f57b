"""Masks: how much each part of an image counts in the loss, from 0 to 1.

A mask is an image file of the same name and size in `conditioning_data_dir` (mask_files.py), of which the red channel
counts, or the alpha channel of the image (`alpha_mask`). It is resized and cropped as its image, then averaged over the
pixels of each latent, as in the reference (`apply_masked_loss` of library/custom_train_functions.py).
"""

import io
import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import PurePath

import numpy as np
import pyarrow as pa
import pyarrow.compute
from jaxtyping import Float32, Int64, UInt8
from PIL import Image

from sdxl_finetune.data.contents import read_image
from sdxl_finetune.data.images import ImageError, image_size, load_channel, resize_and_crop
from sdxl_finetune.data.index import Entry, Index
from sdxl_finetune.data.mask_files import MASKED, SHARED
from sdxl_finetune.data.remarks import report_bad_images
from sdxl_finetune.data.sources.beside import Wanted
from sdxl_finetune.data.sources.names import first_of_each
from sdxl_finetune.data.sources.objects import Objects, read_contents
from sdxl_finetune.data.tables import one_chunk
from sdxl_finetune.errors import Problem, Tally
from sdxl_finetune.storage import Location

logger = logging.getLogger(__name__)

LOOKED_AT = 100
"""Images of which the header is read to find out if any has an alpha channel."""


def find_mask(entry: Entry) -> Location | None:
    """The file that holds the image's mask. None: the alpha channel of the image is the mask.

    Raises ImageError if the mask file is missing, or if images of the same name in other folders have it too.
    """
    folder, images = entry.subset.conditioning_data_dir, entry.subset.image_dir
    if folder is None:
        return None
    if entry.mask_stat[0] >= 0:
        return entry.mask
    below = entry.path.relative_to(images) if entry.path.is_relative_to(images) else PurePath(entry.path.name)
    own = below.with_suffix(".png").as_posix()
    if entry.mask_stat[0] == SHARED:
        message = f"{entry.mask} fits images of this name in several folders: put its mask at '{own}' in {folder}"
        raise ImageError(str(entry.path), message)
    raise ImageError(str(entry.path), f"its mask is missing: put '{own}' into {folder}")


def read_mask(entry: Entry) -> bytes:
    """The content of the mask file. Raises ImageError, also if the file was changed since it was found."""
    path = find_mask(entry)
    assert path is not None
    return read_image(path, None, -1, entry.mask_stat, unchanged=True)


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
        mask = load_channel(path, "R", read_mask(entry) if data is None else data)
    _check_size(path or entry.path, mask.shape[::-1], entry)
    return resize_and_crop(mask, resized, left_top, (entry.bucket.width, entry.bucket.height), entry.interpolation)


def latent_mask(mask: UInt8[np.ndarray, "H W"], pixels_per_latent: int) -> Float32[np.ndarray, "h w"]:
    """The mean of the mask, 0 to 1, over the pixels of each latent."""
    height, width = (side // pixels_per_latent for side in mask.shape)
    blocks = mask.reshape(height, pixels_per_latent, width, pixels_per_latent)
    return blocks.mean(axis=(1, 3), dtype=np.float32) / np.float32(255)


def without_bad_masks(index: Index, on_bad_image: str) -> Index:
    """Looks for every mask file and reads its size, unless it is known from an earlier start. No mask is decoded.

    Masks that are missing or of another size than their image raise one UserError with all their names, if
    `on_bad_image` is "stop". If it is "skip", a warning names them, and the index leaves their images out.
    """
    rows = np.flatnonzero(index.used & index.has_mask_file)
    bad: dict[int, Problem] = {}
    for row in _doubtful(index, rows).tolist():
        entry = index[row]
        try:
            data, path = read_mask(entry), find_mask(entry)
            assert path is not None
            _check_size(path, image_size(path, data), entry)
        except ImageError as error:
            bad[row] = Problem(error.reason, file=error.path)
    report_bad_images(Tally(bad.values()), on_bad_image)
    return index.without(bad) if bad else index


def _doubtful(index: Index, rows: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " k"]:
    """The rows whose mask is missing, unreadable or of another size than its image, in columns."""
    if not len(rows):
        return rows
    is_good = np.zeros(len(rows), bool)
    sizes, versions = (index.numbers(name)[rows] for name in MASKED[1:])
    folders = [one.conditioning_data_dir for one in index.subsets]
    for folder in dict.fromkeys(one for one in folders if one):
        of_folder = np.array([one == folder for one in folders])[index.subset[rows]]
        own = np.flatnonzero(of_folder & (sizes >= 0))
        names = index.masks.take(pa.array(rows[own]))
        first = own[first_of_each(names)]
        masks = Objects(index.masks.take(pa.array(rows[first])), sizes[first], versions[first])
        known, _ = read_contents(folder, masks, {}, Wanted(()), index.path.parent / "mask_files")
        place = pa.compute.index_in(names, value_set=one_chunk(known["name"])).fill_null(-1).to_numpy()
        is_good[own] = place >= 0
        for side in ("width", "height"):
            is_good[own] &= np.append(one_chunk(known[side]).to_numpy(), 0)[place] == index.numbers(side)[rows[own]]
    return rows[~is_good]


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
