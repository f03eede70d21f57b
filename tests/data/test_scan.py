"""A scan opens only what has changed since the last one, and finds what a new one would find."""

import json
import logging
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from sdxl_finetune.config import Subset
from sdxl_finetune.data import inspection
from sdxl_finetune.data import scan as scan_module
from sdxl_finetune.data.images import ImageError, image_size
from sdxl_finetune.data.index import build_index
from sdxl_finetune.data.masks import read_mask, without_bad_masks
from sdxl_finetune.data.scan import digest_of, scan
from sdxl_finetune.data.unusable import NUMBERS, Unusable
from sdxl_finetune.errors import Problem
from sdxl_finetune.storage import stat


@pytest.fixture
def folder(tmp_path: Path, write_images) -> Path:
    write_images(tmp_path / "images", {f"{number}.png": (64, 64 + number) for number in range(6)})
    for number in range(4):
        (tmp_path / "images" / f"{number}.txt").write_text(f"caption {number}")
    return tmp_path / "images"


@pytest.fixture
def look(tmp_path: Path) -> Callable[..., tuple[dict[str, list], set[str]]]:
    """look(subset): what a scan with a memory finds, by column, and which files it opened."""
    opened: set[str] = set()
    watching = False

    def watch(event: str, arguments: tuple) -> None:
        if watching and event == "open" and isinstance(arguments[0], (str, Path)) and Path(arguments[0]).exists():
            opened.add(Path(arguments[0]).name)

    sys.addaudithook(watch)

    def run(*subsets: Subset, cache: Path = tmp_path / "cache", **options) -> tuple[dict[str, list], set[str]]:
        nonlocal watching
        opened.clear()
        watching = True
        try:
            table, problems = scan(subsets, cache, **options)
        finally:
            watching = False
        assert not problems
        content = table.to_pydict()
        content["score"] = [None if math.isnan(score) else score for score in content["score"]]
        content["caption"] = [texts[0] for texts in content.pop("captions")]
        content["name"] = [name.decode() for name in content["name"]]
        return content, {name for name in opened if name.endswith((".png", ".txt", ".jpg"))}

    return run


def test_only_what_changed_is_opened(folder: Path, look, subset, write_images, tmp_path: Path) -> None:
    rules = subset(folder, caption_extension=".txt")
    first, opened = look(rules)
    assert opened == {*(f"{number}.png" for number in range(6)), *(f"{number}.txt" for number in range(4))}
    assert look(rules) == (first, set())
    write_images(folder, {"1.png": (99, 64), "9.jpg": (64, 64)})
    (folder / "2.txt").write_text("another")
    (folder / "3.txt").unlink()
    (folder / "4.txt").write_text("a new one")
    (folder / "0.png").unlink()
    os.utime(folder / "5.png", ns=(1, 1))
    found, opened = look(rules)
    assert opened == {"1.png", "2.txt", "4.txt", "5.png", "9.jpg"}
    assert found == look(rules, cache=tmp_path / "another")[0]
    assert found["name"] == ["1.png", "2.png", "3.png", "4.png", "5.png", "9.jpg"]
    assert found["caption"] == ["caption 1", "another", "", "a new one", "", ""]
    assert found["width"][0] == 99
    assert look(rules) == (found, set())


def test_what_is_asked_for_is_part_of_the_memory(folder: Path, look, subset) -> None:
    look(subset(folder, caption_extension=".txt"))
    assert look(subset(folder, caption_extension=".caption"))[0]["caption"] == [""] * 6
    assert look(subset(folder, class_tokens="cls"))[0]["caption"] == ["cls"] * 6
    both, _ = look(subset(folder), subset(folder, caption_extension=".txt"))
    assert both["caption"] == [""] * 6 + [f"caption {number}" for number in range(4)] + [""] * 2


def test_captions_of_a_metadata_file_are_read_each_time(folder: Path, look, subset, tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    rules = subset(folder, metadata_file=path)
    path.write_text(json.dumps({f"{number}.png": {"caption": "a"} for number in range(3)}))
    assert look(rules)[0]["caption"] == ["a"] * 3
    path.write_text(json.dumps({f"{number}.png": {"caption": "b"} for number in (4, 2)}))
    found, opened = look(rules)
    assert (found["name"], found["caption"], opened) == (["2.png", "4.png"], ["b", "b"], {"4.png"})


def test_images_are_opened_only_where_a_metadata_file_gives_no_size(folder: Path, look, subset, tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    rules = subset(folder, metadata_file=path)

    def found(**sizes: list[int]) -> tuple[list[tuple[int, int]], set[str]]:
        entries = {f"{number}.png": {"caption": "a"} for number in range(3)}
        for name, size in sizes.items():
            entries[f"{name[1:]}.png"]["image_size"] = size
        path.write_text(json.dumps(entries))
        content, opened = look(rules)
        return list(zip(content["width"], content["height"], strict=True)), opened

    assert found(_0=[10, 20], _1=[30, 40]) == ([(10, 20), (30, 40), (64, 66)], {"2.png"})
    assert found(_0=[10, 20], _1=[30, 40]) == ([(10, 20), (30, 40), (64, 66)], set())
    assert found(_0=[10, 21], _2=[50, 60]) == ([(10, 21), (64, 65), (50, 60)], {"1.png"})


def test_captions_are_joined_again_after_the_separator_has_changed(folder: Path, look, subset, tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text(json.dumps({"0.png": {"caption": "a\nb", "tags": "c"}}))
    for options, caption in [
        ({}, "a\nb,c"),
        ({"caption_separator": ";"}, "a\nb;c"),
        ({"caption_separator": ";", "enable_wildcard": True}, "a;c\nb;c"),
    ]:
        assert look(subset(folder, metadata_file=path, **options), skip_check=True)[0]["caption"] == [caption]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "text", "another table"])
def test_a_damaged_file_is_named_and_not_trusted(folder: Path, look, subset, tmp_path, caplog, damage: str) -> None:
    rules = subset(folder, caption_extension=".txt")
    first, _ = look(rules)
    (path,) = (tmp_path / "cache" / "scans").glob("*.scan")
    data = bytearray(path.read_bytes())
    at = data.index(b"caption 2")
    data[at] ^= 1
    content = {"flip": bytes(data), "cut": bytes(data[: at + 3]), "empty": b"", "text": b"no Arrow file"}
    if damage == "another table":
        with pa.ipc.new_file(str(path), scan_module.SCANNED) as writer:
            writer.write_table(scan_module.SCANNED.empty_table())
    else:
        path.write_bytes(content[damage])
    with caplog.at_level(logging.WARNING):
        found, opened = look(rules)
    assert found == first and len(opened) == 10
    assert f"{path} is damaged" in caplog.text
    caplog.clear()
    assert look(rules) == (first, set()) and not caplog.text


def test_without_the_check_nothing_is_looked_at(folder: Path, look, subset) -> None:
    rules = subset(folder, caption_extension=".txt")
    first, _ = look(rules, skip_check=True)
    assert len(first["name"]) == 6
    (folder / "0.txt").write_text("changed")
    (folder / "1.png").unlink()
    assert look(rules, skip_check=True) == (first, set())
    found, opened = look(rules)
    assert opened == {"0.txt"} and found["name"] == ["0.png", "2.png", "3.png", "4.png", "5.png"]


def test_an_unreadable_image_is_looked_at_again(folder: Path, look, subset, tmp_path: Path) -> None:
    (folder / "7.png").write_bytes(b"")
    table, problems = scan([subset(folder)], tmp_path / "cache")
    assert table.num_rows == 6 and [Path(problem.file).name for problem in problems.problems()] == ["7.png"]
    Image.new("RGB", (70, 80)).save(folder / "7.png")
    found, opened = look(subset(folder))
    assert opened == {"7.png"} and (found["width"][6], found["height"][6]) == (70, 80)


@pytest.mark.parametrize("chunk", [2, 4096])
def test_an_unusable_image_is_not_read_again_until_it_changes(
    folder: Path, look, subset, tmp_path: Path, monkeypatch, chunk: int
) -> None:
    monkeypatch.setattr(scan_module, "CHUNK", chunk)
    (folder / "2.png").write_bytes(b"no image")
    (folder / "3.txt").write_bytes(b"\xff")
    (folder / "gone.png").symlink_to("nowhere")
    rules = subset(folder, caption_extension=".txt")
    cache = tmp_path / "cache"
    first, problems = scan([rules], cache)
    assert first["name"].to_pylist() == [b"0.png", b"1.png", b"4.png", b"5.png"] and len(problems) == 3
    opened: list[str] = []
    monkeypatch.setattr(inspection, "image_size", lambda path: opened.append(path.name) or image_size(path))
    monkeypatch.setattr(inspection, "read_texts", lambda path, options: opened.append(path.name) or ("",))
    again, same = scan([rules], cache)
    assert not opened and again.schema.metadata == first.schema.metadata
    assert set(same.problems()) == set(problems.problems())
    (folder / "3.txt").write_text("repaired")
    Image.new("RGB", (70, 80)).save(folder / "2.png")
    found, left = scan([rules], cache)
    assert sorted(set(opened)) == ["2.png", "3.png"] and found.num_rows == 6 and len(left) == 1
    opened.clear()
    found, _ = scan([rules], cache)
    assert not opened and found["width"].to_pylist() == [64, 64, 70, 64, 64, 64]


def test_images_are_read_again_if_the_library_or_the_access_has_changed(tmp_path: Path, monkeypatch) -> None:
    problem, numbers = Problem("broken", file="a.png"), {name: np.array([5]) for name in NUMBERS}
    kept = Unusable.load(tmp_path / "x")
    kept.add(0, b"a.png", [5, 5, 5], [problem])
    kept.save()
    names = pa.array([b"a.png"], pa.large_binary())
    kept = Unusable.load(tmp_path / "x")
    assert kept.find(kept.places(0, names), numbers) == {0: (problem,)}
    assert not kept.find(kept.places(1, names), numbers)
    for name in NUMBERS:
        assert not kept.find(kept.places(0, names), {**numbers, name: np.array([6])})
    monkeypatch.setattr("PIL.__version__", "another")
    kept = Unusable.load(tmp_path / "x")
    assert not kept.find(kept.places(0, names), numbers)
    (tmp_path / "text.png").write_text("text")
    for name, is_lasting in (("text.png", True), ("missing.png", False)):
        with pytest.raises(ImageError) as caught:
            image_size(tmp_path / name)
        assert caught.value.is_lasting == is_lasting


def test_processes_find_the_same(folder: Path, look, subset, monkeypatch) -> None:
    rules = subset(folder, caption_extension=".txt")
    monkeypatch.setattr(scan_module, "CHUNK", 2)
    first, _ = look(rules)
    (folder / "2.txt").write_text("another")
    monkeypatch.setattr(scan_module, "IN_PROCESS", -1)
    found, _ = look(rules)
    assert found["caption"] == ["caption 0", "caption 1", "another", "caption 3", "", ""]
    for column in ("name", "width", "height", "bytes", "mtime"):
        assert found[column] == first[column]


def test_a_digest_is_of_the_values(tmp_path: Path) -> None:
    table = pa.table({"a": pa.array([1, 2], pa.int32()), "b": pa.array(["x", "y"])})
    other = pa.table({"a": pa.array([1, 2], pa.int32()), "b": pa.array(["x", "z"])})
    assert digest_of(table) != digest_of(other)
    assert digest_of(table, ["a"]) == digest_of(other, ["a"]) != digest_of(table, ["b"])


def test_a_scan_without_a_usable_image_is_not_taken_for_damaged(folder: Path, subset, tmp_path: Path, caplog) -> None:
    for path in folder.glob("*.png"):
        path.write_bytes(b"no image")
    for _ in range(2):
        table, problems = scan([subset(folder)], tmp_path / "cache")
        assert not table.num_rows and len(problems) == 6
    assert "damaged" not in caplog.text


@pytest.mark.parametrize("seconds", [-(10**9), 0, 9 * 10**9, 10**10])
def test_images_and_masks_of_any_modification_time_are_used(
    folder: Path, subset, dataset, tmp_path: Path, seconds: int
) -> None:
    """A clock or a copy can leave times before 1970 and beyond the 64 bits of nanoseconds, in the year 2262."""
    times = (seconds * 10**9,) * 2
    os.utime(folder / "2.png", ns=times)
    rules = subset(folder, conditioning_data_dir=folder)
    first, again = (build_index([dataset(rules)], tmp_path / "cache", "stop") for _ in range(2))
    assert len(first) == 6 and first.path == again.path
    assert without_bad_masks(first, "stop").used.all()
    assert len(read_mask(first[2])) == first[2].stat[0] and stat(folder / "2.png").version == first[2].stat[1]


def test_an_unchanged_folder_with_a_bad_image_is_not_written_again(folder: Path, subset, tmp_path: Path) -> None:
    (folder / "3.jpg").write_bytes(b"")
    first, problems = scan([subset(folder)], tmp_path / "cache")
    (path,) = (tmp_path / "cache" / "scans").glob("*.scan")
    written = path.stat().st_ino  # the modification time is that of the last use
    again, problems_again = scan([subset(folder)], tmp_path / "cache")
    assert path.stat().st_ino == written
    assert len(problems) == len(problems_again) == 1
    assert again.drop_columns("score").equals(first.drop_columns("score"))


def test_chunks_of_any_size_find_the_same(
    folder: Path, look, subset, write_images, tmp_path: Path, monkeypatch
) -> None:
    """Images come, go and change at the borders of chunks."""
    rules = subset(folder, caption_extension=".txt")
    other = subset(tmp_path / "other")
    write_images(tmp_path / "other", {f"{number}.png": (32, 64 + number) for number in range(3)})
    for size in (1, 2, 3, 100):
        monkeypatch.setattr(scan_module, "CHUNK", size)
        write_images(folder, {f"{size}1.png": (64 + size, 64), f"{size}9.png": (64, 70)})
        (folder / f"{size}1.txt").write_text(f"of {size}")
        (folder / f"{size % 4}.png").unlink(missing_ok=True)
        found, opened = look(rules, other)
        if size > 1:
            assert opened == {f"{size}1.png", f"{size}1.txt", f"{size}9.png"}
        assert found == look(rules, other, cache=tmp_path / f"cache of {size}")[0]
        assert look(rules, other) == (found, set())
