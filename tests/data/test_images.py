"""Every kind of file gives the pixels that a viewer shows; what cannot be read is an ImageError with its name."""

import io
import random
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, ImageOps

from sdxl_finetune.data import images
from sdxl_finetune.data.images import (
    ImageError,
    image_extensions,
    image_size,
    load_image,
    resize_and_crop,
    size_of_start,
)

RED, GREEN, BLUE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128)


def close(left: np.ndarray, right: np.ndarray, tolerance: int = 0) -> bool:
    return left.shape == right.shape and np.abs(left.astype(int) - right.astype(int)).max() <= tolerance


def smooth(width: int, height: int, seed: int = 0) -> np.ndarray:
    """A picture without noise: what survives JPEG."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A minimal ICC profile (version 2.4; CMYK as a printer, with Lab as connection space)."""
    offset, table, data = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += struct.pack(">4sII", name, offset + len(data), len(content))
        data += content + b"\0" * (-len(content) % 4)
    kind, connection = (b"prtr", b"Lab ") if space == b"CMYK" else (b"mntr", b"XYZ ")
    head = struct.pack(">I4sI4s4s4s", 128 + len(table + data), b"none", 0x02400000, kind, space, connection)
    head += struct.pack(">6H4s", 2024, 1, 1, 0, 0, 0, b"acsp") + bytes(28) + _xyz(0.9642, 1.0, 0.8249)[8:]
    return head.ljust(128, b"\0") + table + data


def _xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


def _gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


def _text(text: bytes) -> bytes:
    return b"text\0\0\0\0" + text + b"\0"


def wide_gamut() -> bytes:
    """Adobe RGB (1998): its primaries adapted to D50, gamma 2.2."""
    white, curve = _xyz(0.9642, 1.0, 0.8249), _gamma(563 / 256)
    primaries = {
        b"rXYZ": _xyz(0.60974, 0.31111, 0.01947),
        b"gXYZ": _xyz(0.20528, 0.62567, 0.06087),
        b"bXYZ": _xyz(0.14919, 0.06322, 0.74457),
    }
    curves = {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    return profile(b"RGB ", {b"cprt": _text(b"none"), b"wtpt": white, **primaries, **curves})


def linear_grey() -> bytes:
    return profile(b"GRAY", {b"cprt": _text(b"none"), b"wtpt": _xyz(0.9642, 1.0, 0.8249), b"kTRC": _gamma(1.0)})


def pale_cmyk() -> bytes:
    """A press whose inks only darken: L = 100 x the white that the four inks leave, no colour."""
    identity = bytes(range(256))
    grid = bytearray()
    for node in range(16):
        inks = [(node >> shift) & 1 for shift in (3, 2, 1, 0)]
        grid += bytes([round(255 * (1 - sum(inks) / 4)), 128, 128])
    matrix = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + identity * 4 + bytes(grid) + identity * 3
    return profile(b"CMYK", {b"cprt": _text(b"none"), b"wtpt": _xyz(0.9642, 1.0, 0.8249), b"A2B0": table})


def png(width: int, height: int, depth: int, color: int, rows: bytes, **chunks: bytes) -> bytes:
    """A PNG written by hand, for what Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    extra = b"".join(chunk(name.encode(), data) for name, data in chunks.items())
    body = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + extra + body + chunk(b"IEND", b"")


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp", ".bmp", ".avif"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_orientation(tmp_path: Path, ending: str, orientation: int) -> None:
    if ending not in image_extensions() or (ending == ".bmp" and orientation > 1):
        pytest.skip("not in this format")
    path = tmp_path / f"picture{ending}"
    picture = Image.fromarray(smooth(40, 24))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {} if ending == ".bmp" else {"exif": exif}
    picture.save(path, quality=95, **options)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert close(load_image(path), expected)
    assert image_size(path) == (expected.shape[1], expected.shape[0])
    seen = np.asarray(picture) if orientation == 1 else expected
    assert close(load_image(path), seen, 40), "the picture itself, not only what Pillow says"


def test_orientation_turns_the_right_way(tmp_path: Path) -> None:
    """6: the camera was turned; the right-hand side of the stored picture is the bottom of what is seen."""
    stored = np.zeros((10, 20, 3), np.uint8)
    stored[:, 10:] = RED
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    pixels = load_image(tmp_path / "a.png")
    assert pixels.shape == (20, 10, 3)
    assert (pixels[10:] == RED).all() and (pixels[:10] == 0).all()


def test_transparency_is_white(tmp_path: Path) -> None:
    hidden = np.zeros((4, 6, 4), np.uint8)
    hidden[..., :3] = RED
    hidden[:, 3:, 3] = 255
    hidden[:, 2, 3] = 128
    for name in ("a.png", "a.webp"):
        Image.fromarray(hidden).save(tmp_path / name, lossless=True)
        pixels = load_image(tmp_path / name)
        assert (pixels[:, :2] == 255).all() and (pixels[:, 3:] == RED).all()
        assert close(pixels[:, 2], np.full((4, 3), (255, 127, 127)), 1)


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    indices = np.array([[0, 1, 2, 2]], np.uint8)
    picture = Image.frombytes("P", (4, 1), indices.tobytes())
    picture.putpalette([*RED, *GREEN, *BLUE])
    expected = np.array([[RED, GREEN, BLUE, BLUE]], np.uint8)
    picture.save(tmp_path / "plain.png")
    assert close(load_image(tmp_path / "plain.png"), expected)
    picture.save(tmp_path / "index.png", transparency=1)
    expected[0, 1] = 255
    assert close(load_image(tmp_path / "index.png"), expected)
    picture.save(tmp_path / "bytes.png", transparency=bytes([255, 0, 127]))
    expected[0, 2:] = (128, 128, 255)
    assert close(load_image(tmp_path / "bytes.png"), expected, 1)


def test_sixteen_bits(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32768, 65535, 300]], np.uint16)
    grey = np.array([[0, 1, 128, 255, 1]], np.uint8)[..., None].repeat(3, axis=2)
    Image.fromarray(values).save(tmp_path / "grey.png")
    assert close(load_image(tmp_path / "grey.png"), grey)
    row = b"\0" + values.astype(">u2").tobytes()
    (tmp_path / "key.png").write_bytes(png(5, 1, 16, 0, row, tRNS=struct.pack(">H", 257)))
    grey[0, 1] = 255
    assert close(load_image(tmp_path / "key.png"), grey)
    color = np.array([[[65535, 0, 0], [257 * 7, 257 * 99, 65535]]], ">u2")
    (tmp_path / "color.png").write_bytes(png(2, 1, 16, 2, b"\0" + color.tobytes()))
    assert close(load_image(tmp_path / "color.png"), np.array([[RED, (7, 99, 255)]], np.uint8))
    key = struct.pack(">3H", 65535, 0, 0)
    (tmp_path / "colorkey.png").write_bytes(png(2, 1, 16, 2, b"\0" + color.tobytes(), tRNS=key))
    assert close(load_image(tmp_path / "colorkey.png"), np.array([[(255,) * 3, (7, 99, 255)]], np.uint8))
    with_alpha = np.array([[[65535, 0, 0, 0], [65535, 0, 0, 65535]]], ">u2")
    (tmp_path / "alpha.png").write_bytes(png(2, 1, 16, 6, b"\0" + with_alpha.tobytes()))
    assert close(load_image(tmp_path / "alpha.png"), np.array([[(255, 255, 255), RED]], np.uint8))


def test_grey(tmp_path: Path) -> None:
    Image.new("L", (3, 2), 77).save(tmp_path / "grey.png")
    Image.new("L", (3, 2), 77).save(tmp_path / "grey.jpg")
    Image.new("1", (3, 2), 1).save(tmp_path / "bits.png")
    for name, value in (("grey.png", 77), ("grey.jpg", 77), ("bits.png", 255)):
        assert (load_image(tmp_path / name) == value).all()
    Image.new("LA", (3, 2), (0, 0)).save(tmp_path / "alpha.png")
    assert (load_image(tmp_path / "alpha.png") == 255).all()
    Image.new("L", (3, 2), 77).save(tmp_path / "key.png", transparency=77)
    assert (load_image(tmp_path / "key.png") == 255).all()
    Image.new("L", (3, 2), 55).save(tmp_path / "linear.png", icc_profile=linear_grey())
    assert close(load_image(tmp_path / "linear.png"), np.full((2, 3, 3), 128), 2), "55/255 of light is sRGB 128"


def test_wide_gamut_profile(tmp_path: Path) -> None:
    """Adobe RGB's numbers for a colour differ from sRGB's; the reference trains on the wrong colour."""
    picture = Image.new("RGB", (16, 16), (100, 150, 80))
    for name in ("a.png", "a.jpg", "a.webp"):
        picture.save(tmp_path / name, icc_profile=wide_gamut(), quality=100, lossless=True)
        assert close(load_image(tmp_path / name), np.full((16, 16, 3), (66, 151, 75)), 2)
    alpha = picture.copy()
    alpha.putalpha(0)
    alpha.save(tmp_path / "alpha.png", icc_profile=wide_gamut())
    assert (load_image(tmp_path / "alpha.png") == 255).all()


@pytest.mark.parametrize("name", ["srgb", "broken", "grey"])
def test_profiles_that_change_nothing(tmp_path: Path, name: str) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    icc = {"srgb": srgb, "broken": wide_gamut()[:150], "grey": linear_grey()}[name]
    picture = smooth(16, 16)
    Image.fromarray(picture).save(tmp_path / "a.png", icc_profile=icc)
    assert close(load_image(tmp_path / "a.png"), picture)


def test_cmyk(tmp_path: Path) -> None:
    picture = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    picture.save(tmp_path / "plain.jpg", quality=100)
    assert close(load_image(tmp_path / "plain.jpg"), np.full((16, 16, 3), RED), 3)
    picture.save(tmp_path / "press.jpg", quality=100, icc_profile=pale_cmyk())
    pixels = load_image(tmp_path / "press.jpg")
    # Two of four inks: L = 50, of which black point compensation leaves at most a lighter grey.
    assert np.ptp(pixels.astype(int), axis=2).max() <= 2 and 100 <= pixels.min() <= pixels.max() <= 130


@pytest.mark.parametrize("orientation", [1, 6])
def test_jpeg_at_reduced_scale(tmp_path: Path, orientation: int) -> None:
    noise = np.random.default_rng(0).integers(-8, 9, (600, 800, 3))
    picture = (smooth(800, 600).astype(int) + noise).clip(0, 255).astype(np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(picture).save(tmp_path / "a.jpg", quality=92, exif=exif)
    whole = load_image(tmp_path / "a.jpg")
    resized = (300, 225) if orientation == 1 else (225, 300)
    reduced = load_image(tmp_path / "a.jpg", at_least=resized)
    assert max(reduced.shape) == 400
    assert close(load_image(tmp_path / "a.jpg", at_least=(601, 601)), whole)
    left, right = (resize_and_crop(pixels, resized, (0, 0), resized) for pixels in (whole, reduced))
    assert np.abs(left.astype(int) - right.astype(int)).mean() < 1
    assert (
        len(np.unique(load_image(tmp_path / "a.jpg", at_least=(40, 40)).shape))
        and image_size(tmp_path / "a.jpg") == whole.shape[1::-1]
    )


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    Image.fromarray(smooth(200, 200)).save(tmp_path / "whole.jpg")
    Image.fromarray(smooth(200, 200)).save(tmp_path / "whole.png")
    for name in ("jpg", "png"):
        data = (tmp_path / f"whole.{name}").read_bytes()
        (tmp_path / f"half.{name}").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not an image")
    reasons = {
        "half.jpg": "truncated",
        "half.png": "not readable",
        "empty.png": "empty",
        "text.png": "not an image",
        "none.png": "no such file",
    }
    for name, reason in reasons.items():
        with pytest.raises(ImageError) as caught:
            load_image(tmp_path / name)
        assert caught.value.path == str(tmp_path / name) and reason in caught.value.reason
    for name in ("empty.png", "text.png", "none.png"):
        with pytest.raises(ImageError):
            image_size(tmp_path / name)


def test_trailing_bytes_are_no_fault(tmp_path: Path) -> None:
    Image.fromarray(smooth(64, 64)).save(tmp_path / "a.jpg")
    expected = load_image(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_bytes((tmp_path / "a.jpg").read_bytes() + b"\0" * 100)
    assert close(load_image(tmp_path / "b.jpg"), expected)


def test_resize_and_crop_golden(golden) -> None:
    from sdxl_finetune.data.buckets import crop_left_top

    for case in golden("buckets.json")["resize_and_trim_real"]:
        width, height = case["image"]
        pixels = np.random.RandomState(1).randint(0, 256, (height, width, 3), np.uint8)
        resized, bucket = tuple(case["resized"]), tuple(case["bucket"])
        rng = random.Random(case["python_random_seed"]) if case["random_crop"] else None
        left_top = crop_left_top(resized, bucket, rng)
        out = resize_and_crop(pixels, resized, left_top, bucket, case["resize_interpolation"])
        assert list(out.shape) == case["out_shape_hwc"]
        if case["random_crop"]:
            assert out[0, 0].tolist() == case["first_pixel"] and out.sum() == case["pixels_out_sum"]
        else:
            assert close(out, np.array(case["pixels_out_hwc"]), 1)


def test_resize_choice_golden(golden) -> None:
    cases = golden("buckets.json")["resize_image_choice"]["cases"]
    for case in cases:
        (width, height), to = case["from"], tuple(case["to"])
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        name = {"cv2": "area", "pil": "lanczos"}[case["used"][0]]
        assert close(resize_and_crop(pixels, to, (0, 0), to), resize_and_crop(pixels, to, (0, 0), to, name))


def test_color_jitter_is_weak() -> None:
    """differences.md: colour augmentation. The reference's gamma darkens by up to a quarter."""
    pixels = smooth(32, 32)
    changes = []
    for seed in range(200):
        changed = images.jitter_color(pixels.copy(), random.Random(seed))
        changes.append(np.abs(changed.astype(int) - pixels).mean())
    assert 0.2 < np.mean(np.array(changes) > 0) < 0.45
    assert max(changes) < 25
    assert (images.jitter_color(np.full((2, 2, 3), 255, np.uint8), random.Random(1)) == 255).all()


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("orientation", [None, 6])
def test_the_start_of_a_webp_file_says_its_size(mode: str, lossless: bool, orientation: int | None) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (97, 155, len(mode)), np.uint8)
    exif = Image.Exif()
    if orientation:
        exif[ExifTags.Base.Orientation] = orientation
    file = io.BytesIO()
    Image.fromarray(noise, mode).save(file, "WEBP", lossless=lossless, exif=exif if orientation else b"")
    whole = image_size(Path("x.webp"), file.getvalue())
    assert whole == ((97, 155) if orientation else (155, 97))
    start = size_of_start(Path("x.webp"), file.getvalue()[:100])
    assert start == (None if orientation else whole), "a turn is written at the end of the file"
    assert size_of_start(Path("x.webp"), file.getvalue()[:20]) is None
