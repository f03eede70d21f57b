"""Captions: golden captions and random draws, intended differences, and properties of every caption."""

import random
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_finetune.config.dataset import Subset
from sdxl_finetune.data.caption_sources import read_caption
from sdxl_finetune.data.captions import caption, draw_wildcards, split_tags, tag_limit
from sdxl_finetune.errors import UserError


def rules(**settings) -> Subset:
    return Subset(**{"image_dir": Path("d"), "num_repeats": 1, "class_tokens": None, **settings})


def drawn(settings: Subset, text: str, seed: int = 0, epoch: int = 0, step: int = 0, max_steps: int = 100) -> str:
    return caption(settings, text, random.Random(seed), epoch=epoch, step=step, max_steps=max_steps)


def replaced(text: str, replacements: dict, rng: random.Random) -> str:
    """The step that textual inversion adds to the reference's captions; full fine-tuning never asks for it."""
    for old, new in replacements.items():
        text = text.replace(old, new) if old else rng.choice(new) if isinstance(new, list) else new
    return text


def is_several_lines_with_ends(case: dict) -> bool:
    settings = case["settings"]
    return "\n" in case["caption"] and bool(settings.get("caption_prefix") or settings.get("caption_suffix"))


def joined_again(text: str, separator: str) -> str:
    """differences.md: Tags are joined again with their own separator. No other golden text has a comma and a space."""
    return text.replace(", ", f"{separator.rstrip()} ")


def test_golden_captions_and_draws(golden) -> None:
    cases = golden("captions.json")["cases"]
    ours = [case for case in cases if is_several_lines_with_ends(case)]
    assert (len(cases), len(ours)) == (277, 4)
    for case in cases:
        rng = random.Random(case["seed"])
        subset = rules(**case["settings"])
        # The reference counts epochs from 1 once training runs.
        position = {"epoch": case.get("epoch", 1) - 1, "step": case.get("step", 0)}
        out = [
            replaced(
                caption(subset, case["caption"], rng, **position, max_steps=case.get("max_train_steps", 0)),
                case.get("replacements", {}),
                rng,
            )
            for _ in range(case.get("repeated_calls", 1))
        ]
        if case not in ours:
            recorded = case["out"] if "repeated_calls" in case else [case["out"]]
            assert out == [joined_again(text, subset.caption_separator) for text in recorded], case
        assert rng.random() == case["next_random"], case


@pytest.mark.parametrize(
    ("seed", "wildcard", "out"),
    [
        (0, False, "pre, l1, a , suf"),
        (0, True, "pre, l2, b , suf"),
        (1, True, "pre, l1, a , suf"),
        (42, True, "pre, l1, a , suf"),
    ],
)
def test_prefix_and_suffix_are_added_to_the_chosen_line(seed: int, wildcard: bool, out: str) -> None:
    """differences.md: Prefix and suffix of captions with several lines."""
    settings = rules(caption_prefix="pre,", caption_suffix=", suf", enable_wildcard=wildcard)
    assert drawn(settings, "l1, a\nl2, b", seed) == out


@pytest.mark.parametrize(
    ("separator", "text", "out"),
    [
        (";", "a, b and c; d; e, f", "a, b and c; e, f; d"),
        ("; ", "a, b and c; d; e, f", "a, b and c; e, f; d"),
        (",", "a,b ,c", "a, c, b"),
        ("|", "a|b|c", "a| c| b"),
        (" ", "a b c", "a c b"),
    ],
)
def test_tags_are_joined_again_with_their_own_separator(separator: str, text: str, out: str) -> None:
    settings = rules(caption_separator=separator, keep_tokens=1, shuffle_caption=True)
    assert out in {drawn(settings, text, seed) for seed in range(20)}
    tags = sorted(tag.strip() for tag in text.split(separator))
    assert sorted(tag.strip() for tag in drawn(settings, text).split(separator)) == tags


def test_caption_dropout_every_n_epochs_starts_with_epoch_n() -> None:
    """differences.md: Caption dropout every n epochs."""
    every_third = rules(caption_dropout_every_n_epochs=3)
    assert [drawn(every_third, "a", epoch=epoch) for epoch in range(7)] == ["a", "a", "", "a", "a", "", "a"]


def test_golden_caption_files(golden, tmp_path) -> None:
    """differences.md: Caption files."""
    bom, no_error, second_line = "a byte order mark", "an empty file", "an empty first line"
    seen = Counter()
    for index, case in enumerate(golden("captions.json")["caption_files"]):
        image = tmp_path / str(index) / case["image_name"]
        image.parent.mkdir()
        content, expected = case["file_content"], case.get("caption")
        settings = rules(
            caption_extension=case["caption_extension"],
            enable_wildcard=case["enable_wildcard"],
            class_tokens=case["class_tokens"],
        )
        if content is not None:
            path = image.with_name("pic" if "pic_" in image.name else "img").with_suffix(case["caption_file_ext"])
            path.write_bytes(b"\xe9" if content.startswith("(latin-1 bytes)") else content.encode())
        if "raised" in case and content:
            with pytest.raises(UserError, match=r"img\.txt: .*UTF-8"):
                read_caption(image, settings)
            continue
        if "raised" in case:
            expected, seen[no_error] = "", seen[no_error] + 1
        elif content and content.startswith("\ufeff"):
            expected, seen[bom] = expected.removeprefix("\ufeff"), seen[bom] + 1
        elif content and content[0] in "\r\n" and not case["enable_wildcard"]:
            expected, seen[second_line] = content.split()[0], seen[second_line] + 1
        text = read_caption(image, settings)
        assert (text if case["enable_wildcard"] else text.split("\n")[0]) == expected
    assert seen == {bom: 2, no_error: 2, second_line: 2}


def test_a_face_cutout_needs_four_numbers_and_prefers_its_own_file(tmp_path) -> None:
    """differences.md: Caption files."""
    (tmp_path / "pic.txt").write_text("of the original")
    settings = rules(caption_extension=".txt")
    assert read_caption(tmp_path / "pic_a_2_3_4.png", settings) == ""
    assert read_caption(tmp_path / "pic_1_2_3_4.png", settings) == "of the original"
    (tmp_path / "pic_1_2_3_4.txt").write_text("its own")
    assert read_caption(tmp_path / "pic_1_2_3_4.png", settings) == "its own"


def test_a_folder_with_the_name_of_a_caption_file_is_ignored(tmp_path) -> None:
    (tmp_path / "img.txt").mkdir()
    assert read_caption(tmp_path / "img.png", rules(caption_extension=".txt", class_tokens="cat")) == "cat"


tags = st.lists(st.text("abcdefg _", min_size=1).map(str.strip).filter(bool), min_size=1, max_size=12)


@given(tags, st.integers(0, 6), st.integers(0, 2**32))
def test_shuffle_keeps_all_tags_and_the_first_ones_in_place(words: list, keep: int, seed: int) -> None:
    out = drawn(rules(shuffle_caption=True, keep_tokens=keep), ", ".join(words), seed).split(", ")
    assert out[:keep] == words[:keep]
    assert Counter(out) == Counter(words)


@given(tags, tags, tags, st.floats(0, 1), st.integers(0, 2**32))
def test_tag_dropout_drops_only_free_tags_and_keeps_their_order(first, free, last, rate: float, seed: int) -> None:
    text = " ||| ".join(", ".join(part) for part in (first, free, last))
    settings = rules(keep_tokens_separator="|||", caption_tag_dropout_rate=rate, keep_tokens=3)
    assert split_tags(settings, text) == (first, free, last)
    if rate > 0:
        out = drawn(settings, text, seed).split(", ")
        assert out[: len(first)] == first
        assert out[len(out) - len(last) :] == last
        rest = iter(free)
        assert all(tag in rest for tag in out[len(first) : len(out) - len(last)])


@given(st.text("{}|ab⦅⦆ "), st.integers(0, 2**32))
def test_doubled_braces_are_text(text: str, seed: int) -> None:
    escaped = text.replace("{", "{{").replace("}", "}}")
    assert draw_wildcards(escaped, random.Random(seed)) == text


def test_white_parentheses_are_text() -> None:
    """differences.md: Doubled braces beside ⦅ and ⦆."""
    assert draw_wildcards("⦅{{a}}⦆", random.Random(0)) == "⦅{a}⦆"


@given(st.lists(st.text("ab ,"), min_size=1, max_size=5), st.integers(0, 2**32))
def test_a_wildcard_becomes_one_of_its_options(options: list, seed: int) -> None:
    group = "|".join(options)
    out = draw_wildcards(f"x{{{group}}}y", random.Random(seed))
    assert out in ([f"x{option}y" for option in options] if group else ["x{}y"])


@given(st.integers(0, 40), st.integers(0, 5), st.integers(1, 500))
def test_token_warmup_grows_linearly_to_all_tags(count: int, least: int, end: int) -> None:
    settings = rules(token_warmup_min=least, token_warmup_step=float(end))
    limits = [tag_limit(settings, count, step=step, max_steps=1000) for step in range(end + 1)]
    assert limits[0] == least
    assert limits[-1] == count
    if least <= count:
        assert limits == sorted(limits)


def test_token_warmup_step_below_one_is_a_share_of_all_steps() -> None:
    settings = rules(token_warmup_step=0.25, caption_tag_dropout_rate=0.0)
    assert drawn(settings, "a, b, c", step=0, max_steps=8) == "a"
    assert drawn(settings, "a, b, c", step=1, max_steps=8) == "a, b"
    assert drawn(settings, "a, b, c", step=2, max_steps=8) == "a, b, c"


def test_a_caption_takes_only_microseconds() -> None:
    """Data-loader workers make a caption for each image of each step."""
    settings = rules(shuffle_caption=True, keep_tokens=4, caption_dropout_rate=0.1)
    text = ", ".join(f"some tag {index}" for index in range(40))
    rng = random.Random(0)
    started = time.perf_counter()
    for step in range(1000):
        caption(settings, text, rng, epoch=0, step=step, max_steps=1000)
    assert (time.perf_counter() - started) / 1000 < 1e-3
