"""Latents that the reference left: taken where they are what would be encoded, else rejected with the reason."""

import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_finetune.batch import LatentSize
from sdxl_finetune.data.index import Entry, Index, build_index
from sdxl_finetune.latents.npz import Rejected, find_npz, noted_crop, read_npz

SETTINGS = {"resolution": (64, 64), "min_bucket_reso": 32, "max_bucket_reso": 128, "bucket_reso_steps": 32}


def test_the_crop_is_noted_as_the_reference_does(golden) -> None:
    cases = golden("cache_format.json")["latents_on_disk"][0]
    for image in cases["images"].values():
        expected = cases["files"][image["npz"]]["crop_ltrb"]["value"]
        assert noted_crop(tuple(image["image_size"]), tuple(image["bucket_reso"])) == pytest.approx(expected)


def test_names(golden, tmp_path: Path, dataset, subset, write_images) -> None:
    for case in golden("cache_format.json")["latents_on_disk"][0]["images"].items():
        name, image = case
        shutil.rmtree(tmp_path / "images", ignore_errors=True)
        write_images(tmp_path / "images", {name: tuple(image["image_size"])})
        entry = build_index([dataset(subset(tmp_path / "images"), **SETTINGS)], tmp_path, on_bad_image="stop")[0]
        assert find_npz(entry) is None
        path = tmp_path / "images" / image["npz"]
        path.write_bytes(b"")
        assert find_npz(entry) == path
        old = (tmp_path / "images" / name).with_suffix(".npz")
        old.write_bytes(b"")
        assert find_npz(entry) == old, "as the reference, the older name first"


@pytest.fixture
def images(tmp_path: Path, dataset, subset, write_images, golden):
    """images(flip): the golden example, the two files of the reference beside images of their size."""
    golden("cache_format.json")
    write_images(tmp_path / "images", {"a.png": (64, 64), "b.png": (100, 60)})
    for path in (golden.path / "cache_example").glob("*_sdxl.npz"):
        shutil.copy(path, tmp_path / "images")

    def build(flip: bool = True) -> Index:
        subsets = subset(tmp_path / "images", flip_aug=flip)
        return build_index([dataset(subsets, **SETTINGS)], tmp_path / "cache", on_bad_image="stop")

    return build


def read(entry: Entry, flip: bool = True):
    return read_npz(entry, entry.path.read_bytes(), LatentSize().of(entry.bucket), [False, True] if flip else [False])


def test_the_references_files_are_read(images, golden) -> None:
    for row in range(2):
        entry = images()[row]
        taken = read(entry)
        (path,) = (golden.path / "cache_example").glob(f"{entry.path.stem}_0*.npz")
        stored = np.load(path)
        assert np.array_equal(taken[False], stored["latents"].astype(np.float16))
        assert np.array_equal(taken[True], stored["latents_flipped"].astype(np.float16))
        assert list(read(entry, flip=False)) == [False]


def change(path: Path, **arrays: object) -> None:
    """Rewrites an .npz file with arrays replaced, or left out where None."""
    kept = {**np.load(path), **arrays}
    np.savez(path, **{name: array for name, array in kept.items() if array is not None})


def rezip(path: Path, name: str, member: bytes) -> None:
    """Rewrites an .npz file with other bytes for one array, compressed."""
    with zipfile.ZipFile(path) as file:
        members = {info.filename: file.read(info) for info in file.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for each, data in (members | {f"{name}.npy": member}).items():
            file.writestr(each, data)


def rewrite(path: Path, **options: object) -> None:
    with Image.open(path) as image:
        copy = image.convert(options.pop("mode", "RGB"))
    copy.save(path, **options)
    os.utime(path, (1, 1))


def with_alpha(path: Path) -> None:
    with Image.open(path) as image:
        copy = image.convert("RGBA")
    copy.putpixel((0, 0), (1, 2, 3, 0))
    copy.save(path)
    os.utime(path, (1, 1))


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 3
    rewrite(path, exif=exif)


HALF = np.full((4, 8, 8), 1e6, np.float32)
CASES = {
    "damaged": lambda npz, image: npz.write_bytes(npz.read_bytes()[:900]),
    "damaged (": lambda npz, image: rezip(npz, "latents", b"\x93NUMPY\x01\x00\x09\x00{'descr':"),
    "far too large": lambda npz, image: rezip(npz, "latents", bytes(257 << 20)),
    "no latents of SDXL": lambda npz, image: change(npz, crop_ltrb=None),
    "made for another bucket": lambda npz, image: change(npz, latents=HALF[:, :4]),
    "made of an image of another size": lambda npz, image: change(npz, original_size=np.array([60, 100])),
    "made with another crop": lambda npz, image: change(npz, crop_ltrb=np.array([0, 11.0, 64, 50.4])),
    "older than the image": lambda npz, image: os.utime(npz, (5, 5)),
    "not finite": lambda npz, image: change(npz, latents=HALF),
    "mirrored": lambda npz, image: change(npz, latents_flipped=None),
    "of an image that": lambda npz, image: turned(image),
    "of an image that the": lambda npz, image: with_alpha(image),
    "of an image that the ": lambda npz, image: rewrite(image, mode="I;16"),
}


@pytest.mark.parametrize("reason", CASES)
def test_what_does_not_fit_is_rejected_with_the_reason(images, tmp_path: Path, reason: str) -> None:
    npz, image = tmp_path / "images" / "b_0100x0060_sdxl.npz", tmp_path / "images" / "b.png"
    CASES[reason](npz, image)
    taken = read(images()[1])
    assert (
        isinstance(taken, Rejected) and taken.path == npz and taken.reason.startswith(reason)
    ) or reason == "mirrored"
    assert reason != "mirrored" or ("mirrored" in taken.reason and isinstance(read(images()[1], flip=False), dict))
    assert isinstance(read(images()[0]), dict), "the other image's is not touched"


def test_they_take_the_place_of_encoding(images, tmp_path: Path, cache_latents) -> None:
    def encode(pixels: torch.Tensor, noise: torch.Tensor):
        return lambda: noise.half()

    index = images()
    (tmp_path / "images" / "b_0100x0060_sdxl.npz").write_bytes(b"PK")
    store, report, _ = cache_latents(index, encode, folder=tmp_path / "disk", use_npz=True)
    assert report.counts == {"taken from .npz files": 1, "encoded": 1}
    ((reason, paths),) = report.rejected.items()
    assert reason.startswith("damaged") and [path.name for path in paths] == ["b_0100x0060_sdxl.npz"]
    stored = np.load(tmp_path / "images" / "a_0064x0064_sdxl.npz")
    assert np.array_equal(store.read([0], [True])[0], stored["latents_flipped"].astype(np.float16))
    assert cache_latents(index, encode, folder=tmp_path / "disk", use_npz=True)[1].counts == {}
