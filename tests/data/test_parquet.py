"""Parquet metadata: columns under their usual or given names, of any type that holds them, and their mistakes."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from sdxl_finetune.config.caption_sources import read_sources
from sdxl_finetune.data.scan import scan
from sdxl_finetune.data.sources import parquet
from sdxl_finetune.data.sources.listed import Listing
from sdxl_finetune.data.sources.metadata import read_metadata
from sdxl_finetune.errors import UserError

Read = Callable[..., Listing]


@pytest.fixture
def read(tmp_path: Path, subset) -> Read:
    """read(columns, row_group_size=None, **options): the listing of a Parquet file of these columns."""

    def read(columns: dict, row_group_size: int | None = None, **options: object) -> Listing:
        path = tmp_path / "meta.parquet"
        pa.parquet.write_table(pa.table(columns), path, row_group_size=row_group_size)
        return read_metadata(subset(tmp_path, metadata_file=path, **options), tmp_path)

    return read


def rows(listing: Listing, *names: str) -> list[tuple]:
    return [tuple(row[name] for name in names) for row in listing.table.to_pylist()]


def messages(listing: Listing) -> list[str]:
    return [problem.message for problem in listing.problems.problems()]


def test_all_columns(read: Read) -> None:
    listing = read(
        {
            "file_name": ["b.jpg", "a.png", "c.webp"],
            "caption": ["a cat", None, ""],
            "tags": [["1cat", "sitting"], ["1dog"], None],
            "score": [0.5, None, float("nan")],
            "width": [30.0, float("nan"), 50.0],  # as pandas writes whole numbers with gaps
            "height": [40, 50, 60],
            "train_resolution": [[64, 96], None, [32, 32]],
            "url": ["x", "y", "z"],
        }
    )
    assert not listing.problems
    assert rows(listing, "name", "captions", "score") == [
        (b"a.png", ["1dog"], None),
        (b"b.jpg", ["a cat,1cat, sitting"], 0.5),
        (b"c.webp", [""], None),
    ]
    sides = ("width", "height", "train_width", "train_height")
    assert rows(listing, *sides) == [(None,) * 4, (30, 40, 64, 96), (50, 60, 32, 32)]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_texts_of_any_type(read: Read, kind: pa.DataType) -> None:
    texts = {name: pa.array(values).cast(kind) for name, values in {"path": ["a.png"], "text": ["a cat"]}.items()}
    assert rows(read(texts), "name", "captions") == [(b"a.png", ["a cat"])]


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint64(), pa.float32(), pa.decimal128(21, 2), pa.string()])
def test_scores_of_any_type(read: Read, kind: pa.DataType) -> None:
    columns = {"key": ["a.png", "b.png"], "aesthetic": pa.array([5, None]).cast(kind)}
    assert rows(read(columns, metadata_columns=("path=key", "score=aesthetic")), "score") == [(5.0,), (None,)]


def test_the_same_captions_as_from_json(read: Read, subset, tmp_path: Path) -> None:
    captions = ["a cat\n\na tabby", "", "a dog", "a\tbird "]
    tags = ["1cat,\nsitting", "1dog", "", ""]
    for options in ({}, {"enable_wildcard": True}, {"caption_separator": "; "}):
        listing = read({"path": [f"{n}.png" for n in range(4)], "caption": captions, "tags": tags}, **options)
        path = tmp_path / "meta.jsonl"
        path.write_text(
            "\n".join(
                f'{{"image_path": "{n}.png", "caption": {one!r}, "tags": {other!r}}}'.replace("'", '"')
                for n, (one, other) in enumerate(zip(captions, tags, strict=True))
            )
        )
        assert listing.table.equals(read_metadata(subset(tmp_path, metadata_file=path, **options), tmp_path).table)


def test_caption_sets(read: Read) -> None:
    columns = {"path": ["a.png", "b.png"], "tags": [["1", "2"], None], "short": ["", "b"], "caption": ["unused"] * 2}
    listing = read(columns, caption_sources=read_sources("short:0.2, tags"))
    assert rows(listing, "captions") == [([None, "1, 2"],), (["b", None],)]
    assert rows(read(columns, caption_sources=read_sources(".txt")), "captions") == [(None,), (None,)]
    with pytest.raises(UserError, match="caption_sources: there is no column long; the columns are path, tags"):
        read(columns, caption_sources=read_sources("tags, long"))


def test_without_captions_the_files_beside_the_images_are_read(
    read: Read, tmp_path: Path, subset, write_images
) -> None:
    write_images(tmp_path, {"a.png": (64, 64), "b.png": (64, 64)})
    (tmp_path / "a.txt").write_text("beside")
    read({"path": ["a.png", "b.png"], "score": [1.0, 2.0]})
    table, problems = scan(
        [subset(tmp_path, metadata_file=tmp_path / "meta.parquet", caption_extension=".txt")], tmp_path
    )
    assert table["captions"].to_pylist() == [["beside"], [""]] and table["score"].to_pylist() == [1, 2] and not problems


def test_wrong_rows_are_problems_of_their_kind(read: Read) -> None:
    listing = read(
        {
            "path": ["a.png", None, "", "d.png", "e.png", "f.png", "a.png", "h.png", "a\0.png"],
            "caption": ["x"] * 9,
            "score": ["1", "2", "3", "good", "nan?", " 0.5 ", "1", "inf", "1"],
            "image_size": [[1, 2], [1, 2], [1, 2], [1, 2], [1], None, [1, 2], [0, 5], [1, 2]],
        }
    )
    assert rows(listing, "name", "score", "width") == [(b"a.png", 1.0, 1), (b"f.png", 0.5, None)]
    assert len(listing.problems) == 7
    assert messages(listing) == [
        "row 2: path is missing",
        "and 1 more of this kind: row 2: path is missing",
        "row 9: path holds a null character",
        "row 4: score is no number",
        "and 2 more of this kind: row 4: score is no number",
        "row 7: the image is named in an earlier row (a.png)",
    ]


def test_infinite_scores_and_impossible_sizes(read: Read) -> None:
    names = [f"{number}.png" for number in range(5)]
    sides = {"width": [1, -1, 2.5, 1, 1e12], "height": [1] * 5}
    listing = read({"path": names, "caption": names, "score": [1, 2, 3, float("inf"), 5], **sides})
    assert rows(listing, "name") == [(b"0.png",)]
    assert messages(listing) == [
        "row 4: score is infinite",
        "row 2: width is no number of pixels",
        "and 2 more of this kind: row 2: width is no number of pixels",
    ]


def test_captions_that_are_not_utf_8(read: Read) -> None:
    texts = pa.array([b"caf\xe9", b"caf\xc3\xa9"]).view(pa.string())
    listing = read({"path": ["a.png", "b.png"], "caption": texts})
    assert rows(listing, "captions") == [(["café"],)] and messages(listing) == ["row 1: caption is not UTF-8"]


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        (
            {"image": ["a"]},
            {},
            r'no column names the images .*the columns are image: set metadata_columns = "path=NAME"',
        ),
        (
            {"path": [3.0], "caption": ["x"]},
            {},
            "path is double, and must be text or whole numbers: write it so, or name another with metadata_columns",
        ),
        ({"path": ["a"], "caption": [3.5]}, {}, "the column caption is double, and must be text, or lists of texts"),
        ({"path": ["a"], "score": [[1]]}, {}, "the column score is list<.*>, and must be numbers"),
        ({"path": ["a"], "image_size": ["64x64"]}, {}, "the column image_size is string, and must be lists of two"),
        ({"path": ["a"]}, {"metadata_columns": ("score=rank",)}, "metadata_columns = 'score=rank': there is no column"),
        ({"path": []}, {}, "names no images"),
    ],
)
def test_files_of_no_use(read: Read, columns: dict, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(columns, **options)


def test_damaged_truncated_and_missing_files(tmp_path: Path, subset, read: Read) -> None:
    read({"path": [f"{number}.png" for number in range(1000)], "caption": ["x"] * 1000}, row_group_size=100)
    path = tmp_path / "meta.parquet"
    whole = path.read_bytes()
    for damaged in (b"", b"PAR1", whole[: len(whole) // 2], whole[:-1], b"\0" * 400 + whole[400:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"meta\.parquet: not readable as a Parquet file \(.+\): it is truncated"):
            read_metadata(subset(tmp_path, metadata_file=path), tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"meta\.parquet: .*(No such|no such)"):
        read_metadata(subset(tmp_path, metadata_file=path), tmp_path)


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, subset, read: Read, monkeypatch) -> None:
    read({"path": ["a.png"], "caption": ["x"]})
    chunk = parquet._chunk

    def touch(subset, path, *rest):
        path.write_bytes(path.read_bytes() + b"more")
        return chunk(subset, path, *rest)

    monkeypatch.setattr(parquet, "_chunk", touch)
    with pytest.raises(UserError, match="was changed while it was read"):
        read_metadata(subset(tmp_path, metadata_file=tmp_path / "meta.parquet"), tmp_path)


def test_a_folder_of_files_and_many_row_groups(tmp_path: Path, subset, read: Read, monkeypatch) -> None:
    monkeypatch.setattr(parquet, "CHUNK", 7)
    folder = tmp_path / "parts"
    folder.mkdir()
    names = [f"{number:03}.png" for number in range(100)]
    for part in range(2):
        own = names[part::2]
        table = pa.table({"path": own, "caption": [name[:3] for name in own]})
        pa.parquet.write_table(table, folder / f"{part}.parquet", row_group_size=9)
    (folder / "stats.json").write_text("{}")
    listing = read_metadata(subset(tmp_path, metadata_file=folder), tmp_path)
    assert rows(listing, "name", "captions") == [(name.encode(), [name[:3]]) for name in names]
    with pytest.raises(UserError, match=r"is neither a \.json"):
        read_metadata(subset(tmp_path, metadata_file=tmp_path / "nowhere"), tmp_path)


def test_names_without_endings(tmp_path: Path, read: Read) -> None:
    for name in ("one.v2.webp", "two.PNG", "three.jpg", "three.png"):
        (tmp_path / name).touch()
    listing = read({"path": ["one.v2", "two", "three", "four", "five.jpg"], "caption": ["x"] * 5})
    assert rows(listing, "name") == [(b"five.jpg",), (b"one.v2.webp",), (b"two.PNG",)]
    several, missing = messages(listing)
    assert several.startswith("row 3: several images have this name") and missing.startswith("row 4: no image has this")


@pytest.mark.parametrize("kind", [pa.int64(), pa.uint32()])
def test_a_column_of_whole_numbers_names_images(tmp_path: Path, read: Read, kind: pa.DataType) -> None:
    for name in ("12345.jpg", "7.png", "0009.png"):
        (tmp_path / name).touch()
    ids = pa.array([12345, 7, None, 9], pa.int32()).cast(kind)
    listing = read({"id": ids, "tags": ["1cat", "1dog", "x", "y"]})
    assert rows(listing, "name", "captions") == [(b"12345.jpg", ["1cat"]), (b"7.png", ["1dog"])]
    nameless, padded = messages(listing)
    assert nameless == "row 3: id is missing" and padded.startswith("row 4: no image has this name")
