"""Repeats and loss weights by rule: which rule gives an image its values, against plain Python, and mistakes."""

import fnmatch
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_finetune.config.dataset import Subset
from sdxl_finetune.data.tag_columns import TagPatterns, find_tags, separators_of
from sdxl_finetune.data.weights import Weights, find_weights, glob_regex, read_rules
from sdxl_finetune.errors import UserError

RULES = """\
[tags]
"style_*" = { repeats = 2, loss_weight = 1.5 }
"style_a" = { repeats = 3 }

[paths]
"5_cat/*" = { loss_weight = 0.5 }
"z*.png" = { repeats = 0 }
"""


def table(*rows: tuple[int, str, list[str | None]]) -> pa.Table:
    subset, names, captions = zip(*rows, strict=True)
    return pa.table(
        {
            "subset": pa.array(subset, pa.int32()),
            "name": pa.array([name.encode() for name in names], pa.large_binary()),
            "captions": pa.array(captions, pa.large_list(pa.large_string())),
        }
    )


def subsets(path: Path | None, *folders: str, **options) -> list[Subset]:
    return [
        Subset(image_dir=Path(folder), num_repeats=2, class_tokens=None, image_weights=path, **options)
        for folder in folders
    ]


def found(tmp_path: Path, text: str, name: str = "rules.toml", **options) -> tuple[Weights, list[str]]:
    (tmp_path / name).write_text(text, encoding="utf-8")
    images = table(
        (0, "a.png", ["1girl, Style A"]),
        (0, "b.png", ["style_b\nstyle_a", None]),
        (0, "z1.png", ["x"]),
        (1, "a.png", ["style_a2 ||| x", "y"]),
        (1, "sub/z2.png", [""]),
    )
    return find_weights(images, subsets(tmp_path / name, "d/1_dog", "d/5_cat", **options))


def test_the_last_rule_that_matches_gives_each_value(tmp_path: Path) -> None:
    weights, remarks = found(tmp_path, RULES, keep_tokens_separator="|||")
    assert weights.repeats.tolist() == [3, 3, 0, 2, 0]
    assert weights.loss_weight.tolist() == [1.5, 1.5, 1, 0.5, 1]
    assert weights.loss_weight.dtype == np.float32 and remarks == []


def test_rules_that_match_nothing_are_named(tmp_path: Path) -> None:
    weights, remarks = found(tmp_path, '[tags]\n"style" = { repeats = 2 }\n[paths]\n"b*" = { repeats = 1.5 }')
    named = f"{tmp_path / 'rules.toml'}: 1 of 2 rules match no image:"
    assert remarks == [f"{named} tags.'style'. Correct or remove them"]
    _, remarks = found(tmp_path, '[tags]\n"x" = { repeats = 2 }\n[paths]\n"dog/*" = { repeats = 3 }')
    end = "Correct or remove them. Paths are compared with names such as 1_dog/a.png"
    assert remarks == [f"{named} paths.'dog/*'. {end}"]
    assert weights.repeats.tolist() == [1, 1.5, 1, 1, 1]


def test_a_file_of_rows_gives_both_by_image(tmp_path: Path) -> None:
    text = "path,repeats,loss_weight\n1_dog/a,3,\nb.png,,0.25\n5_cat/sub/z2.png,1.5,2\ngone.png,1,1\n"
    weights, remarks = found(tmp_path, text, "rows.csv")
    assert weights.repeats.tolist() == [3, 1, 1, 1, 1.5]
    assert weights.loss_weight.tolist() == [1, 0.25, 1, 1, 2]
    assert remarks == [f"{tmp_path / 'rows.csv'}: 1 of 4 rows name no image, for example gone.png"]


def test_subsets_without_the_option_are_not_weighted(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('[tags]\n"x" = { repeats = 4 }')
    images = table((0, "a.png", ["x"]), (1, "a.png", ["x"]))
    both = [*subsets(tmp_path / "r.toml", "a"), *subsets(None, "b")]
    assert find_weights(images, both)[0].repeats.tolist() == [4, 1]


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("", "r.toml", "the file holds no rules"),
        ("style_a = 3", "r.toml", "style_a: must be a table of rules"),
        ("[tag]\nx = { repeats = 3 }", "r.toml", r"tag: must be a table of rules, \[tags\] or \[paths\]"),
        ("[tags]\nx = 3", "r.toml", r"tags.'x' = 3: must be a table of repeats and loss_weight"),
        ("[tags]\nx = { repeat = 3 }", "r.toml", "must be a table of repeats and loss_weight"),
        ("[tags]\nx = { repeats = -1 }", "r.toml", "repeats must be a number of at least 0"),
        ("[tags]\nx = { repeats = true }", "r.toml", "repeats must be a number of at least 0"),
        ("[tags]\nx = { repeats = nan }", "r.toml", "repeats must be a number of at least 0"),
        ("[tags]\nx = { loss_weight = 0 }", "r.toml", "loss_weight must be a number above 0"),
        ("[tags]\nx = { repeats = 1.3 }", "r.toml", "1.3 times num_repeats, 2, is no whole number"),
        ("[tags\n", "r.toml", "not valid TOML"),
        ("path,x\na,1\n", "r.csv", "neither a column repeats nor loss_weight: .*; the columns are path, x"),
        ("path,repeats\na.png,many\nb.png,-2\n", "r.csv", "repeats must be .*; 2 rows hold 'many', '-2'"),
        ("path,loss_weight\na.png,0\n", "r.csv", "loss_weight must be a number above 0"),
    ],
)
def test_mistakes_in_the_file_are_named_with_what_to_do(tmp_path: Path, text: str, name: str, message: str) -> None:
    text = text if "1.3" not in text else text.replace("x =", '"x" =')
    with pytest.raises(UserError, match=message) as error:
        found(tmp_path, text, name)
    assert str(tmp_path / name) in str(error.value)


def test_rules_are_read_in_the_order_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('[paths]\n"a" = { repeats = 1 }\n[tags]\n"b" = { repeats = 2 }\n"a" = {repeats=3}')
    assert [(rule.table, rule.pattern) for rule in read_rules(tmp_path / "r.toml")] == [
        ("paths", "a"), ("tags", "b"), ("tags", "a"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("5_cat/*", ["5_cat/a.png", "5_cat/é.png"], ["5_cat/x/a.png", "15_cat/a.png"]),
        ("5_cat/**", ["5_cat/a.png", "5_cat/x/a.png"], ["4_cat/a.png"]),
        ("*.png", ["5_cat/a.png", "5_cat/x/b.png"], ["5_cat/a.png.jpg"]),
        ("**/a?.png", ["5_cat/a1.png", "5_cat/x/aé.png"], ["5_cat/a12.png", "5_cat/a/.png"]),
        ("a[12](1)+.png", ["5_cat/a1(1)+.png"], ["5_cat/a3(1)+.png", "5_cat/a1111.png"]),
        ("a[.png", ["5_cat/a[.png"], ["5_cat/a.png"]),
    ],
)
def test_paths_match_as_in_a_shell(pattern: str, matching: list[str], others: list[str]) -> None:
    start = "^" if "/" in pattern else "(?:^|/)"
    names = pa.array([name.encode() for name in [*matching, *others]], pa.large_binary())
    result = pa.compute.match_substring_regex(names, f"{start}{glob_regex(pattern)}$").to_pylist()
    assert result == [True] * len(matching) + [False] * len(others)


WORDS = st.sampled_from(["style_a", "Style B", "x", "style a", "", "solo", "a_style"])


@given(
    st.lists(st.lists(st.none() | st.lists(WORDS).map(", ".join), max_size=2), max_size=8),
    st.lists(st.sampled_from(["style_*", "style_a", "*", "STYLE B", "x?", "[sx]*"]), max_size=4),
)
def test_tags_are_found_as_plain_python_finds_them(captions, patterns) -> None:
    def tags(texts) -> set[str]:
        parts = [part for text in texts if text is not None for part in text.split(",")]
        return {part.strip().lower().replace("_", " ") for part in parts if part.strip()}

    expected = {
        (row, number)
        for row, texts in enumerate(captions)
        for number, pattern in enumerate(patterns)
        if any(fnmatch.fnmatchcase(tag, pattern.lower().replace("_", " ")) for tag in tags(texts))
    }
    column = pa.array(captions, pa.large_list(pa.large_string()))
    separators = separators_of(Subset(num_repeats=1, class_tokens=None))
    pairs = [
        pair
        for rows, numbers in find_tags(column, np.arange(len(captions)), separators, TagPatterns(patterns))
        for pair in zip(rows.tolist(), numbers.tolist(), strict=True)
    ]
    assert len(pairs) == len(set(pairs)) and set(pairs) == expected


def test_break_ends_a_tag_with_caption_break(tmp_path: Path) -> None:
    rules = '[tags]\n"style_a" = { repeats = 3 }\n"b" = { repeats = 5 }\n"breakfast" = { repeats = 7 }'
    (tmp_path / "rules.toml").write_text(rules)
    images = table((0, "1.png", ["x, style_a BREAK y"]), (0, "2.png", ["x BREAK b"]), (0, "3.png", ["x, BREAKFAST"]))
    for caption_break, repeats in ((True, [3, 5, 7]), (False, [1, 1, 7])):
        own = subsets(tmp_path / "rules.toml", "d/1_dog", caption_break=caption_break)
        assert find_weights(images, own)[0].repeats.tolist() == repeats
