"""Rules for single tags: how tags are compared, protected and dropped together."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_finetune.config.dataset import Subset
from sdxl_finetune.data.captions import caption
from sdxl_finetune.data.tags import Tags, check_tag_rules, comparable
from sdxl_finetune.errors import UserError


def rules(**options) -> Subset:
    return Subset(num_repeats=1, class_tokens=None, **options)


def draw(subset: Subset, text: str, seed: int = 0, step: int = 0) -> str:
    return caption(subset, text, random.Random(seed), epoch=0, step=step, max_steps=100)


@pytest.mark.parametrize(
    "tag",
    ["hatsune miku (vocaloid)", " Hatsune_Miku_\\(Vocaloid\\)", "(hatsune miku \\(vocaloid\\):1.2)"],
)
def test_tags_are_equal_without_case_underscores_backslashes_and_weights(tag: str) -> None:
    assert comparable(tag) == "hatsune miku (vocaloid)"


def test_a_star_matches_any_text_and_an_escaped_star_is_a_star() -> None:
    tags = Tags(["artist:*", "* hair", "\\*_\\*", "plain"])
    matching = ["artist:ebifurya", "Artist:", "long_hair", "*_*", "Plain", "(blue hair:1.3)"]
    assert [tag for tag in matching if not tags.holds(tag)] == []
    others = ["my artist:x", "hair", "haircut", "a_a", "plains", "(o)_(o)", ""]
    assert [tag for tag in others if tags.holds(tag)] == []


def protect(folder: Path, *lines: str) -> Path:
    (folder / "protected.txt").write_text("# quality tags\n\n" + "\n".join(lines), encoding="utf-8-sig")
    return folder / "protected.txt"


def test_protected_tags_are_never_dropped_and_keep_their_place(tmp_path) -> None:
    file = protect(tmp_path, "Best_Quality", "year *")
    subset = rules(shuffle_caption=True, protected_tags_file=file)
    drawn = {draw(subset, "a, best quality, b, c, year 2024, d", seed) for seed in range(50)}
    assert len(drawn) > 10
    for text in drawn:
        tags = text.split(", ")
        assert (tags[1], tags[4]) == ("best quality", "year 2024")
        assert sorted(tags) == ["a", "b", "best quality", "c", "d", "year 2024"]
    dropping = rules(caption_tag_dropout_rate=1.0, protected_tags_file=file)
    assert draw(dropping, "a, best quality, b, year 2024") == "best quality, year 2024"


def test_tag_warm_up_uses_protected_tags_from_the_first_step(tmp_path) -> None:
    subset = rules(token_warmup_step=10, token_warmup_min=1, protected_tags_file=protect(tmp_path, "z"))
    assert draw(subset, "a, b, c, z") == "a, z"
    assert draw(subset, "a, b, c, z", step=5) == "a, b, z"
    assert draw(subset, "a, b, c, z", step=10) == "a, b, c, z"


def test_a_tag_with_parts_is_protected_if_one_part_is(tmp_path) -> None:
    file = protect(tmp_path, "b")
    subset = rules(caption_tag_dropout_rate=1.0, secondary_separator=";", protected_tags_file=file)
    assert draw(subset, "a, x;b, c") == "x,b"


@given(st.lists(st.sampled_from(["a", "b", "keep me", "x y", "1girl"]), max_size=8), st.integers(0, 1000))
def test_rules_that_match_no_tag_change_nothing(tags: list[str], seed: int) -> None:
    options = {"shuffle_caption": True, "caption_tag_dropout_rate": 0.4, "keep_tokens": 1, "token_warmup_step": 0.5}
    text = ", ".join(tags)
    with_rules = rules(**options, caption_tag_dropout_groups={"none of them": ["a"]})
    for step in (0, 20, 60):
        assert draw(rules(**options), text, seed, step) == draw(with_rules, text, seed, step)


def test_a_dropped_tag_takes_its_group_with_it() -> None:
    groups = {"hatsune_miku": ["aqua hair", "twin*"], "twintails": "hair ribbon", "*_(cosplay)": ["wig"]}
    subset = rules(caption_tag_dropout_rate=0.3, caption_tag_dropout_groups=groups)
    text = "1girl, Hatsune Miku, smile, Aqua_Hair, twintails, hair ribbon, x (cosplay), wig"
    seen = set()
    for seed in range(300):
        tags = draw(subset, text, seed).split(", ")
        if "Hatsune Miku" not in tags:
            assert not {"Aqua_Hair", "twintails", "hair ribbon"} & set(tags)
        elif "twintails" not in tags:
            assert "hair ribbon" not in tags
        if "x (cosplay)" not in tags:
            assert "wig" not in tags
        seen.add(("Hatsune Miku" in tags, "Aqua_Hair" in tags))
    assert seen == {(True, True), (True, False), (False, False)}  # a listed tag may also be dropped by itself


def test_a_group_never_drops_kept_and_protected_tags(tmp_path) -> None:
    options = {"caption_tag_dropout_groups": {"miku": ["solo", "aqua hair", "smile"]}, "caption_tag_dropout_rate": 1.0}
    subset = rules(**options, keep_tokens=1, protected_tags_file=protect(tmp_path, "aqua hair"))
    assert draw(subset, "solo, miku, aqua hair, smile") == "solo, aqua hair"


def test_groups_are_read_from_toml_and_json_files(tmp_path) -> None:
    (tmp_path / "groups.toml").write_text('"miku" = ["aqua hair"]\nluka = "pink hair"\n')
    (tmp_path / "groups.json").write_text('{"miku": ["aqua hair"], "luka": "pink hair"}')
    for name in ("groups.toml", "groups.json"):
        subset = rules(caption_tag_dropout_rate=0.5, caption_tag_dropout_groups=str(tmp_path / name))
        for seed in range(30):
            tags = draw(subset, "miku, aqua hair, luka, pink hair", seed).split(", ")
            assert "miku" in tags or "aqua hair" not in tags
            assert "luka" in tags or "pink hair" not in tags


def test_all_files_of_tag_rules_that_cannot_be_read_are_reported_together(tmp_path) -> None:
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "broken.toml").write_text("miku = [")
    (tmp_path / "numbers.json").write_text('{"miku": [1]}')
    subsets = [
        rules(protected_tags_file=tmp_path / "latin.txt"),
        rules(protected_tags_file=tmp_path / "none.txt"),
        rules(caption_tag_dropout_groups=tmp_path / "broken.toml"),
        rules(caption_tag_dropout_groups=tmp_path / "numbers.json"),
    ]
    with pytest.raises(UserError) as caught:
        check_tag_rules(subsets)
    latin, none, broken, numbers = map(str, caught.value.problems)
    assert latin.startswith("protected_tags_file = ") and "not a UTF-8 text file" in latin
    assert "cannot be read (No such file or directory): check the path" in none
    assert "neither valid TOML nor JSON" in broken and "'miku' must have a list of tags" in numbers


def test_tags_stay_on_their_side_of_a_break() -> None:
    subset = rules(shuffle_caption=True, caption_break=True, caption_tag_dropout_rate=0.2)
    seen = set()
    for seed in range(100):
        text = draw(subset, "a, b, c BREAK, d,e, f", seed)
        first, second = (part.strip() for part in text.split("BREAK"))
        assert text == f"{first} BREAK {second}".strip()
        assert {*first.split(", ")} <= {"a", "b", "c", ""} and {*second.split(", ")} <= {"d", "e", "f", ""}
        seen.add((first, second))
    assert len(seen) > 30
    without = rules(shuffle_caption=True)
    assert any(not draw(without, "a BREAK b, c, d", seed).startswith("a BREAK b") for seed in range(9))
