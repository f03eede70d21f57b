"""Marks: what scores and rules make of the images of a real folder, from every source, and what is counted."""

import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from sdxl_finetune.config import Subset
from sdxl_finetune.config.dataset import mark_problems
from sdxl_finetune.data import marks as marks_module
from sdxl_finetune.data.batch_plan import build_plan
from sdxl_finetune.data.caption_lengths import measure_captions
from sdxl_finetune.data.index import Index, build_index
from sdxl_finetune.data.marks import find_marks
from sdxl_finetune.data.tokens import Tokenizer
from sdxl_finetune.errors import UserError

RELEASE = "masterpiece > 0.75, high quality > 0.6, normal quality > 0.5, low quality > 0.3, worst quality"
NAMES = ["a.png", "b.png", "c.png", "d.png", "e.png", "f.png"]
SCORES = [0.9, 0.75, 0.6, 0.5, 0.3, 0.1]
EXPECTED = ["masterpiece", "high quality", "normal quality", "low quality", "worst quality", "worst quality"]


@pytest.fixture
def folder(tmp_path: Path, write_images) -> Path:
    write_images(tmp_path / "5_cat", dict.fromkeys(NAMES, (64, 64)))
    for number, name in enumerate(NAMES):
        rating = "rating:safe" if number % 2 else "rating:explicit"
        (tmp_path / "5_cat" / name).with_suffix(".txt").write_text(f"style_{name[0]}, {rating}, 1girl")
    return tmp_path / "5_cat"


@pytest.fixture
def build(folder: Path, subset, dataset) -> Callable[..., Index]:
    def build(*, skip_check: bool = False, **options) -> Index:
        own = subset(folder, caption_extension=".txt", **options)
        return build_index([dataset(own)], folder.parent / "cache", "stop", skip_check=skip_check)

    return build


def tags(index: Index) -> list[str | None]:
    return [index.quality_tag(row) for row in range(len(index))]


def write_scores(folder: Path, scores: list[float], kind: str) -> str:
    if kind == ".score":
        for name, score in zip(NAMES, scores, strict=True):
            (folder / name).with_suffix(".score").write_text(f" {score}\n")
        return kind
    if kind == ".json":
        for name, score in zip(NAMES, scores, strict=True):
            (folder / name).with_suffix(".json").write_text(json.dumps({"score": score, "model": "x"}))
        return kind
    path = folder.parent / "scores.parquet"
    pa.parquet.write_table(pa.table({"path": NAMES, "score": scores}), path)
    return str(path)


@pytest.mark.parametrize("kind", [".score", ".json", "parquet"])
def test_scores_become_tags(folder: Path, build, kind: str) -> None:
    index = build(quality_tags=RELEASE, quality_scores=write_scores(folder, SCORES, kind))
    assert tags(index) == EXPECTED
    assert index[0].quality == "masterpiece"
    last = index.describe().splitlines()[-1]
    assert (
        last == "quality tags: masterpiece 1, high quality 1, normal quality 1, low quality 1, worst quality 2, none 0"
    )


def test_scores_of_the_listing_are_used_without_a_file(tmp_path: Path, subset) -> None:
    columns = {
        "subset": pa.array([0] * 8, pa.int32()),
        "name": pa.array([f"{number}.png".encode() for number in range(8)], pa.large_binary()),
        "captions": pa.array([["x"]] * 8, pa.large_list(pa.large_string())),
        "score": pa.array([*SCORES, math.nan, math.inf], pa.float32()),
    }
    table = pa.table(columns).replace_schema_metadata({"digest": "x"})
    marks = find_marks(table, [subset(tmp_path, quality_tags=RELEASE)], tmp_path / "cache")
    assert marks["quality"].to_pylist() == [0, 1, 2, 3, 4, 4, -1, -1]


def test_an_index_without_the_options_is_that_of_before(folder: Path, build) -> None:
    plain = build()
    assert "quality" not in plain._table.column_names
    assert tags(plain) == [None] * 6 and plain.loss_weights([0, 3]).tolist() == [1, 1]
    assert not plain.describe_marks() and not {"quality tags", "loss weights"} & plain.facts().keys()
    marked = build(quality_tags=RELEASE, quality_scores=write_scores(folder, SCORES, "parquet"))
    assert {"quality tags", "loss weights"} <= marked.facts().keys() and marked.path != plain.path


def test_quality_tags_count_as_tokens_of_captions(folder: Path, build) -> None:
    tokenizer = Tokenizer(max_token_length=75)
    plain = measure_captions(build(), tokenizer).tokens
    marked = build(quality_tags=RELEASE, quality_scores=write_scores(folder, SCORES, "parquet"))
    assert measure_captions(marked, tokenizer).tokens - plain == sum(
        tokenizer.count(f"{tag},").tokens for tag in EXPECTED
    )


def test_marks_are_kept_until_something_changes(folder: Path, build, monkeypatch, caplog) -> None:
    options = {"quality_tags": RELEASE, "quality_scores": write_scores(folder, [*SCORES[:5], math.nan], "parquet")}
    first = build(**options)
    remark = [record.getMessage() for record in caplog.records if "quality_missing" in record.getMessage()]
    caplog.clear()
    calls = []
    mark = marks_module._mark
    monkeypatch.setattr(marks_module, "_mark", lambda *given: calls.append(1) or mark(*given))
    again = build(**options)
    assert not calls and again.path == first.path
    assert [record.getMessage() for record in caplog.records if "quality_missing" in record.getMessage()] == remark
    write_scores(folder, SCORES[::-1], "parquet")
    os.utime(folder.parent / "scores.parquet", ns=(1, 1))
    turned = ["worst quality", "worst quality", "low quality", "normal quality", "high quality", "masterpiece"]
    assert tags(build(**options)) == turned and len(calls) == 1
    for path in (folder.parent / "cache" / "marks").iterdir():
        path.write_bytes(path.read_bytes()[:-9])
    assert tags(build(**options)) == turned and len(calls) == 2


def test_changed_files_beside_images_are_read_again(folder: Path, build) -> None:
    options = {"quality_tags": RELEASE, "quality_scores": write_scores(folder, SCORES, ".score")}
    assert tags(build(**options)) == EXPECTED
    (folder / "a.score").write_text("0.2")
    (folder / "b.score").unlink()
    assert tags(build(**options, skip_check=True)) == EXPECTED
    assert tags(build(**options)) == ["worst quality", None, *EXPECTED[2:]]
    (folder / "b.score").write_text("0.99")
    assert tags(build(**options)) == ["worst quality", "masterpiece", *EXPECTED[2:]]


def test_scores_that_cannot_be_used_are_counted_by_kind(folder: Path, build, caplog) -> None:
    (folder.parent / "s.csv").write_text("path,score\na.png,0.9\nb.png,high\nc.png,nan\nd.png,inf\ne.png,\nx.png,1\n")
    options = {"quality_tags": RELEASE, "quality_scores": str(folder.parent / "s.csv")}
    assert tags(build(**options)) == ["masterpiece", None, None, None, None, None]
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert f"{folder.parent / 's.csv'}: 1 of 6 rows name no image, for example x.png" in said
    rule = "quality_missing = 'none': "
    for count, state in {
        "2": "have no score, for example 5_cat/e.png, 5_cat/f.png",
        "1": "have scores that are no numbers, for example 5_cat/b.png",
    }.items():
        assert f"{rule}{count} of 6 images {state}: they get no quality tag" in said
    assert sum("not a number (NaN), for example 5_cat/c.png" in line for line in said) == 1
    assert sum("infinite, for example 5_cat/d.png" in line for line in said) == 1


@pytest.mark.parametrize("rule", ["skip", "stop", "normal quality"])
def test_the_rule_for_images_without_a_score(folder: Path, build, rule: str) -> None:
    options = {"quality_tags": RELEASE, "quality_scores": ".score", "quality_missing": rule}
    for name in NAMES[:5]:
        (folder / name).with_suffix(".score").write_text("0.9")
    if rule == "stop":
        with pytest.raises(
            UserError, match="quality_missing = 'stop': 1 of 6 images have no score, for example 5_cat/f"
        ):
            build(**options)
        return
    index = build(**options)
    assert index.repeats.tolist() == [1] * 5 + [0 if rule == "skip" else 1]
    assert tags(index) == ["masterpiece"] * 5 + [None if rule == "skip" else "normal quality"]
    assert index.used.tolist() == [True] * 5 + [rule != "skip"]


def test_shares_within_the_groups_of_a_rating_tag_and_of_a_column(folder: Path, build, caplog) -> None:
    caplog.set_level(logging.INFO)
    options = {"quality_tags": "best top 34%, rest", "quality_scores": write_scores(folder, SCORES, "parquet")}
    assert tags(build(**options)) == ["best"] * 3 + ["rest"] * 3  # ceil(0.34 * 6) = 3
    own = tags(build(**options, quality_groups="rating:safe, rating:explicit"))
    assert own == ["best", "best", "best", "best", "rest", "rest"]  # ceil(0.34 * 3) = 2 of each
    path = folder.parent / "scores.parquet"
    table = pa.parquet.read_table(path).append_column("rating", pa.array(["x", "x", "x", "y", "y", None]))
    pa.parquet.write_table(table, path)
    assert tags(build(**options, quality_groups="column:rating")) == ["best", "best", "rest", "best", "rest", "best"]
    said = [record.getMessage() for record in caplog.records]
    assert "quality_tags: group rating:safe (images: 3): best top 34% = score >= 0.5" in said
    assert "quality_tags: group (none) (images: 1): best top 34% = score >= 0.1" in said


def test_a_missing_column_is_named_with_those_that_exist(folder: Path, build) -> None:
    options = {"quality_tags": RELEASE, "quality_scores": write_scores(folder, SCORES, "parquet")}
    there = r"name another of its columns, which are path, score$"
    with pytest.raises(UserError, match=rf"quality_column = 'aesthetic': .* has no such column: {there}"):
        build(**options, quality_column="aesthetic")
    with pytest.raises(UserError, match=rf"quality_groups = 'column:rating': .* has no such column: {there}"):
        build(**options, quality_groups="column:rating")


def test_subsets_have_tags_of_their_own(folder: Path, subset, dataset, write_images) -> None:
    write_images(folder.parent / "1_dog", {"a.png": (64, 64), "b.png": (64, 64)})
    for name, score in {"a": 0.9, "b": 0.1}.items():
        (folder.parent / "1_dog" / f"{name}.score").write_text(str(score))
    write_scores(folder, SCORES, ".score")
    first = subset(folder, quality_tags=RELEASE, quality_scores=".score")
    second = subset(folder.parent / "1_dog", quality_tags="nice > 0.5", quality_scores=".score")
    third = subset(folder.parent / "3_x")
    write_images(folder.parent / "3_x", {"a.png": (64, 64)})
    index = build_index([dataset(first, second, third)], folder.parent / "cache", "stop")
    assert tags(index) == [*EXPECTED, "nice", None, None]
    assert index.describe_marks()[1] == "quality tags: nice 1, none 1"


def test_rules_change_repeats_and_loss_weights_of_the_plan(folder: Path, build) -> None:
    rules = '[tags]\n"style_a" = { repeats = 3 }\n"style_b" = { repeats = 0 }\n"rating:safe" = { loss_weight = 2.5 }\n'
    (folder.parent / "rules.toml").write_text(rules)
    index = build(num_repeats=2, image_weights=folder.parent / "rules.toml")
    assert index.repeats.tolist() == [6, 0, 2, 2, 2, 2]
    assert index.loss_weights(range(6)).tolist() == [1, 2.5, 1, 2.5, 1, 2.5]
    assert index.describe_marks() == [
        "repeats: 2 for 4 images, 6 for 1 images",
        "loss weights: 1 for 3 images, 2.5 for 2 images",
    ]
    rows = build_plan(index, ranks=1, accumulation=1, seed=0).epoch(0).rows
    assert np.bincount(rows, minlength=6).tolist() == [6, 0, 2, 2, 2, 2]


def test_held_out_images_keep_their_tags_unless_they_are_left_out(folder: Path, build) -> None:
    (folder.parent / "rules.toml").write_text('[tags]\n"1girl" = { repeats = 2 }\n')
    options = {"validation_split": 0.5, "image_weights": folder.parent / "rules.toml"}
    index = build(**options)
    assert index.held_out.sum() == 3 and sorted(index.repeats.tolist()) == [0, 0, 0, 2, 2, 2]
    held = [NAMES[row][0] for row in np.flatnonzero(index.held_out)]
    (folder.parent / "rules.toml").write_text(f'[tags]\n"style_{held[0]}" = {{ repeats = 0 }}\n')
    assert build(**options).held_out.sum() == 2


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"quality_missing": "lowest quality"}, "quality_missing must be one of quality_tags or of none, skip, stop"),
        ({"caption_separator": " "}, "quality_tags the tag 'high quality' holds ' ', the caption_separator"),
        ({"quality_scores": "none.csv"}, "quality_scores no such file"),
        ({"quality_scores": "ftp://host/scores.csv"}, "quality_scores addresses start with s3://, gs://"),
        ({"quality_scores": "s3://bucket/scores.csv"}, ""),
        ({"quality_groups": "column:x"}, "quality_groups needs quality_scores, the file with this column"),
        ({"quality_scores": ".score", "quality_groups": "column:x"}, "quality_groups needs quality_scores"),
        ({"image_weights": Path("none.toml")}, "image_weights no such file"),
        ({"quality_tags": None, "quality_missing": "x"}, ""),
        ({"quality_missing": "low quality", "quality_groups": "safe", "quality_scores": ".score"}, ""),
    ],
)
def test_options_of_a_subset_are_checked(options: dict, problem: str) -> None:
    one = Subset(**{"num_repeats": 1, "class_tokens": None, "quality_tags": RELEASE, **options})
    found = [" ".join(each) for each in mark_problems(one, one, one)]
    assert len(found) == bool(problem) and "".join(found).startswith(problem)
