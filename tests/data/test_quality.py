"""Quality tags: from scores to places of tags, against plain Python, and the tag in the text of a caption."""

import math
import random
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_finetune.config.dataset import Subset
from sdxl_finetune.config.quality_options import QualityTag, parse_quality_tags
from sdxl_finetune.data.captions import caption
from sdxl_finetune.data.quality import NO_TAG, Groups, assign_tags, count_tags, with_missing
from sdxl_finetune.data.quality_text import with_quality
from sdxl_finetune.data.tags import comparable

RELEASE = "masterpiece > 0.75, high quality > 0.6, normal quality > 0.5, low quality > 0.3, worst quality"
TAGS = parse_quality_tags(RELEASE)


def rules(**settings) -> Subset:
    return Subset(image_dir=Path("d"), num_repeats=1, class_tokens=None, **{"quality_tags": RELEASE, **settings})


def places(scores: list[float], text: str = RELEASE, groups: Groups | None = None) -> list[int]:
    return assign_tags(np.array(scores, np.float32), parse_quality_tags(text), groups).tolist()


def test_the_tags_of_the_release_at_and_beside_every_bound() -> None:
    scores = [0.76, 0.75, 0.61, 0.6, 0.51, 0.5, 0.31, 0.3, 0.0, -1.0, 2.0]
    assert places(scores) == [0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 0]
    above = [float(np.nextafter(np.float32(bound), np.float32(1))) for bound in (0.75, 0.6, 0.5, 0.3)]
    assert places(above) == [0, 1, 2, 3]


def test_scores_that_are_no_numbers_have_no_tag() -> None:
    assert places([math.nan, math.inf, -math.inf, 0.9]) == [NO_TAG, NO_TAG, NO_TAG, 0]


def test_without_a_last_tag_low_scores_have_none() -> None:
    assert places([0.9, 0.5, 0.49], "good >= 0.5") == [0, 0, NO_TAG]


@given(
    st.lists(st.floats(width=32) | st.sampled_from([0.3, 0.5, 0.6, 0.75])),
    st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=5, unique=True),
    st.lists(st.booleans(), min_size=5, max_size=5),
    st.booleans(),
)
def test_bounds_against_plain_python(scores, bounds, inclusive, has_last) -> None:
    bounds = sorted(bounds, reverse=True)
    tags = [QualityTag(f"t{at}", bound, inclusive[at]) for at, bound in enumerate(bounds)]
    tags += [QualityTag("last")] if has_last else []

    def place(score: float) -> int:
        if not math.isfinite(score):
            return NO_TAG
        for at, tag in enumerate(tags):
            if tag.bound is None or score > tag.bound or (tag.includes_bound and score == tag.bound):
                return at
        return NO_TAG

    as_float32 = np.array(scores, np.float32)
    assert assign_tags(as_float32, tags).tolist() == [place(score) for score in as_float32.tolist()]


@given(
    st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.9, math.nan]) | st.floats(0, 1, width=32), st.integers(0, 2))),
    st.lists(st.integers(1, 1000), min_size=1, max_size=4, unique=True),
    st.booleans(),
)
def test_shares_within_groups_against_plain_python(rows, per_mille, has_last) -> None:
    tags = [QualityTag(f"t{at}", share=share / 10) for at, share in enumerate(sorted(per_mille))]
    tags += [QualityTag("last")] if has_last else []
    scores, numbers = [np.float32(score) for score, _ in rows], [number for _, number in rows]

    def place(score: float, number: int) -> int:
        if math.isnan(score):
            return NO_TAG
        own = [other for other, group in zip(scores, numbers, strict=True) if group == number and other == other]
        higher = sum(other > score for other in own)
        for at, tag in enumerate(tags):
            if tag.share is None or higher < Fraction(str(tag.share)) * len(own) / 100:
                return at
        return NO_TAG

    groups = Groups(["a", "b", "c"], np.array(numbers, np.int64))
    found = assign_tags(np.array(scores, np.float32), tags, groups).tolist()
    assert found == [place(score, number) for score, number in zip(scores, numbers, strict=True)]


def test_shares_count_images_and_equal_scores_stay_together() -> None:
    text = "best top 10%, good top 30%, rest"
    assert places([score / 10 for score in range(10)], text) == [2] * 7 + [1, 1, 0]
    assert places([0.5] * 10, text) == [0] * 10
    assert places([], text) == []


def test_counts_and_the_tag_of_images_without_a_score() -> None:
    scores = np.array([0.9, np.nan, 0.1], np.float32)
    found = assign_tags(scores, TAGS)
    assert list(count_tags(found, TAGS).values()) == [1, 0, 0, 0, 1]
    assert with_missing(found, np.isfinite(scores), "normal quality", TAGS).tolist() == [0, 2, 4]
    assert with_missing(found, np.isfinite(scores), "none", TAGS).tolist() == [0, NO_TAG, 4]


def test_the_text_of_tags_reads_as_the_same_tags() -> None:
    for text in (RELEASE, "a >= -1e-07", "a top 0.5%, b top 30%, c", "very top good >= 1, x"):
        tags = parse_quality_tags(text)
        assert parse_quality_tags(",".join(map(str, tags))) == tags
    assert TAGS[1] == QualityTag("high quality", 0.6)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a > 1, , b",
        "a, b > 1",
        "a > 1, b > 1",
        "a > 1, b > 2",
        "a top 10%, b top 10%",
        "a top 0%",
        "a top 101%",
        "a > x",
        "a > nan",
        "a > inf",
        "high quality > 1, High_Quality",
        "a top ten%",
        "a >",
        "a < 1",
        "a top 10",
    ],
)
def test_conditions_that_cannot_hold_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"tag|must|only|no finite number|not above 0|cannot be read"):
        parse_quality_tags(text)


# ---- the text ----

WORDS = st.sampled_from(
    ["1girl", "sitting", "style_a", "masterpiece", "Low_Quality", "worst quality", "", "a masterpiece"]
)
LINES = st.builds(lambda words, gap: gap.join(words), st.lists(WORDS, max_size=8), st.sampled_from([",", ", ", " , "]))
TAG = st.sampled_from([tag.tag for tag in TAGS])
OPTIONS = st.fixed_dictionaries(
    {
        "keep_tokens": st.integers(0, 4),
        "shuffle_caption": st.booleans(),
        "caption_tag_dropout_rate": st.sampled_from([0.0, 0.5, 1.0]),
        "caption_prefix": st.sampled_from([None, "anime,", "photo of"]),
        "token_warmup_step": st.sampled_from([0.0, 50.0]),
        "keep_tokens_separator": st.sampled_from(["", "|||"]),
    }
)


def quality_of(text: str, separators: tuple[str, ...] = (",", "|||")) -> list[str]:
    """The quality tags of a caption."""
    for separator in separators:
        text = text.replace(separator, ",")
    names = {comparable(tag.tag): tag.tag for tag in TAGS}
    return [names[comparable(part)] for part in text.split(",") if comparable(part) in names]


@given(LINES, TAG)
def test_a_written_line_holds_the_tag_once_and_writing_it_again_changes_nothing(line: str, tag: str) -> None:
    written = with_quality(rules(), line, tag)
    assert quality_of(written) == [tag]
    assert with_quality(rules(), written, tag) == written
    others = [part.strip() for part in line.split(",") if not quality_of(part)]
    assert [part for part in (part.strip() for part in written.split(",")) if not quality_of(part) and part] == [
        part for part in others if part
    ]


@pytest.mark.parametrize(
    ("line", "written"),
    [
        ("1girl, sitting", "masterpiece, 1girl, sitting"),
        ("", "masterpiece"),
        ("1girl,masterpiece ,  sitting", "1girl,masterpiece ,  sitting"),
        ("style_a, low_quality, 1girl", "style_a, masterpiece, 1girl"),
        ("Masterpiece, 1girl", "Masterpiece, 1girl"),
        ("(masterpiece:1.2), 1girl", "(masterpiece:1.2), 1girl"),
        ("worst quality, 1girl, high quality, sitting", "masterpiece, 1girl, sitting"),
        ("1girl, a masterpiece by x", "masterpiece, 1girl, a masterpiece by x"),
        ("style_a, low quality ||| 1girl", "style_a, masterpiece ||| 1girl"),
        ("low quality ||| high quality ||| x", "masterpiece ||| ||| x"),
    ],
)
def test_where_the_tag_is_written(line: str, written: str) -> None:
    assert with_quality(rules(keep_tokens_separator="|||"), line, "masterpiece") == written


@given(LINES, TAG, OPTIONS, st.integers(0, 9), st.integers(0, 100))
def test_a_trained_caption_holds_the_tag_once_before_everything_that_moves(line, tag, options, seed, step) -> None:
    subset = rules(**options)
    where = {"epoch": 0, "step": step, "max_steps": 100}
    trained = caption(subset, line, random.Random(seed), **where, quality=tag)
    assert quality_of(trained) == [tag]
    moves = options["shuffle_caption"] or options["token_warmup_step"] or options["caption_tag_dropout_rate"]
    if moves:
        place = [bool(quality_of(part)) for part in trained.split(",")].index(True)
        assert place < max(1, options["keep_tokens"])


@given(LINES, TAG, OPTIONS, st.integers(0, 9), st.integers(0, 100))
def test_training_is_the_same_whether_the_tag_is_in_the_file_or_set_while_loading(
    line, tag, options, seed, step
) -> None:
    """Without a prefix, and with keep_tokens of at least 1, the option may also be removed after the tag is written."""
    plain_line = ", ".join(part.strip() for part in line.split(",") if not quality_of(part))
    where = {"epoch": 0, "step": step, "max_steps": 100}

    def trained(text: str, quality: str | None) -> str:
        return caption(rules(**options), text, random.Random(seed), **where, quality=quality)

    written = with_quality(rules(), plain_line, tag)
    assert trained(written, tag) == trained(plain_line, tag)
    if options["keep_tokens"] and not options["caption_prefix"]:
        assert trained(written, None) == trained(plain_line, tag)


def test_keep_tokens_separator_keeps_the_tag_too() -> None:
    subset = rules(keep_tokens_separator="|||", shuffle_caption=True, caption_tag_dropout_rate=1.0)
    where = {"epoch": 0, "step": 0, "max_steps": 1}
    for text, expected in {
        "style ||| a, b": "masterpiece, style",
        "style ||| low quality, b ||| end": "masterpiece, style, end",
        "style ||| b ||| end, worst quality": "style, end, masterpiece",
        "style, high quality ||| b": "style, masterpiece",
    }.items():
        assert caption(subset, text, random.Random(0), **where, quality="masterpiece") == expected


def test_a_break_ends_a_tag_and_stays() -> None:
    options = {"caption_break": True, "shuffle_caption": True, "caption_tag_dropout_rate": 1.0}
    where = {"epoch": 0, "step": 0, "max_steps": 1, "quality": "masterpiece"}
    for keep, text, expected in [
        (1, "style BREAK low quality, b", "masterpiece BREAK"),
        (3, "style BREAK low quality, b", "style BREAK masterpiece"),
        (0, "a, (worst quality:1.2) BREAK b", "masterpiece BREAK"),
    ]:
        assert caption(rules(**options, keep_tokens=keep), text, random.Random(0), **where) == expected
    assert with_quality(rules(caption_break=True), "a BREAK low quality, b", "masterpiece") == "a BREAK masterpiece, b"


def test_the_tag_comes_before_a_prefix_and_is_dropped_with_the_whole_caption() -> None:
    where = {"epoch": 0, "step": 0, "max_steps": 1}
    subset = rules(caption_prefix="photo of", caption_suffix=", 8k")
    for text in ("cat", "masterpiece, cat", "cat, low quality"):
        expected = "cat, masterpiece" if text.startswith("cat,") else "cat"
        trained = caption(subset, text, random.Random(0), **where, quality="masterpiece")
        assert trained == ("photo of " if "," in expected else "masterpiece, photo of ") + expected + " , 8k"
    assert caption(rules(caption_dropout_rate=1.0), "cat", random.Random(0), **where, quality="masterpiece") == ""


@pytest.mark.parametrize("wildcard", [False, True])
def test_the_tag_is_set_in_the_line_that_is_chosen(wildcard: bool) -> None:
    where = {"epoch": 0, "step": 0, "max_steps": 1}
    text = "a cat\nworst quality, a {dog|wolf}"
    subset = rules(enable_wildcard=wildcard)
    seen = {caption(subset, text, random.Random(seed), **where, quality="masterpiece") for seed in range(30)}
    lines = {"masterpiece, a cat"} | ({"masterpiece, a dog", "masterpiece, a wolf"} if wildcard else set())
    assert seen == lines


@given(LINES, OPTIONS, st.integers(0, 9))
def test_captions_of_images_without_a_tag_are_drawn_as_before(line, options, seed) -> None:
    where = {"epoch": 0, "step": 10, "max_steps": 100}
    with_option = caption(rules(**options), line, random.Random(seed), **where)
    without = caption(rules(**options, quality_tags=None), line, random.Random(seed), **where)
    assert with_option == without
