"""Atomic writes: what two processes do that write the same file at the same time."""

import errno
import math
import os
from pathlib import Path

import pytest

from sdxl_finetune.files import atomic_path, free_bytes, read_patiently, remove_leftovers, size_text, storage_failure


def test_processes_of_equal_number_on_two_machines_write_one_file(tmp_path: Path) -> None:
    """Containers that share a folder often have processes of the same number, as these two writes have."""
    final = tmp_path / "index"
    with atomic_path(final) as first:
        first.write_text("of the first")
        with atomic_path(final) as second:
            second.write_text("of the second")
            assert first.read_text() == "of the first"
        assert final.read_text() == "of the second"
    assert final.read_text() == "of the first" and list(tmp_path.iterdir()) == [final]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    for name in (".a.999999-0badf00d.tmp", ".a.999999.tmp", f".b.{os.getppid()}-0badf00d.tmp", ".c.words.tmp"):
        (tmp_path / name).touch()
    (tmp_path / ".d.999999-0badf00d.old.tmp").mkdir()
    removed = remove_leftovers(tmp_path, lambda name: name in "abd")
    assert sorted(path.name for path in removed) == [".a.999999-0badf00d.tmp", ".a.999999.tmp"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".b.{os.getppid()}-0badf00d.tmp", ".c.words.tmp", "d"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (3 << 10, "3.0 KiB"), (20 << 20, "20.0 MiB"), (3 << 29, "1.5 GiB")],
)
def test_a_size_is_shown_in_a_unit_that_fits(count, text):
    assert size_text(count) == text


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    final = tmp_path / "file"
    final.write_text("before")
    with pytest.raises(OSError, match="no room"), atomic_path(final) as temporary:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "no room")
    assert final.read_text() == "before" and list(tmp_path.iterdir()) == [final]


def test_a_folder_that_cannot_be_renamed_leaves_the_old_one(tmp_path: Path, monkeypatch) -> None:
    final = tmp_path / "state"
    final.mkdir()
    (final / "old").touch()
    rename = Path.rename

    def refuse_new(path: Path, target: Path) -> Path:
        if path.name.endswith(".tmp") and not path.name.endswith(".old.tmp"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse_new)
    with pytest.raises(OSError, match="Input/output error"), atomic_path(final) as temporary:
        temporary.mkdir()
    assert [path.name for path in tmp_path.rglob("*")] == ["state", "old"]


def test_a_read_is_tried_again_only_while_the_failure_may_pass() -> None:
    failures = [OSError(errno.ESTALE, "Stale file handle")] * 2

    def read() -> str:
        if failures:
            raise failures.pop()
        return "content"

    assert read_patiently(read, "file", (0.0, 0.0, 0.0)) == "content"
    failures += [OSError(errno.EIO, "Input/output error")] * 3
    with pytest.raises(OSError, match="Input/output"):
        read_patiently(read, "file", (0.0, 0.0))
    failures += [FileNotFoundError(errno.ENOENT, "No such file")] * 2
    with pytest.raises(FileNotFoundError):
        read_patiently(read, "file", (0.0, 0.0))
    assert len(failures) == 1


def test_failures_of_storage_are_told_from_mistakes(tmp_path: Path) -> None:
    assert storage_failure(OSError(errno.ENOSPC, "No space left on device")) == "No space left on device"
    assert storage_failure(FileNotFoundError(errno.ENOENT, "No such file")) is None
    assert storage_failure(ValueError()) is None
    assert 0 < free_bytes(tmp_path / "not" / "there") < math.inf
