"""Files of values by image: every format, values of every kind, and which row belongs to which image."""

import json
import math
import os
from pathlib import Path, PureWindowsPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_finetune.data.joined import KINDS, Images, find_rows, join, read_numbers, read_rows
from sdxl_finetune.errors import UserError


def images(*names: str, folder: str = "/data/5_cat") -> Images:
    encoded = pa.array([name.encode() for name in names], pa.large_binary())
    return Images(encoded, np.zeros(len(names), np.int32), [Path(folder)])


def kinds(column) -> list[str]:
    return [KINDS[kind] for kind in read_numbers(pa.chunked_array([column])).kind]


def write(path: Path) -> Path:
    rows = [("a.png", 0.5), ("b.png", 0.25)]
    if path.suffix == ".parquet":
        pa.parquet.write_table(
            pa.table({"score": [score for _, score in rows], "path": [name for name, _ in rows]}), path
        )
    elif path.suffix in (".csv", ".tsv"):
        gap = "," if path.suffix == ".csv" else "\t"
        lines = [
            gap.join(("file_name", "other", "score")),
            *(gap.join((name, "x", str(score))) for name, score in rows),
        ]
        path.write_text("\n".join(lines), encoding="utf-8-sig")
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"image_path": name, "score": score}) for name, score in rows))
    elif path.stem == "plain":
        path.write_text(json.dumps(dict(rows)))
    elif path.stem == "list":
        path.write_text(json.dumps([{"path": name, "score": score} for name, score in rows]))
    else:
        path.write_text(json.dumps({name: {"score": score, "tags": "x"} for name, score in rows}))
    return path


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.tsv", "a.jsonl", "plain.json", "objects.json", "list.json"])
def test_every_format_gives_the_same_columns(tmp_path: Path, name: str) -> None:
    table, there = read_rows(write(tmp_path / name), ["score", "absent"], "score")
    assert "score" in there and "absent" not in there
    assert table.column_names == ["path", "score"]
    assert table["path"].to_pylist() == [b"a.png", b"b.png"]
    assert read_numbers(table["score"]).values.tolist() == [0.5, 0.25]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "x,score\n1,2\n",
            "no column names the images: rename the one with their paths to path; the columns are x, score",
        ),
        ("a.csv", "path,score\n", "the file has no rows"),
        ("a.csv", "path,score\na,1,2\n", "not a valid .csv file"),
        ("a.json", "{", "not a valid .json file"),
        ("a.json", "3", "not a valid .json file"),
        ("a.jsonl", '{"score": 1}\n', "line 1: must be an object with the path of an image"),
        ("a.jsonl", '"x"\n', "line 1: must be an object"),
        ("a.parquet", "no", "not a valid .parquet file"),
        ("a.txt", "", "must end in .csv"),
        ("none.csv", None, "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_reason(tmp_path: Path, name, content, message) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        read_rows(tmp_path / name, ["score"], "score")
    assert str(tmp_path / name) in str(error.value)


def test_values_that_are_no_finite_numbers_are_told_apart() -> None:
    texts = ["0.5", " 1e-3 ", "-.5", "5.", "", None, "high", "nan", "-Inf", "1e400", "1_0", "0x1"]
    expected = ["", "", "", "", "missing", "missing", "no numbers", "not a number (NaN)", "infinite", "infinite"]
    assert kinds(pa.array(texts)) == [*expected, "no numbers", "no numbers"]
    assert kinds(pa.array([1.0, math.nan, math.inf, None])) == ["", "not a number (NaN)", "infinite", "missing"]
    assert kinds(pa.array([1, None])) == ["", "missing"]
    assert kinds(pa.array([True, None])) == ["no numbers", "missing"]
    assert kinds(pa.array([[1.0], None])) == ["no numbers", "missing"]
    assert kinds(pa.nulls(2)) == ["missing", "missing"]
    values = read_numbers(pa.chunked_array([pa.array(texts)])).values
    assert values[:4].tolist() == [np.float32(number) for number in (0.5, 1e-3, -0.5, 5)]
    assert np.isnan(values[4:]).all()


@given(st.lists(st.floats(allow_nan=False, width=32), max_size=20))
def test_numbers_in_text_are_read_as_float32(numbers) -> None:
    column = pa.chunked_array([pa.array([repr(number) for number in numbers], pa.large_string())])
    finite = [number if math.isfinite(number) else math.nan for number in numbers]
    assert np.array_equal(read_numbers(column).values, np.array(finite, np.float32), equal_nan=True)


@pytest.mark.parametrize(
    "paths",
    [
        ["a.png", "sub/b.v2.jpg"],
        ["./a.png", "./sub/b.v2.jpg"],
        ["a", "sub/b.v2"],
        ["5_cat/a.png", "5_cat/sub/b.v2"],
        ["/data/5_cat/a", "/data/5_cat/sub/b.v2.jpg"],
    ],
)
def test_an_image_is_found_by_name_folder_and_absolute_path(tmp_path: Path, paths: list[str]) -> None:
    (tmp_path / "a.csv").write_text("path\nother.png\n" + "\n".join(paths))
    table, _ = read_rows(tmp_path / "a.csv", [], "score")
    remarks: list[str] = []
    row = find_rows(images("a.png", "sub/b.v2.jpg", "c.png"), tmp_path / "a.csv", table, remarks)
    assert row.tolist() == [1, 2, -1]
    assert remarks == [f"{tmp_path / 'a.csv'}: 1 of 3 rows name no image, for example other.png"]


def test_the_most_exact_name_and_the_last_row_win() -> None:
    names = [b"a.png", b"a", b"5_cat/a.png", b"5_cat/a.png", b"x", b"b"]
    found = join(images("a.png", "b.png", "b.jpg"), pa.array(names, pa.large_binary()))
    assert found.row.tolist() == [3, 5, 5]
    assert found.unused.tolist() == [0, 1, 4]
    assert found.shared.tolist() == [5] and found.repeated.tolist() == [2]


def test_an_image_in_a_tar_file_is_found_without_the_name_of_the_tar_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,key\n1,000001\n2,000002.png\n3,b.tar/000003\n4,5_cat/b.TAR/sub/000004.png\n")
    table, _ = read_rows(tmp_path / "a.csv", [], "score")
    packed = images(
        "a.tar/000001.png", "a.tar/000002.png", "b.tar/000003.png", "b.TAR/sub/000004.png", "b.tar/000005.png"
    )
    remarks: list[str] = []
    assert find_rows(packed, tmp_path / "a.csv", table, remarks).tolist() == [0, 1, 2, 3, -1]
    assert remarks == []


def test_each_image_is_joined_below_its_own_folder() -> None:
    names = pa.array([b"1.png", b"1.png"], pa.large_binary())
    both = Images(names, np.array([0, 1]), [Path("/d/5_cat"), Path("/d/1_dog")])
    assert join(both, pa.array([b"1_dog/1.png", b"5_cat/1"], pa.large_binary())).row.tolist() == [1, 0]


def test_paths_as_windows_writes_them(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "scores.csv").write_text("path,score\n.\\5_cat\\a.png,1\nsub\\b,2\nC:\\x\\5_cat\\c.png,3\n")
    names = pa.array([b"a.png", b"sub/b.png", b"c.png"], pa.large_binary())
    found = Images(names, np.zeros(3, np.int32), [PureWindowsPath("C:\\x\\5_cat")])
    monkeypatch.setattr(os, "sep", "\\")
    table, _ = read_rows(tmp_path / "scores.csv", ["score"], "score")
    assert find_rows(found, tmp_path, table, []).tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.jsonl", "a.json"])
def test_whole_numbers_name_images(tmp_path: Path, name: str) -> None:
    path, rows = tmp_path / name, [{"id": 12345, "score": 0.5}, {"id": 7, "score": 0.25}]
    if path.suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        path.write_text("id,score\n12345,0.5\n7,0.25\n")
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    table, _ = read_rows(path, ["score"], "score")
    assert find_rows(images("7.png", "12345.jpg", "8.png"), path, table, []).tolist() == [1, 0, -1]


def test_fractions_name_no_images(tmp_path: Path) -> None:
    pa.parquet.write_table(pa.table({"id": [12345.0], "score": [1.0]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="the column id is double, and must be text or whole numbers: write the names"):
        read_rows(tmp_path / "a.parquet", ["score"], "score")


def test_a_row_without_a_path_is_named_with_its_keys(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"picture": "a.png", "score": 1}')
    with pytest.raises(UserError, match=r"line 1: must be an object with the path .*; its keys are picture, score"):
        read_rows(tmp_path / "a.jsonl", ["score"], "score")
