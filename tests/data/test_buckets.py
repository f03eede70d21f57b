"""Buckets are the reference's, and crop offsets are those of the real crop."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_finetune.data.buckets import (
    Placement,
    crop_left_top,
    make_buckets,
    mirrored_left,
    natural_buckets,
    nearest_buckets,
    place_images,
)

MANAGERS = [
    "sdxl_1024_256_1536_s32",
    "sdxl_1024_512_2048_s64",
    "sdxl_1024_256_2048_s64",
    "nonsquare_768x512_256_1024_s64",
    "sdxl_832x1216_256_2048_s32",
    "noup_1024_s32",
    "noup_1024_s64",
    "noup_768x512_s64",
]
sides = st.integers(1, 4000)


def place(settings: dict, sizes: list) -> Placement:
    width, height = settings["resolution_wh"]
    if settings["bucket_no_upscale"]:
        return natural_buckets(np.array(sizes), width * height, settings["bucket_reso_steps"])
    limits = settings["min_bucket_reso"], settings["max_bucket_reso"], settings["bucket_reso_steps"]
    return nearest_buckets(np.array(sizes), make_buckets((width, height), *limits))


@pytest.mark.parametrize("name", MANAGERS)
def test_buckets_are_the_reference_s(golden, name: str) -> None:
    manager = next(manager for manager in golden("buckets.json")["managers"] if manager["name"] == name)
    settings = manager["settings"]
    if manager["make_buckets"]:
        limits = settings["min_bucket_reso"], settings["max_bucket_reso"], settings["bucket_reso_steps"]
        assert make_buckets(tuple(settings["resolution_wh"]), *limits).tolist() == manager["make_buckets"]
    cases = manager["cases"]
    placement = place(settings, [case[0] for case in cases])
    assert len(cases) == 300
    for number, case in enumerate(cases):
        if len(case) > 6 or 0 in case[1]:
            # differences.md: images too narrow for bucket_no_upscale. A ZeroDivisionError or an empty bucket there.
            assert not placement.fits[number]
            continue
        bucket, resized, trimmed = case[1], case[2], case[5]
        assert placement.bucket[number].tolist() == bucket
        assert placement.resized[number].tolist() == resized
        if trimmed is not None:
            assert list(crop_left_top(tuple(resized), tuple(bucket), None)) == trimmed


def test_original_and_target_size_are_the_reference_s_and_the_crop_is_real(golden) -> None:
    """differences.md: Crop coordinates. The reference gives the offset of a letterbox."""
    managers = {"32": "sdxl_1024_256_1536_s32", "64": "sdxl_1024_512_2048_s64", "no": "noup_1024_s32"}
    ours = {}
    for run in golden("buckets.json")["getitem_size_conditioning"]["runs"]:
        key = "no" if "no_upscale" in run["mode"] else run["mode"][-2:]
        manager = next(m for m in golden("buckets.json")["managers"] if m["name"] == managers[key])
        placement = place(manager["settings"], [row[0] for row in run["rows"]])
        for number, (image, bucket, flipped, original, reference, target) in enumerate(run["rows"]):
            resized = placement.resized[number].tolist()
            assert placement.bucket[number].tolist() == bucket and target == bucket[::-1]
            assert original == image[::-1]
            left, top = crop_left_top(tuple(resized), tuple(bucket), None)
            left = mirrored_left(left, resized[0], bucket[0]) if flipped else left
            assert 0 <= left <= resized[0] - bucket[0] and 0 <= top <= resized[1] - bucket[1]
            ours[(key, *image, flipped)] = ([top, left], reference)
    # Resized to 832x1248: 16 rows are cut off at the top. The reference says 10 columns at the left.
    assert ours["64", 1000, 1500, False] == ([16, 0], [0, 10])
    assert ours["32", 1000, 1500, False] == ([0, 0], [0, 0])
    assert ours["32", 1920, 1080, False] == ([0, 10], [6, 0])
    assert ours["32", 8000, 500, True] == ([0, 1280], [80, 0])
    assert ours["32", 1301, 877, True] == ([4, 0], [0, 7])


@given(st.lists(st.tuples(sides, sides), min_size=1, max_size=20), st.sampled_from([32, 64]), st.booleans())
def test_an_image_covers_its_bucket(sizes: list, steps: int, no_upscale: bool) -> None:
    settings = {"resolution_wh": (512, 384), "bucket_no_upscale": no_upscale, "bucket_reso_steps": steps}
    placement = place({**settings, "min_bucket_reso": 128, "max_bucket_reso": 1024}, sizes)
    for size, bucket, resized in zip(sizes, placement.bucket, placement.resized, strict=True):
        if not bucket.all():
            assert no_upscale
            continue
        assert (resized >= bucket).all() and (bucket % steps == 0).all()
        assert bucket.prod() <= 512 * 384 or no_upscale
        if no_upscale:
            assert (resized <= np.array(size) + 1).all() and (resized - bucket < steps).all()
        else:
            assert (resized == bucket).any(), "one side is covered exactly"


@given(sides, sides, st.data())
def test_mirrored_left_is_the_crop_of_the_mirrored_image(width: int, height: int, data: st.DataObject) -> None:
    """A mirrored crop is the crop of the mirrored image at mirrored_left."""
    bucket = data.draw(st.integers(1, width)), data.draw(st.integers(1, height))
    rng = random.Random(data.draw(st.integers(0, 9))) if data.draw(st.booleans()) else None
    left, top = crop_left_top((width, height), bucket, rng)
    columns = np.arange(width)
    mirrored = mirrored_left(left, width, bucket[0])
    cut = columns[left : left + bucket[0]][::-1]
    assert (columns[::-1][mirrored : mirrored + bucket[0]] == cut).all() and len(cut) == bucket[0]
    assert 0 <= top <= height - bucket[1]


def test_place_images_follows_the_dataset_s_bucket_options(dataset) -> None:
    sizes = np.array([[500, 200], [50, 50], [20, 400]])
    one_size = place_images(sizes, dataset(enable_bucket=False, resolution=(96, 64)))
    assert one_size.bucket.tolist() == [[96, 64]] * 3
    assert one_size.resized.tolist() == [[160, 64], [96, 96], [96, 1920]]
    # Limits that are no multiples of the step are widened; one below the step is the step.
    options = {"min_bucket_reso": 40, "max_bucket_reso": 100, "bucket_reso_steps": 32}
    assert place_images(sizes, dataset(**options)).bucket.tolist() == [[96, 32], [64, 64], [32, 128]]
    tiny = place_images(sizes, dataset(**{**options, "min_bucket_reso": 8}))
    assert tiny.bucket.tolist() == [[96, 32], [64, 64], [32, 128]]
    natural = place_images(sizes, dataset(bucket_no_upscale=True))
    assert natural.fits.tolist() == [True, True, False]
