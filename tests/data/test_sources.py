"""Metadata files: whose caption is what, and every entry that is of no use is told."""

import json
from pathlib import Path

import pytest

from sdxl_finetune.data.sources import SHOWN, read_metadata
from sdxl_finetune.errors import UserError

CAPTION = {"caption": "a cat", "tags": "1cat, sitting"}


@pytest.fixture
def captions(tmp_path: Path, subset):
    """captions(content, **options): what is read of a .json file, or of .jsonl for a text."""

    def read(content: object, **options: object) -> dict[str, str]:
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
