"""Metadata files: whose caption is what, and every entry that is of no use is told."""

import json
from pathlib import Path

import pytest

from sdxl_finetune.data.sources import entries as entries_module
from sdxl_finetune.data.sources.listed import Listing
from sdxl_finetune.data.sources.metadata import read_metadata
from sdxl_finetune.errors import SHOWN, UserError

CAPTION = {"caption": "a cat", "tags": "1cat, sitting"}


@pytest.fixture
def captions(listed):
    """captions(content, **options): the captions of a .json file, or of .jsonl for a text. Mistakes raise."""

    def read(content: object, **options: object) -> dict[str, str]:
        listing = listed(content, **options)
        if listing.problems:
            raise UserError(listing.problems.problems())
        return {row["name"].decode(): row["captions"][0] for row in listing.table.to_pylist()}

    return read


@pytest.fixture
def listed(tmp_path: Path, subset):
    """listed(content, **options): the listing of a .json file, or of .jsonl for a text."""

    def read(content: object, **options: object) -> Listing:
        path = tmp_path / ("meta.jsonl" if isinstance(content, str) else "meta.json")
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8-sig")
        return read_metadata(subset(tmp_path, metadata_file=path, **options), tmp_path)

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
    assert set(captions(content)) == {"below/one.v2.webp", f"{absolute}.PNG", "gone.png"}
    with pytest.raises(UserError) as caught:
        captions({"below/three": CAPTION, "nowhere/one": CAPTION, "below/two": 3})
    number, several, missing = (problem.message for problem in caught.value.problems)
    assert number == "'below/two': the entry must be an object with caption or tags"
    assert several.startswith("'below/three': several images") and "three.jpg" in several and "three.png" in several
    assert (
        missing
        == f"'nowhere/one': no image has this name ({tmp_path}/nowhere/one.*): correct the name or remove the entry"
    )


def test_a_line_each(captions) -> None:
    lines = [{"image_path": "a.png", "caption": "a"}, {"image_path": "b é.png", "tags": "b"}]
    text = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n"
    assert captions(text) == {"a.png": "a", "b é.png": "b"}
    with pytest.raises(UserError, match=r"meta\.jsonl: line 2: the entry has no image_path \(its keys are "):
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


def test_many_mistakes_are_counted(listed) -> None:
    content = {f"{number}.png": [] for number in range(SHOWN + 7)} | {"good.png": CAPTION}
    listing = listed(content)
    shown = listing.problems.problems()
    assert len(listing.problems) == SHOWN + 7 and len(shown) == SHOWN + 1
    assert shown[-1].message.startswith("and 7 more of this kind") and listing.table.num_rows == 1


def test_chunks_of_entries_are_joined(captions, monkeypatch) -> None:
    monkeypatch.setattr(entries_module, "CHUNK", 3)
    content = {f"{number:02}.png": {"caption": str(number)} for number in range(8)}
    expected = {name: entry["caption"] for name, entry in content.items()}
    assert captions(content) == expected
    assert captions("\n".join(json.dumps({"image_path": name, **entry}) for name, entry in content.items())) == expected


def test_the_last_entry_of_a_name_counts(captions) -> None:
    text = '{"image_path": "b.png"}\n{"image_path": "a.png", "tags": "1"}\n{"image_path": "a.png", "tags": "2"}'
    assert captions(text) == {"a.png": "2", "b.png": ""}


@pytest.mark.parametrize(
    "text", ['{"a": {}, }', '{"a": {} "b": {}}', '{"a" {}}', '{"a": {}} 3', '{"a": ', "{a: 1}", ""]
)
def test_malformed_json_is_refused_at_the_place_that_python_names(tmp_path: Path, subset, text: str) -> None:
    path = tmp_path / "meta.json"
    path.write_text(text)
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    with pytest.raises(UserError, match="not valid JSON") as caught:
        read_metadata(subset(tmp_path, metadata_file=path), tmp_path)
    assert str(expected.value).partition(": ")[2] in str(caught.value)


def test_scores_and_caption_columns(listed) -> None:
    content = {"a.png": {"score": 3, "aesthetic": 0.5, "long": "x", "short": ["a", "b"]}, "b.png": {"long": None}}
    columns = ("caption=long", "tags=short", "score=aesthetic")
    rows = listed(content, metadata_columns=columns).table.to_pylist()
    assert [(row["captions"], row["score"]) for row in rows] == [(["x,a, b"], 0.5), ([""], None)]
    for score in ("good", True, float("inf")):
        problems = listed({"a.png": {"score": score}, "b.png": {}}).problems.problems()
        assert [problem.message for problem in problems] == ["'a.png': score must be a number"]


def test_a_key_that_no_entry_has_is_named_with_the_keys_that_exist(listed) -> None:
    content = {"a.png": {"caption": "a", "score": 1}, "b.png": {"caption": "b", "rank": 2}}
    message = "metadata_columns = 'tags=tagz': no entry has the key tagz; the keys are caption, score, rank"
    with pytest.raises(UserError, match=message):
        listed(content, metadata_columns=("tags=tagz", "score=rank"))


def test_sizes_are_read(listed) -> None:
    content = {
        "both.png": {"image_size": [3, 4], "train_resolution": [64, 96], **CAPTION},
        "neither.png": {"image_size": None},
    }
    sides = ("width", "height", "train_width", "train_height")
    rows = [[row[side] for side in sides] for row in listed(content).table.to_pylist()]
    assert rows == [[3, 4, 64, 96], [None] * 4]
    line = {"image_path": "a.png", "image_size": [30, 40]}
    assert listed(json.dumps(line)).table["width"].to_pylist() == [30]


def test_a_file_that_is_not_utf_8_is_named(tmp_path: Path, subset) -> None:
    path = tmp_path / "meta.json"
    path.write_bytes('{"a.png": {"caption": "日本"}}'.encode("shift-jis"))
    with pytest.raises(UserError, match=r"meta\.json: not a UTF-8 text file \(byte 23\): save it as UTF-8"):
        read_metadata(subset(tmp_path, metadata_file=path), tmp_path)
