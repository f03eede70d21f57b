"""Metadata files: whose caption is what, and every entry that is of no use is told."""

import json
from pathlib import Path

import pytest

from sdxl_finetune.data.sources import SHOWN, Described, read_metadata
from sdxl_finetune.errors import UserError

CAPTION = {"caption": "a cat", "tags": "1cat, sitting"}


@pytest.fixture
def captions(described):
    """captions(content, **options): the captions of a .json file, or of .jsonl for a text."""

    def read(content: object, **options: object) -> dict[str, str]:
        return {name: one.caption for name, one in described(content, **options).items()}

    return read


@pytest.fixture
def described(tmp_path: Path, subset):
    """described(content, **options): everything that is read of a .json file, or of .jsonl for a text."""

    def read(content: object, **options: object) -> dict[str, Described]:
        path = tmp_path / ("meta.jsonl" if isinstance(content, str) else "meta.json")
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8-sig")
        return read_metadata(subset(tmp_path, metadata_file=path, **options))

    return read


def test_caption_and_tags(captions) -> None:
    both = {"caption": "a cat\n\na tabby", "tags": "1cat,\nsitting"}
    content = {
        "both.png": CAPTION,
        "tags.png": {"tags": "1cat"},
        "caption.png": {"caption": "a cat", "tags": None},
        "neither.png": {"image_size": [3, 4]},
        "lines.png": both,
    }
    assert captions(content) == {
        "both.png": "a cat,1cat, sitting",
        "tags.png": "1cat",
        "caption.png": "a cat",
        "neither.png": "",
        "lines.png": "a cat\n\na tabby,1cat,\nsitting",
    }
    assert captions({"a.png": CAPTION}, caption_separator=";") == {"a.png": "a cat;1cat, sitting"}
    wild = captions({"lines.png": both, "tags.png": {"tags": "1cat\nsitting"}}, enable_wildcard=True)
    assert wild == {"lines.png": "a cat,1cat,,sitting\na tabby,1cat,,sitting", "tags.png": "1cat,sitting"}


def test_names_are_files_with_or_without_ending(captions, tmp_path: Path) -> None:
    folder = tmp_path / "below"
    folder.mkdir()
    for name in ("one.v2.webp", "two.PNG", "two.txt", "three.jpg", "three.png"):
        (folder / name).touch()
    absolute = str(folder / "two")
    content = {"below/one.v2": CAPTION, absolute: CAPTION, "gone.png": CAPTION}
    assert list(captions(content)) == ["below/one.v2.webp", f"{absolute}.PNG", "gone.png"]
    with pytest.raises(UserError) as caught:
        captions({"below/three": CAPTION, "nowhere/one": CAPTION, "below/two": 3})
    several, missing, number = (problem.message for problem in caught.value.problems)
    assert several.startswith("'below/three': several images") and "three.jpg, three.png" in several
    assert missing == f"'nowhere/one': no image {tmp_path}/nowhere/one.*"
    assert number == "'below/two': the entry must be an object with caption or tags"


def test_a_line_each(captions) -> None:
    lines = [{"image_path": "a.png", "caption": "a"}, {"image_path": "b é.png", "tags": "b"}]
    text = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n"
    assert captions(text) == {"a.png": "a", "b é.png": "b"}
    with pytest.raises(UserError, match=r"meta\.jsonl: line 2: the entry has no image_path"):
        captions('{"image_path": "a.png"}\n{"caption": "b"}')


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "must be an object of images by name"),
        ({}, "names no images"),
        ({"a.png": {"caption": 3}}, "'a.png': caption and tags must be texts"),
        ({"a.png": {"image_size": [3]}}, r"'a.png': image_size must be \[width, height\]"),
        ({"a.png": {"train_resolution": [64, 0]}}, r"'a.png': train_resolution must be \[width, height\]"),
        ({"a.png": {"tags": "cat \ud83d"}}, "'a.png': caption or tags are no valid Unicode"),
        ({"a\ud83d.png": CAPTION}, "the name cannot be a file name"),
        ({"a\0.png": CAPTION}, "a file name cannot hold a null character"),
        ('{"image_path": ', "not valid JSON"),
        ("", "names no images"),
    ],
)
def test_mistakes(captions, content: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        captions(content)


def test_many_mistakes_are_counted(captions) -> None:
    with pytest.raises(UserError) as caught:
        captions({f"{number}.png": [] for number in range(SHOWN + 7)})
    assert len(caught.value.problems) == SHOWN + 1 and caught.value.problems[-1].message == "and 7 more"


def test_sizes_are_read(described) -> None:
    content = {
        "both.png": {"image_size": [3, 4], "train_resolution": [64, 96], **CAPTION},
        "neither.png": {"image_size": None},
    }
    assert described(content) == {
        "both.png": Described("a cat,1cat, sitting", (3, 4), (64, 96)),
        "neither.png": Described("", None, None),
    }
    line = {"image_path": "a.png", "image_size": [30, 40]}
    assert described(json.dumps(line))["a.png"].size == (30, 40)


def test_a_file_that_is_not_utf_8_is_named(tmp_path: Path, subset) -> None:
    path = tmp_path / "meta.json"
    path.write_bytes('{"a.png": {"caption": "日本"}}'.encode("shift-jis"))
    with pytest.raises(UserError, match=r"meta\.json: not a UTF-8 text file \(byte 23\): save it as UTF-8"):
        read_metadata(subset(tmp_path, metadata_file=path))
