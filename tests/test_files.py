"""Atomic writes: what two processes do that write the same file at the same time."""

import os
from pathlib import Path

import pytest

from sdxl_finetune.files import atomic_path, remove_leftovers, size_text


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
