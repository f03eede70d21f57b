"""Files made from a tag report: the CSV file opens as it should, and image_weights takes the suggested repeats."""

import builtins
import csv
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sdxl_finetune.commands.check import check
from sdxl_finetune.config import Config, load_config
from sdxl_finetune.data.tag_columns import TagPatterns
from sdxl_finetune.data.tags import comparable
from sdxl_finetune.data.weights import read_rules
from sdxl_finetune.output.log import Log
from sdxl_finetune.pages import rendering
from sdxl_finetune.tag_report.outputs import write_files, write_tag_page
from sdxl_finetune.tag_report.scalars import MOST_TAGS, log_scalars, tag_scalars
from sdxl_finetune.tag_report.schema import TAGS, Report, save_report
from sdxl_finetune.tag_report.tables import tag_rows, write_csv
from sdxl_finetune.tag_report.trends import MOST_REPORTS, read_moments
from sdxl_finetune.tag_report.underfitted import rule_pattern, suggest_repeats, write_underfitted
from sdxl_finetune.training.checks import index_images
from tests.tag_report.made_up import ODD, facts, images_table, made_report, tags_table

LEARNED = [
    {"tag": "known", "state": "learned", "exposures": 900, "accuracy": 0.9},
    {"tag": "well known", "state": "learned", "exposures": 1100, "accuracy": 0.9},
]


def suggested(*rows: dict) -> dict[str, int]:
    found = suggest_repeats(tag_rows(tags_table([*LEARNED, *rows])))
    assert found.target == 1000
    return {one.row.tag: one.repeats for one in found.underfitted}


def test_the_csv_file_holds_the_table(tmp_path) -> None:
    report = made_report(8, names=ODD)
    write_csv(tmp_path / "t.csv", report.tags)
    assert (tmp_path / "t.csv").read_bytes().startswith(b"\xef\xbb\xbf")
    with (tmp_path / "t.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["tag", "state", *(name for name in TAGS.names if name not in ("tag", "state"))]
    for row, wanted in zip(rows, report.tags.to_pylist(), strict=True):
        assert row["tag"].removeprefix("'") == wanted["tag"]
        assert int(row["exposures"]) == wanted["exposures"] and row["state"] == wanted["state"]
        assert float(row["gain"]) == pytest.approx(wanted["gain"], abs=1e-5)
    assert len(rows[0]["accuracy"]) <= 7, "rounded decimals, not those of a float32"


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, unique=True))
@example(["=1+1", "+x", "-_-", "@_@", "\t=1", "＝1", 'a"b', "a,b", "a;b", "a\nb", "'=1"])
def test_no_tag_is_a_formula_and_all_come_back(tmp_path_factory, tags) -> None:
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    write_csv(path, tags_table([{"tag": tag} for tag in tags]))
    with path.open(encoding="utf-8-sig", newline="") as file:
        found = [row["tag"] for row in csv.DictReader(file)]
    for text, tag in zip(found, tags, strict=True):
        assert text == tag or text == "'" + tag
        assert not re.match(r"[=+\-@\t\r\n]", text)
    read = pa.csv.read_csv(path, parse_options=pa.csv.ParseOptions(newlines_in_values=True))
    assert read.num_rows == len(tags)


def test_missing_values_are_empty_and_not_nan(tmp_path) -> None:
    write_csv(tmp_path / "t.csv", tags_table([{"tag": "a", "exposures": None, "gain_error": float("nan")}]))
    header, line = (tmp_path / "t.csv").read_text(encoding="utf-8-sig").splitlines()
    found = dict(zip(header.replace('"', "").split(","), line.split(","), strict=True))
    assert (found["exposures"], found["gain_error"], found["gain"]) == ("", "", "0.01")


def test_repeats_bring_a_tag_to_the_exposures_of_the_median_learned_tag() -> None:
    exposures = {"a": 400, "b": 251, "c": 10, "d": 0, "e": 990, "f": 5000, "g": None}
    rows = [{"tag": tag, "exposures": seen} for tag, seen in exposures.items()]
    assert suggested(*rows) == {"a": 3, "b": 4, "c": 10, "d": 10, "e": 2, "f": 2, "g": 2}
    others = [{"tag": state, "state": state} for state in ("contradictory", "unclear")]
    assert suggested(*others) == {}


def test_without_learned_tags_rare_ones_catch_up_with_the_most_frequent() -> None:
    found = suggest_repeats(tag_rows(tags_table([{"tag": "a", "exposures": 100}, {"tag": "b", "exposures": 40}])))
    assert [(one.row.tag, one.repeats) for one in found.underfitted] == [("b", 3)]
    assert [row.tag for row in found.satisfied] == ["a"] and not found.is_learned
    untrained = suggest_repeats(tag_rows(tags_table([{"tag": "a", "exposures": 0}])))
    assert len(untrained.satisfied) == 1 and not untrained.underfitted
    unknown = suggest_repeats(tag_rows(tags_table([{"tag": "a", "exposures": None}])))
    assert unknown.target is None and [one.repeats for one in unknown.underfitted] == [2]


WORDS = st.text("ab_ *?[](\\)", min_size=1, max_size=5)


@given(WORDS | st.text(st.characters(exclude_categories=["Cs"]), min_size=1), WORDS)
@example("?", "a")
@example("*", "a")
@example("[", "a")
@example("?)", "a)")
@example("(?", "a")
@example("(a*:1.2)", "ab")
@example("a[b]c", "abc")
@example("[ab]", "a")
def test_a_rule_matches_its_tag_and_no_other(tag: str, other: str) -> None:
    assume(comparable(tag))
    patterns = TagPatterns([rule_pattern(tag)])
    assert patterns.match(tag) == (0,)
    # A rule for ? or * at the beginning matches [ there, too, because brackets of weights are not compared.
    if comparable(other) != comparable(tag) and not comparable(other).startswith("["):
        assert patterns.match(other) == ()


def test_rule_files_are_read_back_with_the_largest_repeats_last(tmp_path) -> None:
    rows = [{"tag": tag, "exposures": 10 * place} for place, tag in enumerate([*ODD, "a\x7fb", "a\\b", '"', "X*"])]
    same = {"tag": "x*", "exposures": 500}
    report = tag_rows(
        tags_table([*LEARNED, *rows, same, {"tag": "bad\ntag", "state": "contradictory", "exposures": 5000}])
    )
    assert write_underfitted(tmp_path / "u.toml", report, facts(model="a\nb.safetensors"))
    rules = read_rules(tmp_path / "u.toml")
    repeats = [rule.repeats for rule in rules]
    assert repeats == sorted(repeats) and repeats[-1] == 10 and len(repeats) == len(rows)
    patterns = TagPatterns([rule.pattern for rule in rules])
    for row in rows:
        (number,) = patterns.match(row["tag"])
        assert rules[number].repeats == min(10, -(-1000 // max(1, row["exposures"])))
    text = (tmp_path / "u.toml").read_text(encoding="utf-8")
    assert "# They were seen often and are not learned." in text
    assert "#     bad\\ntag: gain 1.0 %, accuracy 0.30 (chance 0.20), seen 5,000 times" in text
    assert patterns.match("bad tag") == ()


def test_without_underfitted_tags_there_is_no_rule_file(tmp_path) -> None:
    path = tmp_path / "00000500.underfitted.toml"
    path.write_text("old")
    tags = tags_table(LEARNED)
    assert [file.name for file in write_files(tmp_path, Report(facts(), tags, images_table(tags)))] == ["00000500.csv"]
    assert not path.exists()


def test_a_file_that_the_config_names_stays_as_it_is(tmp_path, monkeypatch, caplog) -> None:
    path = tmp_path / "tags" / "00000500.underfitted.toml"
    path.parent.mkdir()
    path.write_text("mine")
    monkeypatch.chdir(tmp_path)
    report, named = made_report(12), Path("tags/00000500.underfitted.toml")
    assert write_files(path.parent, report, [named]) == [path.with_name("00000500.csv")]
    assert path.read_text() == "mine" and "Copy the file to another folder" in caplog.text
    assert len(write_files(path.parent, report, [Path("other.toml")])) == 2
    assert path.read_text() != "mine"


def test_sdxl_check_and_the_index_take_the_suggested_repeats(work, write_images, capsys) -> None:
    shutil.rmtree("images")
    captions = {
        "a.png": "cat, dim style",
        "b.png": "dog, known",
        "c.png": "cat, 50* off",
        "d.png": "dim style, 50* off",
    }
    write_images(work / "images", dict.fromkeys(captions, (64, 64)))
    for name, text in captions.items():
        (work / "images" / name).with_suffix(".txt").write_text(text)
    rows = [{"tag": "dim_style", "exposures": 300}, {"tag": "50* off", "exposures": 150}]
    rows.append({"tag": "dog", "exposures": 5000, "state": "contradictory"})
    tags = tags_table([*LEARNED, *rows])
    _, rules = write_files(work / "tags", Report(facts(), tags, images_table(tags)))
    named = re.search(r'image_weights = "(.+)"', rules.read_text())
    assert named and named[1] == "tags/00000500.underfitted.toml"
    options = [
        "--pretrained_model_name_or_path",
        "base.safetensors",
        "--train_data_dir",
        "images",
        "--resolution",
        "64",
    ]
    options += ["--output_dir", "out", "--output_name", "m", "--caption_extension", ".txt", "--image_weights", named[1]]
    config = load_config([*options, "--no_memory", "--max_train_epochs", "1"], program="sdxl-check")
    assert config and check(config) == 0
    seen = capsys.readouterr()
    assert re.search(r"\nrepeats +1 for 1 image.*, 4 for 1 image.*, 7 for 2 images\n", seen.out), seen.out
    assert "match no image" not in seen.err
    index = index_images(config)
    assert {index[row].path.name: int(index.repeats[row]) for row in range(4)} == {
        "a.png": 4, "b.png": 1, "c.png": 7, "d.png": 7,
    }  # fmt: skip


def test_trends_are_those_of_earlier_reports_with_the_same_options(tmp_path, caplog) -> None:
    for step in range(100, 100 * (MOST_REPORTS + 12), 100):
        save_report(tmp_path, made_report(3, step))
    other = made_report(3, 150)
    save_report(tmp_path, Report(facts(150, options={"others": 9}), other.tags, other.images))
    unknown = Report(facts(None, model="m.safetensors"), other.tags, other.images)
    save_report(tmp_path, unknown)
    (tmp_path / "00000050.parquet").write_bytes(b"nothing")
    steps = [moment.step for moment in read_moments(tmp_path, made_report(3, 400))]
    assert steps == [100, 200, 300, 400]
    assert "the trends leave out a file" in caplog.text and "00000050.parquet" in caplog.text
    last = 100 * (MOST_REPORTS + 11)
    many = [moment.step for moment in read_moments(tmp_path, made_report(3, last))]
    assert len(many) == MOST_REPORTS and many[0] == 100 and many[-1] == last
    assert [moment.step for moment in read_moments(tmp_path, unknown)] == [0]


def test_scalars_are_median_worst_tenth_states_and_single_tags() -> None:
    report = made_report(21, names=[":)", ":(", "a b"])
    rows = tag_rows(report.tags)
    found = tag_scalars(rows)
    gains = np.array([row.gain for row in rows])
    assert found["gain/median"] == pytest.approx(np.median(gains))
    assert sum(gains < found["gain/worst_tenth"]) == 2
    assert sum(found[f"states/{state}"] for state in ("learned", "underfitted", "contradictory", "unclear")) == 21
    assert [found[f"gain_of/{name}"] for name in ("__", "__~2", "a_b")] == [row.gain for row in rows[:3]]
    assert not [name for name in tag_scalars(tag_rows(made_report(MOST_TAGS + 1).tags)) if "_of/" in name]
    assert tag_scalars([]) == dict.fromkeys(
        ["states/learned", "states/underfitted", "states/contradictory", "states/unclear"], 0
    )


def test_tensorboard_and_metrics_show_the_scalars(tmp_path) -> None:
    rows = tag_rows(made_report(5).tags)
    config = Config(logging_dir=tmp_path)
    with Log(config, tmp_path / "run", rank=0) as log:
        log.tags(tag_scalars(rows), step=500, epoch=2)
    for step in (500, 1000):
        assert log_scalars(config, rows, step) == tmp_path / "tags"
    for folder, steps in (("run", [500]), ("tags", [500, 1000])):
        events = EventAccumulator(str(tmp_path / folder / "finetuning")).Reload()
        for name, value in tag_scalars(rows).items():
            points = [(event.step, event.value) for event in events.Scalars(f"tags/{name}")]
            assert points == [(step, pytest.approx(value, rel=1e-6)) for step in steps]
    assert '"step": 500, "epoch": 2, "tags": {"gain/median"' in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert log_scalars(Config(), rows, 5) is None


def test_without_plotly_all_but_the_page_is_written(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(rendering.importlib.util, "find_spec", lambda name: None)
    whole = builtins.__import__

    def without(name: str, *rest):
        if name.split(".")[0] in rendering.LIBRARIES:
            raise ImportError(name)
        return whole(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    report = made_report(12)
    with caplog.at_level(logging.WARNING):
        assert len(write_files(tmp_path, report)) == 2
        assert write_tag_page(tmp_path, report) is None
    (record,) = caplog.records
    assert "needs plotly and jinja2" in record.getMessage() and "pip install plotly jinja2" in record.getMessage()
    assert not list(tmp_path.glob("*.html"))
