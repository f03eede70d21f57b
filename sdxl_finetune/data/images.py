"""Reads image files as 8-bit sRGB pixels, the way a viewer shows them.

Images are turned by their EXIF orientation. Transparent parts become white. 16-bit values are scaled. Grey, palette and
CMYK images are converted, and embedded ICC profiles are applied.

Pillow opens, inspects and converts. OpenCV decodes plain JPEGs, three times as fast with the same result, and resizes.
It decodes at a half, a quarter or an eighth of the size if that is large enough. A file that cannot be used raises
ImageError with its name, and no other exception.
"""

import contextlib
import importlib
import io
import random
from functools import lru_cache
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from sdxl_finetune.config.dataset import IMAGE_SUFFIXES, OPTIONAL_SUFFIXES
from sdxl_finetune.storage import Location

PLUGINS = ("pillow_jxl", "jxlpy.JXLImagePlugin", "pillow_avif")
"""Modules that teach Pillow a format when they are imported. Each process that opens images needs them."""
for _plugin in PLUGINS:
    with contextlib.suppress(ImportError):
        importlib.import_module(_plugin)

USUAL = ("JPEG", "PNG", "WEBP", "BMP")
"""Formats that Pillow tries first. Some of its other plugins parse a file before they refuse it."""
RUNS_PROGRAM = ("EPS",)
"""Formats that are programs themselves: Pillow lets Ghostscript run an EPS file, whatever the name of the file says."""
_REDUCED = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
_CV2_INTERPOLATION = {
    "area": cv2.INTER_AREA,
    "nearest": cv2.INTER_NEAREST_EXACT,
    "bilinear": cv2.INTER_LINEAR,
    "linear": cv2.INTER_LINEAR,
    "bicubic": cv2.INTER_CUBIC,
    "cubic": cv2.INTER_CUBIC,
}
_PILLOW_INTERPOLATION = {"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX}


class ImageError(Exception):
    """An image file that cannot be used."""

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(path, reason)

    @property
    def is_lasting(self) -> bool:
        """True if the content of the file is the cause, so that reading fails until the file changes."""
        cause = self.__cause__
        is_passing = isinstance(cause, OSError) and cause.errno is not None
        return cause is not None and not is_passing and getattr(cause, "code", None) != cv2.Error.StsNoMem


def image_extensions() -> tuple[str, ...]:
    """File name endings of images that can be read here, in lower case."""
    known = Image.registered_extensions()
    return (*IMAGE_SUFFIXES, *(ending for ending in OPTIONAL_SUFFIXES if ending in known))


def image_size(path: Location, data: bytes | None = None) -> tuple[int, int]:
    """(width, height) after EXIF orientation, from the file's header alone. Raises ImageError.

    `data` is the file's content or its first bytes, if they were read.
    """
    try:
        with _open(Path(path) if data is None else io.BytesIO(data)) as image:
            width, height = image.size
            return (height, width) if _orientation(image) >= 5 else (width, height)
    except MemoryError:
        raise
    except Exception as error:
        raise ImageError(str(path), _reason(error, path, data)) from error


def size_of_start(path: Location, start: bytes) -> tuple[int, int] | None:
    """The result of image_size for the first bytes of a longer file. None: they do not say it."""
    try:
        return _webp_size(start) or image_size(path, start)
    except ImageError:
        return None


def _webp_size(start: bytes) -> tuple[int, int] | None:
    """(width, height) in the header of a WebP file, which Pillow reads only from whole files.

    None for other files, and for files with metadata at their end that may turn the image. The layout is that of RFC
    9649.
    """
    if len(start) < 30 or start[:4] + start[8:12] != b"RIFFWEBP":
        return None
    match start[12:16]:
        case b"VP8X" if not start[20] & 0x0C:  # neither EXIF nor XMP
            return 1 + int.from_bytes(start[24:27], "little"), 1 + int.from_bytes(start[27:30], "little")
        case b"VP8 " if start[23:26] == b"\x9d\x01\x2a":
            return int.from_bytes(start[26:28], "little") & 0x3FFF, int.from_bytes(start[28:30], "little") & 0x3FFF
        case b"VP8L" if start[20] == 0x2F:
            bits = int.from_bytes(start[21:25], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return None


def _open(file: Path | io.BytesIO) -> Image.Image:
    """Opens an image of any format that Pillow knows."""
    try:
        return Image.open(file, formats=USUAL)
    except UnidentifiedImageError:
        return Image.open(file, formats=_others())


@lru_cache
def _others() -> tuple[str, ...]:
    """All formats that Pillow knows, but those that it reads with another program."""
    Image.init()
    return tuple(name for name in Image.ID if name not in RUNS_PROGRAM)


def load_image(
    path: Location, at_least: tuple[int, int] | None = None, data: bytes | None = None, *, hides: bool = True
) -> UInt8[np.ndarray, "H W 3"]:
    """The RGB pixels of a file, or of its content `data` if that was read already. Raises ImageError.

    Transparent parts become white, unless `hides` is False: then the colours below them show.

    With `at_least` (width, height) a large JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, if it stays at least so
    large. The cosine transform then does the averaging; the result is within one grey level of decoding it whole.
    """
    try:
        data = Path(path).read_bytes() if data is None else data
        with _open(io.BytesIO(data)) as image:
            orientation, profile = _orientation(image), image.info.get("icc_profile")
            grey = image.mode in ("1", "L", "LA", "I", "I;16")
            # A JPEG without its end mark is truncated. OpenCV would fill it with grey; Pillow reports it.
            if image.format == "JPEG" and image.mode == "RGB" and data.endswith(b"\xff\xd9"):
                wanted = at_least[::-1] if at_least and orientation >= 5 else at_least
                pixels = _decode_jpeg(data, _reduction(image.size, wanted))
                if profile and _transform(profile)[0]:
                    pixels = np.asarray(_in_srgb(Image.fromarray(pixels), profile, grey=grey))
            else:
                flat = _flat(image, hides=hides)
                converted = _in_srgb(flat, profile, grey=grey) if profile else flat
                pixels = np.asarray(converted if converted.mode == "RGB" else converted.convert("RGB"))
        return _turned(pixels, orientation)
    except MemoryError:
        raise
    except Exception as error:
        raise ImageError(str(path), _reason(error, path, data)) from error


def load_crop(
    path: Location,
    *,
    size: tuple[int, int],
    resized: tuple[int, int],
    left_top: tuple[int, int],
    bucket: tuple[int, int],
    interpolation: str | None,
    data: bytes | None = None,
    hides: bool = True,
) -> UInt8[np.ndarray, "H W 3"]:
    """The pixels of an image in its bucket.

    Raises ImageError, also if the image does not have the `size` that the scan or a metadata file gave it.
    """
    pixels = load_image(path, at_least=None if interpolation else resized, data=data, hides=hides)
    height, width = pixels.shape[:2]
    by = max(1, round(size[0] / width))
    if (-(-size[0] // by), -(-size[1] // by)) != (width, height):
        real, noted = ("x".join(map(str, sides)) for sides in (image_size(path, data), size))
        remedy = "correct image_size in the metadata file, or start again without skip_cache_check"
        raise ImageError(str(path), f"its size is {real}, not {noted} as noted for it: {remedy}")
    return resize_and_crop(pixels, resized, left_top, bucket, interpolation)


def load_channel(path: Location, channel: Literal["R", "A"], data: bytes | None = None) -> UInt8[np.ndarray, "H W"]:
    """One channel of an image file: red, or alpha, which is 255 everywhere in an opaque image. Raises ImageError.

    The channel is turned by EXIF orientation. Colour profiles do not change it.
    """
    try:
        data = Path(path).read_bytes() if data is None else data
        with _open(io.BytesIO(data)) as image:
            orientation = _orientation(image)
            if channel == "A" and not image.has_transparency_data:
                values = np.full(image.size[::-1], 255, np.uint8)
            else:
                eight_bits = _eight_bits(image) if image.mode.startswith("I") else image
                values = np.asarray(eight_bits.convert("RGB" if channel == "R" else "RGBA").getchannel(channel))
        return _turned(values, orientation)
    except MemoryError:
        raise
    except Exception as error:
        raise ImageError(str(path), _reason(error, path, data)) from error


def resize_and_crop(
    pixels: UInt8[np.ndarray, "_ _ *channels"],
    resized: tuple[int, int],
    left_top: tuple[int, int],
    bucket: tuple[int, int],
    interpolation: str | None = None,
) -> UInt8[np.ndarray, "H W *channels"]:
    """Resizes and crops pixels to the bucket.

    Without an `interpolation` (resize_interpolation), OpenCV's area averaging is used if neither side grows, else
    Pillow's Lanczos, as in the reference.
    """
    height, width = pixels.shape[:2]
    if (width, height) != resized:
        shrinks = width >= resized[0] and height >= resized[1]
        name = interpolation or ("area" if shrinks else "lanczos")
        if name in _CV2_INTERPOLATION:
            pixels = cv2.resize(pixels, resized, interpolation=_CV2_INTERPOLATION[name])
        else:
            pixels = np.asarray(Image.fromarray(pixels).resize(resized, _PILLOW_INTERPOLATION[name]))
    left, top = left_top
    return pixels[top : top + bucket[1], left : left + bucket[0]]


def jitter_color(pixels: UInt8[np.ndarray, "H W 3"], rng: random.Random) -> UInt8[np.ndarray, "H W 3"]:
    """Changes the colours of one image in three (color_aug).

    Half of these change in hue, by up to 8 of OpenCV's 180 degrees, and half in gamma (0.95 to 1.05). The reference
    raises values from 0 to 255 to the power, which darkens by up to a quarter or clips highlights. Here the values are
    from 0 to 1.
    """
    if rng.random() > 0.33:
        return pixels
    if rng.random() > 0.5:
        hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0] + rng.uniform(-8, 8)) % 180
        return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    table = (np.arange(256) / 255) ** rng.uniform(0.95, 1.05) * 255
    return np.rint(table).astype(np.uint8)[pixels]


def is_plain(data: bytes) -> bool:
    """True if pixels are shown as they are stored: not turned, transparent, 16-bit or with a colour profile."""
    with _open(io.BytesIO(data)) as image:
        profile = image.info.get("icc_profile")
        usual = not image.has_transparency_data and not image.mode.startswith("I")
        return usual and _orientation(image) <= 1 and not (profile and _transform(profile)[0])


def _orientation(image: Image.Image) -> int:
    # The base class's method, because that of PNG files decodes the whole image in search of a tag behind it. Browsers
    # do not look for that tag either.
    return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)


def _turned(pixels: UInt8[np.ndarray, "_ _ *channels"], orientation: int) -> UInt8[np.ndarray, "H W *channels"]:
    """Applies an EXIF orientation: 5 to 8 swap rows and columns, then some mirror horizontally or vertically."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _reduction(size: tuple[int, int], wanted: tuple[int, int] | None) -> int:
    """The largest of 8, 4, 2 and 1 by which `size` can be divided and still cover `wanted`."""
    if wanted is None:
        return 1
    return next((by for by in (8, 4, 2) if size[0] // by >= wanted[0] and size[1] // by >= wanted[1]), 1)


def _decode_jpeg(data: bytes, reduction: int) -> UInt8[np.ndarray, "H W 3"]:
    flags = _REDUCED[reduction] | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if pixels is None:
        raise OSError("broken JPEG data")
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)


def _flat(image: Image.Image, *, hides: bool) -> Image.Image:
    """The image with 8 bits and without transparency, as RGB, or as CMYK if it is CMYK."""
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.has_transparency_data and hides:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        ground.alpha_composite(image)
        image = ground
    return image if image.mode == "CMYK" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scales a 16-bit grey image to 8 bits, because Pillow would clip it at 255."""
    values = np.asarray(image).astype(np.int64)
    grey = Image.fromarray(((values.clip(0, 65535) + 128) // 257).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey


def _in_srgb(image: Image.Image, profile: bytes, *, grey: bool) -> Image.Image:
    """Converts by an ICC profile. A broken profile, or one for another kind of image, changes nothing."""
    transform, space = _transform(profile)
    if transform is None or (space == "CMYK") != (image.mode == "CMYK") or (space == "GRAY" and not grey):
        return image
    return transform.apply(image.getchannel(0) if space == "GRAY" else image)


@lru_cache(maxsize=64)
def _transform(profile: bytes) -> tuple[ImageCms.ImageCmsTransform | None, str]:
    """The conversion to sRGB, None if nothing has to be converted, and the colour space of the profile."""
    space = profile[16:20].decode("latin-1").strip()
    mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(space)
    if mode is None:
        return None, space
    # Relative colorimetric with black point compensation, as in Photoshop. No cache, because threads would share it.
    flags = ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.NOCACHE
    intent, target = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.createProfile("sRGB")
    try:
        transform = ImageCms.buildTransform(io.BytesIO(profile), target, mode, "RGB", intent, flags)
    except ImageCms.PyCMSError:
        return None, space
    if space == "RGB":
        levels = np.arange(0, 256, 15, dtype=np.uint8)
        colors = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
        moved = np.asarray(transform.apply(Image.fromarray(colors))).astype(np.int64) - colors
        if np.abs(moved).max() <= 1:
            return None, space
    return transform, space


def _reason(error: Exception, path: Location, data: bytes | None) -> str:
    if isinstance(error, Image.DecompressionBombError):
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        remedy = 'shrink it, or set on_bad_image = "skip"'
        return f"larger than the limit of {limit} pixels, above which Pillow opens no file: {remedy}"
    if isinstance(error, FileNotFoundError):
        return "a link to a missing file" if isinstance(path, Path) and path.is_symlink() else "no such file"
    if data == b"" or (data is None and isinstance(path, Path) and path.stat().st_size == 0):
        return "the file is empty"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image of a known format"
    return f"not readable as an image ({error or type(error).__name__})"
