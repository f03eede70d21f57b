"""Files of earlier runs in `cache_dir`: those in use stay, and those that no run has used for long are removed."""

import logging
import os
import time
from pathlib import Path

import pytest

from sdxl_finetune.data.index import Index, build_index
from sdxl_finetune.data.kept_files import REFRESH, STAMP, UNUSED, publish_index, remove_unused
from sdxl_finetune.errors import UserError
from sdxl_finetune.storage import Address, list_files

FOLDER = Address("s3://bucket/cache/indexes")


def age(path: Path, seconds: float) -> None:
    """Makes a file look as if it was used so long ago."""
    os.utime(path, (time.time() - seconds,) * 2)


def files(cache: Path) -> set[str]:
    return {path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file()} - {STAMP}


def test_what_no_run_has_used_for_long_is_removed(tmp_path: Path, write_images, subset, dataset, caplog) -> None:
    """The files of the newest run stay although they are old, because a start notes that it uses them."""
    write_images(tmp_path / "a", {"a.png": (64, 64), "b.png": (64, 64)})
    write_images(tmp_path / "b", {"a.png": (64, 64), "b.png": (64, 64)})
    for name in ("a", "b"):
        (tmp_path / name / "a.score").write_text("1")
        (tmp_path / f"masks_{name}").mkdir()
        (tmp_path / f"masks_{name}" / "a.png").write_bytes((tmp_path / name / "a.png").read_bytes())
    cache = tmp_path / "cache"

    def start(name: str) -> Index:
        options = {"quality_tags": "x > 0.5", "quality_scores": ".score", "validation_split": 0.5}
        one = subset(tmp_path / name, conditioning_data_dir=tmp_path / f"masks_{name}", **options)
        return build_index([dataset(one)], cache, "stop", skip_check=True)

    start("a")
    of_a = files(cache)
    assert {Path(name).suffix for name in of_a} == {".index", ".scan", ".marks", ".npy", ".scores", ".masks"}
    index = start("b")
    others = ["latents/vae/1-00000-x.latents", "own.txt", "scans/own.txt", "masks/vae/1.masks"]
    for name in others:
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).touch()
    everything = files(cache)
    for name in everything:
        age(cache / name, UNUSED + 1000)
    with caplog.at_level(logging.INFO):
        start("b")
        assert files(cache) == everything, "a search a day"
        age(cache / STAMP, 90000)
        assert len(index) == 2, "a mapped index"
        start("b")
    assert files(cache) == everything - of_a >= set(others)
    assert "removed 6 files" in caplog.text and "not used for 90 days: *.index, held_out/*.npy" in caplog.text
    assert index[1].path.name == "b.png", "another process has mapped the file"


def test_a_folder_without_old_files_is_left_alone(tmp_path: Path, caplog) -> None:
    """Also a folder that does not exist. Members of tar files go with their folder."""
    remove_unused(tmp_path / "none")
    (tmp_path / "tars" / "x").mkdir(parents=True)
    (tmp_path / "tars" / "x" / "1.tar.members").touch()
    with caplog.at_level(logging.INFO):
        remove_unused(tmp_path)
        assert "removed" not in caplog.text
        age(tmp_path / STAMP, 90000)
        age(tmp_path / "tars" / "x" / "1.tar.members", UNUSED + 10)
        remove_unused(tmp_path)
    assert not (tmp_path / "tars" / "x").exists() and "tars/*/*.members" in caplog.text


@pytest.mark.parametrize("away", [400 * 86400.0, -400 * 86400.0])
def test_a_wrong_clock_neither_removes_used_files_nor_keeps_old_ones_for_ever(
    tmp_path: Path, monkeypatch, away: float
) -> None:
    """The clock of one of two machines that share a folder is wrong. The file server notes the times."""
    (tmp_path / "scans").mkdir()
    used, old, bad = (tmp_path / "scans" / name for name in ("used.scan", "old.scan", "old.unusable"))
    for path in (used, old, bad):
        path.touch()
    for path in (old, bad):
        age(path, UNUSED + 10)
    now = time.time()
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now + away)
        remove_unused(tmp_path)
    assert used.exists() and not old.exists() and not bad.exists()
    old.touch()
    age(old, UNUSED + 10)
    os.utime(tmp_path / STAMP, (now + 10 * UNUSED,) * 2)
    remove_unused(tmp_path)
    assert used.exists() and not old.exists(), "a time in the future does not stop the search"


def test_indexes_in_a_store_are_written_again_before_they_are_old(s3, tmp_path: Path, monkeypatch, caplog) -> None:
    for name in ("used.index", "unused.index"):
        (tmp_path / name).write_bytes(name.encode())
        publish_index(tmp_path / name, FOLDER)
    written = {found.name: found.time for found in list_files(FOLDER)}
    s3.clear()
    publish_index(tmp_path / "used.index", FOLDER)
    assert s3.requests["PUT"] == 0
    now = time.time()
    for later, puts in ((REFRESH - 1000, 0), (REFRESH + 1000, 1)):
        monkeypatch.setattr(time, "time", lambda later=later: now + later)
        s3.clear()
        publish_index(tmp_path / "used.index", FOLDER)
        assert s3.requests["PUT"] == puts
    assert {found.name for found in list_files(FOLDER)} == set(written), "younger than 90 days"
    monkeypatch.setattr(time, "time", lambda: now + UNUSED + 1000)
    with caplog.at_level(logging.INFO):
        publish_index(tmp_path / "used.index", FOLDER)
    assert [found.name for found in list_files(FOLDER)] == ["used.index"]
    assert "removed 1 indexes that were not used for 90 days" in caplog.text


@pytest.mark.parametrize("folder", ["scans", "scores", "marks", "held_out", "mask_files"])
def test_a_folder_in_cache_dir_that_cannot_be_written_to_is_named(
    tmp_path: Path, write_images, subset, dataset, folder: str
) -> None:
    """Another user of the `cache_dir` may have made the folder. Here it is a file, because root may write anywhere."""
    write_images(tmp_path / "a", {"a.png": (64, 64), "b.png": (64, 64)})
    options = {"quality_tags": "x > 0.5", "quality_scores": ".score", "validation_split": 0.5}
    one = subset(tmp_path / "a", conditioning_data_dir=tmp_path / "a", **options)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / folder).touch()
    with pytest.raises(UserError) as error:
        build_index([dataset(one)], tmp_path / "cache", "stop")
    (problem,) = error.value.problems
    assert problem.file and Path(problem.file).parent == tmp_path / "cache" / folder
    assert "cannot be written" in problem.message and "cache_dir" in problem.message


def test_what_killed_processes_have_left_half_written_is_removed(tmp_path: Path) -> None:
    left = [".a.index.71-0a1b.tmp", "scans/.b.scan.72-0a1b.tmp", "caption_keys/.c.keys.npy.73-0a1b.tmp"]
    others = ["own.tmp", "latents/.1.latents.74-0a1b.tmp"]
    for name in (*left, *others):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    remove_unused(tmp_path)
    assert files(tmp_path) == {*left, *others}, "another process may be writing them"
    for name in (*left, *others, STAMP):
        age(tmp_path / name, UNUSED + 10)
    remove_unused(tmp_path)
    assert files(tmp_path) == set(others)
