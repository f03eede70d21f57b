"""The texts that may become a caption: reading them from files and entries, and choosing one by weight."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_finetune.config.caption_sources import CaptionSource, read_sources
from sdxl_finetune.config.dataset import Subset
from sdxl_finetune.data.caption_sources import (
    caption_paths,
    choose_text,
    read_texts,
)
from sdxl_finetune.errors import UserError


def subset(**options) -> Subset:
    return Subset(**{"num_repeats": 1, "class_tokens": None, **options})


def test_the_grammar_of_caption_sources() -> None:
    assert read_sources(" tags:0.6,caption_long: 4 ") == (
        CaptionSource("tags", 0.6),
        CaptionSource("caption_long", 4.0),
    )
    files = read_sources([".txt", ".JSON#long caption:2:whole", "key : whole"])
    assert [(one.is_file, one.ending, one.key, one.weight, one.whole) for one in files] == [
        (True, ".txt", "", 1.0, False),
        (True, ".JSON", "long caption", 2.0, True),
        (False, "key", "", 1.0, True),
    ]
    assert read_sources(",".join(map(str, files))) == files


@pytest.mark.parametrize(
    "text", ["", ",", "tags:", "tags:x", "tags:0", "tags:-1", "tags:inf", "a,a:2", ".", ".json", "a:1:2", "a:whole:1"]
)
def test_a_source_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        read_sources(text)


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=5), st.data())
def test_a_source_is_drawn_by_the_weights_of_those_that_the_image_has(weights: list[float], data) -> None:
    options = subset(caption_sources=[f"s{number}:{weight!r}" for number, weight in enumerate(weights)])
    texts = [data.draw(st.sampled_from([None, f"text {number}"])) for number in range(len(weights))]
    present = [weight for weight, text in zip(weights, texts, strict=True) if text]
    steps = 500
    drawn = Counter(choose_text(options, texts, lambda at=at: (at + 0.5) / steps).text for at in range(steps))
    if not present:
        assert drawn == {"": steps}
        return
    for weight, text in zip(weights, texts, strict=True):
        share = weight / sum(present) if text else 0
        assert abs(drawn[text] / steps - share) <= 1 / steps


def test_the_heaviest_source_is_the_caption_where_nothing_is_drawn() -> None:
    options = subset(caption_sources="a:1, b:3, c:3, d:0.5", draws_source=False)
    assert choose_text(options, ["A", "B", "C", "D"], pytest.fail).text == "B"
    assert choose_text(options, ["A", None, None, "D"], pytest.fail).text == "A"


def test_one_text_is_not_drawn_and_no_text_gives_the_class_tokens() -> None:
    assert choose_text(subset(), ["only"], pytest.fail) == ("only", False)
    options = subset(caption_sources="a, b:1:whole", class_tokens="cat")
    assert choose_text(options, [None, "second"], pytest.fail) == ("second", True)
    assert choose_text(options, ["first", None], pytest.fail) == ("first", False)
    assert choose_text(options, [None, None], pytest.fail) == ("cat", False)


def test_texts_of_files_beside_the_image(tmp_path) -> None:
    image = tmp_path / "cat_1_2_3_4.png"
    options = subset(caption_sources=".txt, .json#long, .json#tags, .json#none, .caption, key")
    assert read_texts(image, options) == (None,) * 6
    (tmp_path / "cat.txt").write_text("\r\n  a cat \n\n sitting", encoding="utf-8-sig")  # shared with the face cutout
    content = {"long": " A cat sits.\n", "tags": ["1cat", "solo"], "none": None, "other": 3}
    (tmp_path / "cat_1_2_3_4.json").write_text(json.dumps(content))
    (tmp_path / "cat_1_2_3_4.caption").write_text(" \n")
    assert read_texts(image, options) == ("a cat\nsitting", "A cat sits.", "1cat, solo", None, None, None)


def test_the_scan_looks_at_every_file_of_the_sources(tmp_path) -> None:
    options = subset(caption_sources=".txt, .json#a, .json#b, key")
    assert caption_paths("d/x.png", options) == ["d/x.txt", "d/x.json"]
    assert caption_paths("d/x.png", subset(caption_extension="tags")) == ["d/x.tags"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "must hold one JSON object"),
        (b'{"a": 1}', "a must be a text or a list of texts"),
        (b'{"a": "\\ud800"}', "no valid Unicode"),
        ("{'a': 'é'}".encode("latin-1"), "is not UTF-8"),
    ],
)
def test_a_json_file_that_cannot_be_read_is_a_problem_of_that_file(tmp_path, content: bytes, message: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_texts(tmp_path / "x.png", subset(caption_sources=".json#a"))
    (problem,) = caught.value.problems
    assert problem.file == str(tmp_path / "x.json") and message in problem.message
