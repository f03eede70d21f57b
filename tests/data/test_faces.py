"""Crops around faces: the reference's rule, and the place that the model is told."""

import logging
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from sdxl_finetune.batch import Position
from sdxl_finetune.data.faces import Face, draw_face_crop, face_in_name
from sdxl_finetune.data.index import build_index
from sdxl_finetune.data.views import draw_view

SIDES = st.tuples(st.integers(64, 3000), st.integers(64, 3000))


@pytest.mark.parametrize(
    ("stem", "face"),
    [
        ("cat_120_80_40_55", Face((120, 80), 55)),
        ("a_b_c_1_2_3_4", Face((1, 2), 4)),
        ("cat_120_80_40", None),
        ("_1_2_3_4", None),
        ("cat_0_80_40_55", None),
        ("cat_120_80_0_0", None),
        ("one_two_three_four_five", None),
    ],
)
def test_a_face_is_read_from_the_file_name(stem: str, face: Face | None) -> None:
    """The reference fails on words in place of the numbers."""
    assert face_in_name(stem) == face


@given(
    SIDES,
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
    st.integers(1, 2000),
    st.sampled_from([(64, 64), (832, 1216), (512, 384)]),
    st.tuples(st.floats(0.5, 3), st.floats(1, 3)),
    st.booleans(),
    st.integers(0, 99),
)
def test_the_crop_lies_in_the_image_and_has_the_wanted_size(
    size, place, face_size, bucket, crop_range, anywhere, seed
) -> None:
    low, high = crop_range[0], crop_range[0] * crop_range[1]
    face = Face((int(place[0] * size[0]), int(place[1] * size[1])), face_size)
    resized, (left, top) = draw_face_crop(size, face, bucket, (low, high), random.Random(seed), anywhere=anywhere)
    assert 0 <= left <= resized[0] - bucket[0] and 0 <= top <= resized[1] - bucket[1]
    scales = [after / before for after, before in zip(resized, size, strict=True)]
    assert abs(scales[0] - scales[1]) * min(size) <= 1.001, "the proportions stay"
    covering = max(bucket[0] / size[0], bucket[1] / size[1])
    if covering >= 1:
        assert resized == (max(bucket[0], int(size[0] * covering + 0.5)), max(bucket[1], int(size[1] * covering + 0.5)))
        return
    assert max(scales) <= 1 + 1 / min(size), "an image that is large enough is never enlarged"
    share = min(bucket) / (face.size * max(scales))
    assume(covering < min(bucket) / (face.size * high) and min(bucket) / (face.size * low) < 1)
    assert low * 0.97 <= share <= high * 1.03


def test_the_face_stands_in_the_middle_unless_the_crop_is_random() -> None:
    """With one value for both ends of the range nothing is drawn, as in the reference."""
    size, face, bucket = (2000, 3000), Face((900, 1400), 200), (512, 512)
    fixed = {draw_face_crop(size, face, bucket, (2.0, 2.0), random.Random(seed), anywhere=False) for seed in range(9)}
    assert fixed == {((2000, 3000), (900 - 256, 1400 - 256))}, "512 / (2 x 200) would enlarge the image"
    moved = [draw_face_crop(size, face, bucket, (3.0, 9.0), random.Random(seed), anywhere=False) for seed in range(50)]
    centers = [(left + 256 - 900 * w / 2000, top + 256 - 1400 * h / 3000) for (w, h), (left, top) in moved]
    assert 1 < np.abs(centers).max() <= 200 // 20 + 1.5
    away = [draw_face_crop(size, face, bucket, (3.0, 3.0), random.Random(seed), anywhere=True) for seed in range(50)]
    assert np.std([left for _, (left, _) in away]) > 100


def test_a_view_is_the_crop_that_the_model_is_told(tmp_path: Path, subset, dataset, caplog) -> None:
    """The picture's colours are the coordinates of its pixels, so that the crop can be read off the pixels."""
    folder = tmp_path / "images"
    folder.mkdir()
    row, column = np.mgrid[0:256, 0:256].astype(np.uint8)
    picture = Image.fromarray(np.stack([column, row, row * 0], -1))
    for name in ("girl_150_90_40_50.png", "other.png"):
        picture.save(folder / name)
    own = subset(folder, face_crop_aug_range=(1.2, 3.0), flip_aug=True)
    with caplog.at_level(logging.WARNING):
        index = build_index([dataset(own)], tmp_path / "cache", "stop")
    assert "1 of 2 images have no face in their names" in caplog.text
    seen = set()
    for step in range(40):
        view = draw_view(index[0], 3, Position(epoch=0, step=step, micro_batch=0, micro_batches_in_step=1), 0)
        pixels = view.load_pixels()
        assert pixels.shape == (64, 64, 3)
        top, left = view.crop_top_left
        scale = view.resized[0] / 256
        first = pixels[0, -1 if view.mirrored else 0]
        told_left = view.resized[0] - 64 - left if view.mirrored else left
        assert abs(first[0] - told_left / scale) <= 3 and abs(first[1] - top / scale) <= 3
        face = (150 * scale - told_left, 90 * scale - top)
        assert all(20 < at < 44 for at in face), "the face is in the middle"
        seen.add((view.resized, view.mirrored))
    assert len(seen) > 20 and {mirrored for _, mirrored in seen} == {True, False}
    plain = draw_view(index[1], 3, Position(epoch=0, step=0, micro_batch=0, micro_batches_in_step=1), 0)
    assert plain.resized == index[1].resized == (64, 64)
