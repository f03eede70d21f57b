"""Which tags, images and captions a tag report measures."""

from pathlib import Path

import numpy as np
import pytest

from sdxl_finetune.errors import UserError
from sdxl_finetune.tag_report.choice import Choice, choose, image_name
from tests.tag_report.conftest import index_of, options


def chosen(*more: str) -> Choice:
    config = options(*more)
    return choose(config, index_of(config))


def test_a_pattern_finds_tags_in_all_their_forms(folder: Path) -> None:
    choice = chosen("--tag_report_tags", "style_*", "--tag_report_others", "1")
    assert choice.listed.names == ("style_a", "style_b", "style_c", "style_d")
    assert choice.listed.per_epoch.tolist() == [3, 3, 1, 1]
    assert sum(pair.tag == 1 for pair in choice.pairs) == 3
    named = chosen("--tag_report_tags", "STYLE A, style_d")
    assert named.listed.names == ("style_a", "style_d")
    assert chosen("--tag_report_min_images", "3").listed.names == ("best", "cat", "style_a", "style_b")


def test_the_tag_is_removed_or_replaced_at_its_place(folder: Path) -> None:
    config = options("--tag_report_tags", "style_*", "--tag_report_others", "2")
    index = index_of(config)
    choice = choose(config, index)
    for pair in choice.pairs:
        unit, name = choice.units[pair.unit], choice.listed.names[pair.tag]
        whole, without = unit.captions[pair.whole], unit.captions[pair.without]
        others = [unit.captions[place] for place in pair.others]
        match image_name(index, unit.row), name:
            case "images/a0.png", _:
                assert (whole, without) == ("best, style_a, cat", "best, cat")
                assert all(other.startswith("best, style_") and other.endswith(", cat") for other in others)
            case "images/a2.png", _:
                assert (whole, without) == ("(style_a:1.2), bird", "bird")
                assert all(other.endswith(":1.2), bird") and other.startswith("(style_") for other in others)
            case "images/c0.png", "style_c":
                assert (whole, without) == ("best, style_c, style_b", "best, style_b")
                assert set(others) == {"best, style_a, style_b", "best, style_d, style_b"}, "never a tag that it has"
        assert len({whole, without, *others}) == 2 + choice.others_of(pair.tag)


def test_a_tag_competes_with_tags_that_have_half_as_many_images(folder: Path) -> None:
    """style_a and style_b have three images, style_c and style_d one."""
    choice = chosen("--tag_report_tags", "style_*", "--tag_report_others", "2")
    rivals: dict[str, set[str]] = {}
    for pair in choice.pairs:
        captions = choice.units[pair.unit].captions
        rivals.setdefault(choice.listed.names[pair.tag], set()).update(captions[place] for place in pair.others)
    assert all("style_b" in text.lower() or "style b" in text.lower() for text in rivals["style_a"])
    assert {choice.listed.names[tag]: choice.others_of(tag) for tag in range(4)} == {
        "style_a": 1, "style_b": 1, "style_c": 2, "style_d": 2,
    }  # fmt: skip


def test_captions_are_those_of_training(folder: Path) -> None:
    (folder / "images" / "a0.txt").write_text("best ||| style_a BREAK sky;sea, cat")
    more = ["--shuffle_caption", "--keep_tokens_separator", "|||", "--caption_break", "--caption_prefix", "art,"]
    more += ["--secondary_separator", ";", "--caption_dropout_rate", "0.9", "--caption_tag_dropout_rate", "0.5"]
    choice = chosen("--tag_report_tags", "style_*", *more)
    texts = [choice.units[pair.unit].captions for pair in choice.pairs if pair.tag == 0]
    (whole,) = [captions for captions in texts if any("sky" in text for text in captions)]
    assert whole[0] == "art, best, style_a BREAK sky, sea, cat".replace("sky, sea", "sky,sea")
    assert whole[1] == "art, best, BREAK sky,sea, cat" or whole[1] == "art, best BREAK sky,sea, cat"


def test_held_out_images_come_first_and_the_choice_does_not_depend_on_others(folder: Path) -> None:
    asked = ["--tag_report_tags", "style_a, style_b", "--validation_split", "0.4", "--tag_report_images", "1"]
    config = options(*asked)
    index = index_of(config)
    choice = choose(config, index)
    for tag in (0, 1):
        rows = [choice.units[pair.unit].row for pair in choice.pairs if pair.tag == tag]
        with_tag = [row for row in range(len(index)) if f"style_{'ab'[tag]}" in index[row].caption.lower()]
        assert len(rows) == 1
        assert index.held_out[rows[0]] == index.held_out[with_tag].any()
    assert index.held_out.sum() == 3
    assert np.isin(choice.listed.candidates[0], np.flatnonzero(index.used)).all()


def test_the_budget_lowers_the_images_of_all_tags_evenly(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked = ["--tag_report_tags", "style_*", "--tag_report_others", "1", "--tag_report_timesteps", "500"]
    whole = chosen(*asked)
    caplog.set_level("INFO")
    half = chosen(*asked, "--tag_report_budget", str(whole.passes - 1))
    assert half.passes < whole.passes and "each tag is measured on 2 images at most" in caplog.text
    counts = np.bincount([pair.tag for pair in half.pairs])
    assert counts.tolist() == [2, 2, 1, 1]
    assert chosen(*asked, "--tag_report_budget", str(half.passes)).passes == half.passes
    with pytest.raises(UserError, match="forward passes: raise it, or list fewer tags"):
        chosen(*asked, "--tag_report_budget", "3")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--tag_report_tags", "style_a, style_x, cat"], "no caption has 'style_x': correct the spelling"),
        (["--tag_report_tags", "artist_*"], "no caption has 'artist_\\*'"),
        (["--tag_report_tags", "style_*", "--tag_report_others", "4"], "so at most 3 others can compete"),
        (["--tag_report_tags", "style_*", "--tag_report_others", "3"], "no image to measure 'style_c' on"),
        (["--tag_report_min_images", "9"], "the most frequent one is in 7"),
        ([], "names no tags: set tag_report_tags"),
    ],
)
def test_what_cannot_be_measured_is_refused(folder: Path, asked: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        chosen(*asked)


def test_a_file_lists_tags_and_patterns(folder: Path) -> None:
    (folder / "tags.txt").write_text("# styles\nstyle_a\n\nstyle_[cd]\n")
    choice = chosen("--tag_report_tags_file", "tags.txt", "--tag_report_others", "2")
    assert choice.listed.names == ("style_a", "style_c", "style_d")
    assert chosen("--tag_report_tags_file", "tags.txt").others == 2, "three of the list, so two others"
