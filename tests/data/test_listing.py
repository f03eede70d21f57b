"""What lies in a folder beside its images is counted, and a remark says what it means."""

import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from sdxl_finetune.config import Config, load_datasets
from sdxl_finetune.data.index import build_index
from sdxl_finetune.data.listing import list_all
from sdxl_finetune.data.scan import scan
from sdxl_finetune.errors import UserError


@pytest.fixture
def folder(tmp_path: Path, write_images) -> Path:
    write_images(tmp_path / "images", {f"{number}.png": (64, 64) for number in range(3)})
    return tmp_path / "images"


def names_of(subset, tmp_path: Path) -> list[str]:
    table, problems = scan([subset], tmp_path / "cache")
    assert not problems
    return [name.decode() for name in table["name"].to_pylist()]


def test_files_whose_names_begin_with_a_dot_are_no_images(folder: Path, subset, tmp_path: Path) -> None:
    (folder / "._0.png").write_bytes(b"\0\5\x16\7")
    (folder / ".DS_Store").write_bytes(b"")
    (tmp_path / "images" / ".png").write_bytes(b"")
    assert names_of(subset(folder), tmp_path) == ["0.png", "1.png", "2.png"]
    only_hidden = tmp_path / "hidden"
    only_hidden.mkdir()
    (only_hidden / "._0.png").write_bytes(b"\0\5\x16\7")
    with pytest.raises(UserError, match="no images to train on"):
        load_datasets(Config(train_data_dir=str(only_hidden), resolution=64))


def test_a_link_to_a_missing_file_is_a_bad_image(folder: Path, subset, dataset, tmp_path: Path) -> None:
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "linked.png").symlink_to(folder / "0.png")
    (folder / "directory.png").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"gone\.png: a link to a missing file") as caught:
        build_index([dataset(subset(folder))], tmp_path / "cache", on_bad_image="stop")
    assert len(caught.value.problems) == 1
    index = build_index([dataset(subset(folder))], tmp_path / "cache", on_bad_image="skip")
    assert [index[row].path.name for row in range(len(index))] == ["0.png", "1.png", "2.png", "linked.png"]


def test_a_folder_of_nothing_but_dangling_links_names_them(subset, dataset, tmp_path: Path) -> None:
    folder = tmp_path / "1_links"
    folder.mkdir()
    (folder / "a.png").symlink_to("nowhere.png")
    (found,) = load_datasets(Config(train_data_dir=str(tmp_path), resolution=64))
    with pytest.raises(UserError, match=r"a\.png: a link to a missing file"):
        build_index([found], tmp_path / "cache", on_bad_image="stop")


def test_pictures_that_are_not_read_are_counted_by_ending(folder: Path, subset, tmp_path: Path, caplog) -> None:
    for name in ("a.gif", "b.GIF", "c.tif", "d.jfif", "e.heic", "f.jxl", "._g.gif"):
        (folder / name).write_bytes(b"x")
    (folder / "notes.md").write_text("no picture")
    assert len(names_of(subset(folder), tmp_path)) == 3
    (message,) = [record.getMessage() for record in caplog.records if ".gif" in record.getMessage()]
    assert message.startswith(f"{folder}: 2 .gif files are not read: convert them to .png or .jpg; 1 .heic file is")
    assert "1 .jfif file is not read: rename them to .jpg" in message
    assert "1 .jxl file is not read: pip install pillow-jxl-plugin" in message and ".md" not in message


def test_a_folder_without_readable_pictures_says_what_it_holds(subset, tmp_path: Path) -> None:
    for name in ("1_a/a.jxl", "1_a/b.jxl", "2_b/c.gif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (found,) = load_datasets(Config(train_data_dir=str(tmp_path), resolution=64))
    with pytest.raises(UserError, match=r"2 \.jxl files are not read: pip install pillow-jxl-plugin"):
        scan(found.subsets, tmp_path / "cache")
    with pytest.raises(UserError, match=r"it contains no folders, and 1 \.gif file is not read: convert them"):
        load_datasets(Config(train_data_dir=str(tmp_path / "2_b"), resolution=64))


def test_avif_images_are_read_alone_in_a_folder(subset, dataset, tmp_path: Path) -> None:
    if ".avif" not in Image.registered_extensions():
        pytest.skip("Pillow was built without AVIF")
    folder = tmp_path / "1_avif"
    folder.mkdir()
    Image.new("RGB", (90, 64), (10, 200, 30)).save(folder / "a.avif")
    (found,) = load_datasets(Config(train_data_dir=str(tmp_path), resolution=64, min_bucket_reso=32))
    index = build_index([found], tmp_path / "cache", on_bad_image="stop")
    assert index[0].size == (90, 64) and abs(index[0].load((0, 0)).mean(axis=(0, 1)) - (10, 200, 30)).max() < 4


JXL_PLUGIN = """
from PIL import Image, PpmImagePlugin

class JxlImageFile(PpmImagePlugin.PpmImageFile):
    format = "JXL"

Image.register_open("JXL", JxlImageFile, lambda start: start.startswith(b"P6"))
Image.register_extension("JXL", ".jxl")
"""
"""A stand-in for the module of the package pillow-jxl-plugin, which registers its format when it is imported."""
READ_JXL = """
import sys
from pathlib import Path
from sdxl_finetune.config import Config, load_datasets
from sdxl_finetune.data.index import build_index

(found,) = load_datasets(Config(train_data_dir=sys.argv[1], resolution=64, min_bucket_reso=32))
print(build_index([found], Path(sys.argv[2]), on_bad_image="stop")[0].load((0, 0)).shape)
"""


def test_jxl_images_are_read_if_a_plugin_is_installed(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "1_jxl"
    folder.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(folder / "a.jxl", format="PPM")
    (tmp_path / "pillow_jxl.py").write_text(JXL_PLUGIN)
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}){READ_JXL}"
    asked = [sys.executable, "-c", script, str(folder.parent), str(tmp_path / "cache")]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert done.stdout == "(64, 64, 3)\n", done.stderr


@pytest.mark.parametrize(
    ("extension", "written", "class_tokens", "expected"),
    [
        (".caption", {".txt": 3}, "cat", ["3 of 3 images have no .caption file and have the caption 'cat'; 3 .txt"]),
        (".caption", {".txt": 2}, None, ["3 of 3 images have no .caption file and have no caption; 2 .txt files"]),
        ("txt", {".caption": 3}, None, ['3 .caption files are there (caption_extension = ".caption")']),
        (".txt", {".txt": 2}, "cat", ["1 of 3 images have no .txt file and have the caption 'cat'"]),
        (".txt", {".txt": 3, ".caption": 1}, "cat", []),
        (".caption", {}, "cat", []),
    ],
)
def test_missing_captions_are_told_if_there_are_caption_files(
    folder: Path, subset, tmp_path: Path, caplog, extension: str, written, class_tokens, expected: list[str]
) -> None:
    for ending, count in written.items():
        for number in range(count):
            (folder / f"{number}{ending}").write_text("a caption")
    rules = subset(folder, caption_extension=extension, class_tokens=class_tokens)
    for _ in range(2):  # new, and known from the last scan
        caplog.clear()
        scan([rules], tmp_path / "cache")
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == len(expected) and all(map(str.__contains__, said, expected)), said


def test_lines_that_are_not_used_are_told(folder: Path, subset, dataset, tmp_path: Path, caplog) -> None:
    (folder / "0.caption").write_text("a cat\na tabby")
    (folder / "1.caption").write_text("a dog\n\n")
    (folder / "2.caption").write_text("a bird")

    def said(**options: object) -> str:
        caplog.clear()
        build_index([dataset(subset(folder, **options))], tmp_path / "cache", on_bad_image="stop", skip_check=True)
        return caplog.text

    with caplog.at_level(logging.WARNING):
        assert "1 of 3 captions have several lines, and only the first is used: enable_wildcard" in said()
        assert "several lines" not in said(enable_wildcard=True)


def test_a_train_data_dir_named_like_a_folder_in_it_is_told(tmp_path: Path, write_images, caplog) -> None:
    write_images(tmp_path / "10_cat", {"a.png": (64, 64)})
    load_datasets(Config(train_data_dir=str(tmp_path / "10_cat"), resolution=64))
    assert "name the folder above it for 10 repeats and the caption 'cat'" in caplog.text
    caplog.clear()
    load_datasets(Config(train_data_dir=str(tmp_path), resolution=64))
    assert not caplog.text


SHIFT_JIS = "日本".encode("shift-jis")


def test_paths_that_are_not_utf_8_work(tmp_path: Path, write_images, caplog) -> None:
    root = tmp_path / os.fsdecode(SHIFT_JIS)
    folder = root / os.fsdecode(b"5_" + SHIFT_JIS)
    names = [os.fsdecode(SHIFT_JIS + b".png"), "line\nbreak.png", "\N{CAT FACE}.png"]
    write_images(folder, dict.fromkeys(names, (64, 64)))
    for name in names:
        (folder / name).with_suffix(".txt").write_text(f"caption of {name.encode('utf-8', 'replace')!r}")
    (found,) = load_datasets(Config(train_data_dir=root, resolution=64, min_bucket_reso=32, caption_extension=".txt"))
    assert found.subsets[0].num_repeats == 5 and found.subsets[0].class_tokens is None
    assert "are not UTF-8 and no caption: rename the folder" in caplog.text
    index = build_index([found], root / "cache", on_bad_image="stop")
    again = pickle.loads(pickle.dumps(index))
    assert sorted(again[row].path.name for row in range(3)) == sorted(names)
    assert all(again[row].load((0, 0)).shape == (64, 64, 3) and again[row].caption for row in range(3))


def test_problems_of_files_with_odd_names_are_one_printable_line(tmp_path: Path, subset, dataset) -> None:
    folder = tmp_path / os.fsdecode(SHIFT_JIS)
    folder.mkdir()
    for name in ("a\nb.png", "\N{CAT FACE}.png", os.fsdecode(SHIFT_JIS + b".png")):
        (folder / name).write_bytes(b"no picture")
    with pytest.raises(UserError) as caught:
        build_index([dataset(subset(folder))], tmp_path / "cache", on_bad_image="stop")
    lines = str(caught.value).encode("utf-8").decode().splitlines()
    assert len(lines) == 3
    assert any("a\\nb.png" in line for line in lines) and any("\N{CAT FACE}.png" in line for line in lines)


def test_names_in_a_metadata_file_need_not_be_utf_8(tmp_path: Path, subset, dataset, write_images) -> None:
    name = os.fsdecode(SHIFT_JIS + b".png")
    write_images(tmp_path / "a", {name: (64, 64)})
    (tmp_path / "meta.json").write_text(json.dumps({name: {"caption": "a cat"}}))
    rules = subset(tmp_path / "a", metadata_file=tmp_path / "meta.json")
    index = build_index([dataset(rules)], tmp_path / "cache", on_bad_image="stop")
    assert index[0].path == tmp_path / "a" / name and index[0].caption == "a cat"


def test_names_in_metadata_as_windows_writes_them(tmp_path: Path, subset, write_images, monkeypatch) -> None:
    write_images(tmp_path / "images" / "sub", {"a.png": (8, 8), "b.png": (8, 8)})
    (tmp_path / "meta.json").write_text(json.dumps({"sub\\a": {"tags": "a"}, "sub\\b.png": {"tags": "b"}}))
    monkeypatch.setattr(os, "sep", "\\")
    (listing,) = list_all([subset(tmp_path / "images", metadata_file=tmp_path / "meta.json")], tmp_path / "cache")
    assert listing.table["name"].to_pylist() == [b"sub/a.png", b"sub/b.png"] and not listing.problems
