"""The index holds what is in the folders, in order, or says what is wrong with every file at once."""

import json
import logging
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from sdxl_finetune.data import scan as scan_module
from sdxl_finetune.data.batch_plan import build_plan
from sdxl_finetune.data.images import ImageError
from sdxl_finetune.data.index import build_index
from sdxl_finetune.data.placement import regularized_repeats
from sdxl_finetune.errors import UserError


def test_rows(tmp_path: Path, subset, dataset, write_images) -> None:
    write_images(tmp_path / "a", {"10.PNG": (64, 64), "2.jpg": (160, 64), "b é.webp": (40, 80)})
    (tmp_path / "a" / "2.txt").write_text("a cat, sitting", encoding="utf-8")
    (tmp_path / "a" / "notes.md").write_text("not an image")
    (tmp_path / "a" / "folder.png").mkdir()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    (tmp_path / "b").mkdir()
    Image.new("RGB", (100, 50)).save(tmp_path / "b" / "turned.jpg", exif=exif)
    (tmp_path / "b" / "turned.txt").write_text("")
    first = subset(tmp_path / "a", num_repeats=3, class_tokens="cls", caption_extension=".txt", flip_aug=True)
    second = subset(tmp_path / "b", caption_extension=".txt")
    built = build_index([dataset(first, second)], tmp_path / "cache", on_bad_image="stop")
    for index in (built, pickle.loads(pickle.dumps(built))):
        entries = [index[row] for row in range(len(index))]
        assert [entry.path.name for entry in entries] == ["10.PNG", "2.jpg", "b é.webp", "turned.jpg"]
        assert [entry.caption for entry in entries] == ["cls", "a cat, sitting", "cls", ""]
        assert [entry.size for entry in entries] == [(64, 64), (160, 64), (40, 80), (50, 100)]
        assert [(entry.bucket.width, entry.bucket.height) for entry in entries] == [
            (64, 64), (96, 32), (32, 96), (32, 96),
        ]  # fmt: skip
        assert [entry.resized for entry in entries] == [(64, 64), (96, 38), (48, 96), (48, 96)]
        assert index.repeats.tolist() == [3, 3, 3, 1] and index.flips.tolist() == [True, True, True, False]
        assert entries[3].subset == second
    assert len(pickle.dumps(built)) < 3000
    assert built.describe().splitlines() == [
        "4 images, 10 with repeats, in 3 buckets; 1 enlarged, 0 skipped",
        "bucket 32x96: 2 images, 4 with repeats",
        "bucket 64x64: 1 image, 3 with repeats",
        "bucket 96x32: 1 image, 3 with repeats",
    ]
    assert built[3].load((0, 0)).shape == (96, 32, 3)


def test_the_same_content_is_the_same_file(tmp_path: Path, subset, dataset, write_images) -> None:
    for folder in ("here", "there"):
        write_images(tmp_path / folder, {"a.png": (64, 64), "b.png": (90, 64)})
    cache = tmp_path / "cache"
    here, again, there = (
        build_index([dataset(subset(tmp_path / folder))], cache, on_bad_image="stop")
        for folder in ("here", "here", "there")
    )
    assert here.path == again.path and len(list(cache.glob("*.index"))) == 2
    assert here.facts() == again.facts() == there.facts() and here[0].path != there[0].path
    (tmp_path / "there" / "a.caption").write_text("changed")
    changed = build_index([dataset(subset(tmp_path / "there"))], cache, on_bad_image="stop")
    differing = {fact for fact, value in changed.facts().items() if value != here.facts()[fact]}
    assert differing == {"captions"}
    less = here.without([0]).facts()
    assert {fact for fact, value in less.items() if value != here.facts()[fact]} == {
        "images", "images with repeats", "repeats",
    }  # fmt: skip


def break_files(folder: Path) -> None:
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("no image")
    (folder / "good.caption").write_bytes(b"\xff\xfe\xff")


@pytest.mark.parametrize("in_process", [0, 100])
def test_all_bad_files_are_named(
    tmp_path: Path, subset, dataset, write_images, caplog, monkeypatch, in_process: int
) -> None:
    monkeypatch.setattr(scan_module, "IN_PROCESS", in_process)
    write_images(tmp_path / "a", {"good.png": (64, 64), "fine.png": (64, 64)})
    write_images(tmp_path / "b", {"sliver.png": (9000, 1), "fine.png": (64, 64)})
    break_files(tmp_path / "a")
    datasets = [
        dataset(subset(tmp_path / "a")),
        dataset(subset(tmp_path / "b"), resolution=(512, 512), min_bucket_reso=256, max_bucket_reso=1024),
    ]
    with pytest.raises(UserError) as caught:
        build_index(datasets, tmp_path / "cache", on_bad_image="stop")
    assert 'on_bad_image = "skip" would train without' in caplog.text
    caplog.clear()
    files = [Path(problem.file).name for problem in caught.value.problems]
    assert files == ["empty.png", "good.caption", "text.jpg", "sliver.png"]
    assert not list((tmp_path / "cache").glob("*.index"))
    with caplog.at_level(logging.WARNING):
        index = build_index(datasets, tmp_path / "cache", on_bad_image="skip")
    assert [index[row].path for row in range(len(index))] == [tmp_path / "a/fine.png", tmp_path / "b/fine.png"]
    skipped, uncaptioned = (record.getMessage() for record in caplog.records)
    assert all(name in skipped for name in files)
    assert uncaptioned == (
        "2 of 2 images have no caption, or an empty one, and are trained without a text, for example"
        f" {tmp_path}/a/fine.png, {tmp_path}/b/fine.png: write files as cat.caption for cat.png, or set"
        " caption_extension to the ending of yours"
    )
    assert "4 skipped" in index.describe()
    assert index[1].bucket.dataset == 1


def test_nothing_to_train_on(tmp_path: Path, subset, dataset, write_images) -> None:
    (tmp_path / "empty").mkdir()
    folders = [subset(tmp_path / "empty"), subset(tmp_path / "missing")]
    with pytest.raises(UserError) as caught:
        build_index([dataset(*folders)], tmp_path / "cache", on_bad_image="skip")
    assert [Path(problem.file).name for problem in caught.value.problems] == ["empty", "missing"]
    write_images(tmp_path / "a", {"a.png": (64, 64)})
    index = build_index([dataset(subset(tmp_path / "a"))], tmp_path / "cache", on_bad_image="stop")
    with pytest.raises(UserError, match="no image is left"):
        index.without([0])
    break_files(tmp_path / "empty")
    with pytest.raises(UserError, match="no image is left"):
        build_index([dataset(subset(tmp_path / "empty"))], tmp_path / "cache", on_bad_image="skip")


def test_no_upscale_too_small(tmp_path: Path, subset, dataset, write_images) -> None:
    """differences.md: images too narrow for bucket_no_upscale."""
    write_images(tmp_path / "a", {"a.png": (64, 64), "small.png": (31, 200)})
    with pytest.raises(UserError, match=r"small\.png: 31x200: its shorter side is below"):
        build_index([dataset(subset(tmp_path / "a"), bucket_no_upscale=True)], tmp_path / "cache", on_bad_image="stop")


def test_golden_datasets(tmp_path: Path, golden, subset, dataset) -> None:
    """Buckets, resized sizes, repeats and the number of batches of the reference's own runs."""
    data = golden("batches.json")
    folders = {name: part["images"] for name, part in data["dreambooth"]["subsets"].items()}
    folders["R"] = data["dreambooth_with_regularisation"]["subsets"]["R"]["images"]
    for folder, images in folders.items():
        (tmp_path / folder).mkdir()
        for name, size in images.items():
            Image.new("1", size).save(tmp_path / folder / name)
    fine_tuning = data["fine_tuning"]
    (tmp_path / "F").mkdir()
    for name, size in fine_tuning["images"].items():
        Image.new("1", size).save(tmp_path / "F" / name)
    (tmp_path / "F.json").write_text(json.dumps(fine_tuning["metadata"]))
    subsets = {
        "F": subset(tmp_path / "F", metadata_file=tmp_path / "F.json"),
        "A": subset(tmp_path / "A", num_repeats=2),
        "B": subset(tmp_path / "B"),
        "R": subset(tmp_path / "R", num_repeats=3, is_reg=True, class_tokens="cls"),
    }
    options = {"resolution": (1024, 1024), "min_bucket_reso": 256, "max_bucket_reso": 1536, "batch_size": 5}
    runs = [("dreambooth", "AB", {}), ("dreambooth_with_regularisation", "ABR", {})]
    runs += [("dreambooth_no_upscale", "AB", {"bucket_no_upscale": True}), ("fine_tuning", "F", {})]
    for name, used, more in runs:
        expected = data[name]["datasets"][0]
        built = dataset(*(subsets[key] for key in used), **options, **more)
        index = build_index([built], tmp_path / "cache", on_bad_image="stop")
        plan = build_plan(index, ranks=1, accumulation=1, seed=0)
        assert plan.batches_per_epoch == expected["length_batches"]
        images = [index[row] for row in range(len(index))]
        buckets = {entry.path.name: [entry.bucket.width, entry.bucket.height] for entry in images}
        assert buckets == expected.get("bucket_reso_per_image", buckets)
        resized = {entry.path.name: list(entry.resized) for entry in images}
        assert resized == expected.get("resized_size_per_image", resized)
        repeats = {entry.path.name: index.repeats[row] for row, entry in enumerate(images)}
        assert repeats == expected.get("num_repeats", repeats)
        counts = np.bincount(index.bucket, index.repeats).astype(int).tolist()
        assert counts == [bucket["count"] for bucket in expected["bucket_info"]["buckets"].values()]
    captions = {entry.path.name: entry.caption for entry in images}
    assert captions == fine_tuning["captions"]


def test_golden_two_datasets(tmp_path: Path, golden, subset, dataset) -> None:
    """Each has its resolution and batch size, and no batch is of both."""
    data = golden("batches.json")
    for folder in "AB":
        (tmp_path / folder).mkdir()
        for name, size in data["dreambooth"]["subsets"][folder]["images"].items():
            Image.new("1", size).save(tmp_path / folder / name)
    first = dataset(
        subset(tmp_path / "A"), resolution=(1024, 1024), min_bucket_reso=256, max_bucket_reso=1536, batch_size=5
    )
    second = dataset(
        subset(tmp_path / "B"), resolution=(512, 512), min_bucket_reso=256, max_bucket_reso=1024, batch_size=2
    )
    index = build_index([first, second], tmp_path / "cache", on_bad_image="stop")
    expected = data["two_datasets"]
    counts = np.bincount(index.bucket, index.repeats).astype(int).tolist()
    wanted = [bucket for part in expected["datasets"] for bucket in part["bucket_info"]["buckets"].values()]
    assert counts == [bucket["count"] for bucket in wanted]
    assert [[one.width, one.height] for one in index.buckets] == [bucket["resolution"] for bucket in wanted]
    plan = build_plan(index, ranks=1, accumulation=1, seed=0)
    assert plan.batches_per_epoch == sum(expected["lengths"])
    for batch in plan.micro_batches(0, plan.steps_per_epoch):
        (owner,) = {index[row].bucket.dataset for row in batch.rows.tolist()}
        assert len(batch.rows) <= (5, 2)[owner]


@pytest.mark.parametrize(
    ("own", "wanted", "expected"),
    [([3] * 5, 60, [12] * 5), ([1, 1, 1], 4, [2, 1, 1]), ([2, 2, 2], 3, [2, 2, 0]), ([2, 1], 0, [0, 0])],
)
def test_regularization_images(own: list[int], wanted: int, expected: list[int]) -> None:
    repeats = np.array([wanted, *own], np.int64)
    is_regularization = np.array([False] + [True] * len(own))
    assert regularized_repeats(repeats, is_regularization).tolist() == [wanted, *expected]


def metadata(tmp_path: Path, subset, entries: dict, **options: object):
    (tmp_path / "meta.json").write_text(json.dumps(entries))
    return subset(tmp_path / "a", metadata_file=tmp_path / "meta.json", **options)


def test_buckets_of_a_metadata_file_take_the_place_of_the_resolution(
    tmp_path: Path, subset, dataset, write_images
) -> None:
    write_images(tmp_path / "a", {"a.png": (100, 100), "b.png": (200, 100), "c.png": (30, 90)})
    sizes = {"a.png": [96, 96], "b.png": [128, 64], "c.png": [64, 128]}
    rules = metadata(
        tmp_path, subset, {name: {"caption": "x", "train_resolution": size} for name, size in sizes.items()}
    )
    index = build_index([dataset(rules, resolution=None)], tmp_path / "cache", on_bad_image="stop")
    entries = [index[row] for row in range(3)]
    assert {one.path.name: [one.bucket.width, one.bucket.height] for one in entries} == sizes
    assert [one.resized for one in entries] == [(96, 96), (128, 64), (64, 192)]
    assert entries[2].load((0, 32)).shape == (128, 64, 3)


def test_a_resolution_wins_over_the_buckets_of_a_metadata_file(
    tmp_path: Path, subset, dataset, write_images, caplog
) -> None:
    write_images(tmp_path / "a", {"a.png": (100, 100), "b.png": (200, 100)})
    entries = {"a.png": {"train_resolution": [96, 96]}, "b.png": {"train_resolution": [128, 64]}}
    rules = metadata(tmp_path, subset, entries, class_tokens="x")
    squares = build_index([dataset(rules, enable_bucket=False)], tmp_path / "cache", on_bad_image="stop")
    assert [(one.width, one.height) for one in squares.buckets] == [(64, 64)]
    assert "2 sizes as train_resolution, but all images are cut to 64x64" in caplog.text
    caplog.clear()
    build_index([dataset(rules)], tmp_path / "cache", on_bad_image="stop")
    entries["b.png"] = entries["a.png"]
    metadata(tmp_path, subset, entries)
    build_index([dataset(rules, enable_bucket=False)], tmp_path / "cache", on_bad_image="stop")
    assert "train_resolution" not in caplog.text


@pytest.mark.parametrize("size", [None, [60, 64]])
def test_missing_buckets_of_a_metadata_file_are_counted(tmp_path: Path, subset, dataset, write_images, size) -> None:
    write_images(tmp_path / "a", {"a.png": (100, 100), "b.png": (200, 100)})
    rules = metadata(tmp_path, subset, {"a.png": {"train_resolution": [96, 96]}, "b.png": {"train_resolution": size}})
    with pytest.raises(UserError, match="resolution: is needed, because 1 of 2 images have no train_resolution"):
        build_index([dataset(rules, resolution=None)], tmp_path / "cache", on_bad_image="skip")


def test_a_wrong_size_in_a_metadata_file_is_found_when_the_image_is_read(
    tmp_path: Path, subset, dataset, write_images
) -> None:
    write_images(tmp_path / "a", {"a.png": (100, 64)})
    rules = metadata(tmp_path, subset, {"a.png": {"image_size": [64, 100]}})
    index = build_index([dataset(rules)], tmp_path / "cache", on_bad_image="stop")
    assert index[0].size == (64, 100)
    with pytest.raises(ImageError) as caught:
        index[0].load((0, 0))
    assert "its size is 100x64, not 64x100 as noted for it: correct image_size" in caught.value.reason


def test_an_image_above_the_pixel_limit_names_the_limit(tmp_path: Path, subset, dataset, write_images) -> None:
    write_images(tmp_path / "a", {"a.png": (64, 64)})
    header = b"IHDR" + struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">II", zlib.crc32(header), 9) + b"IDAT"
    (tmp_path / "a" / "huge.png").write_bytes(png)
    with pytest.raises(UserError, match=r"huge\.png: larger than the limit of 178956970 pixels.*on_bad_image"):
        build_index([dataset(subset(tmp_path / "a"))], tmp_path / "cache", on_bad_image="stop")
