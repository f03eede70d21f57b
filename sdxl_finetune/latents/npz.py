"""Latents that the reference has saved beside an image: `name_{width}x{height}_sdxl.npz`, or the older `name.npz`.

The reference uses them whatever bucket, image or VAE they were made for. Here each file is used only if its latents are
those that would be encoded. Names, arrays and the crop in the file are golden (tests/golden/cache_format.json), from
the reference's library/strategy_base.py and strategy_sd.py.
"""

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float16

from sdxl_finetune.data.images import is_plain
from sdxl_finetune.data.index import Entry

MOST_BYTES = 256 << 20
"""Bytes of all arrays of a file. A file of zeros can unpack to a thousand times its size."""


@dataclass(frozen=True)
class Rejected:
    """A file that is not used."""

    path: Path
    reason: str


def find_npz(entry: Entry) -> Path | None:
    """The file that the reference would use for this image, or would if it applied the EXIF orientation.

    The reference has no such files for images in tar files and object stores.
    """
    if entry.offset >= 0 or not isinstance(entry.path, Path):
        return None
    width, height = entry.size
    endings = [".npz", *(f"_{w:04d}x{h:04d}_sdxl.npz" for w, h in ((width, height), (height, width)))]
    paths = (entry.path.with_name(entry.path.stem + ending) for ending in endings)
    return next((path for path in paths if path.is_file()), None)


def read_npz(
    entry: Entry, data: bytes, shape: tuple[int, int, int], mirrored: Iterable[bool]
) -> dict[bool, Float16[np.ndarray, "c h w"]] | Rejected | None:
    """The saved latents of an image with this content, as it is and mirrored; None if there is no file."""
    path = find_npz(entry)
    if path is None:
        return None
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            read = [name for name in file.files if name != "alpha_mask"]
            if sum(file.zip.getinfo(f"{name}.npy").file_size for name in read) > MOST_BYTES:
                return Rejected(path, "far too large")
            arrays = {name: file[name] for name in read}
    except Exception as error:  # numpy parses headers as Python, and damage raises errors of many classes
        return Rejected(path, f"damaged ({type(error).__name__})")
    names = {flip: "latents_flipped" if flip else "latents" for flip in mirrored}
    if reason := _misfit(entry, path, data, arrays, shape, list(names.values())):
        return Rejected(path, reason)
    return {flip: arrays[name].astype(np.float16) for flip, name in names.items()}


def _misfit(
    entry: Entry, path: Path, data: bytes, arrays: dict[str, np.ndarray], shape: tuple[int, int, int], names: list[str]
) -> str | None:
    """The reason why the arrays are not the latents of the image; None if they are."""
    known = {"latents", "original_size", "crop_ltrb"} <= arrays.keys()
    if not known or any(array.dtype.kind not in "fiu" for array in arrays.values()) or arrays["crop_ltrb"].size != 4:
        return "no latents of SDXL"
    if not set(names) <= arrays.keys():
        return "without the mirrored latents that flip_aug needs"
    wanted = [arrays[name] for name in names]
    if any(array.shape != shape for array in wanted):
        return "made for another bucket"
    if arrays["original_size"].tolist() != list(entry.size):
        return "made of an image of another size"
    if not np.allclose(arrays["crop_ltrb"], noted_crop(entry.size, (entry.bucket.width, entry.bucket.height))):
        return "made with another crop"
    if path.stat().st_mtime_ns < entry.stat[1]:
        return "older than the image"
    if not all((np.abs(array) <= np.finfo(np.float16).max).all() for array in wanted):
        return "not finite"
    if not is_plain(data):
        return (
            "of an image that the reference reads in another way (turned, transparent, 16-bit or with a colour profile)"
        )
    return None


def noted_crop(size: tuple[int, int], bucket: tuple[int, int]) -> tuple[float, float, float, float]:
    """crop_ltrb as in the reference: left, top, right and bottom of the whole image fitted into the bucket."""
    ratio = size[0] / size[1]
    fits_width = bucket[0] / bucket[1] <= ratio
    width, height = (float(bucket[0]), bucket[0] / ratio) if fits_width else (bucket[1] * ratio, float(bucket[1]))
    left, top = (bucket[0] - width) // 2, (bucket[1] - height) // 2
    return left, top, left + width, top + height
