"""A disk that is not mounted any more: nothing is written into the empty folder that is left in its place."""

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdxl_finetune.config import Config
from sdxl_finetune.output.log_file import LogFile
from sdxl_finetune.training import failed_saves
from tests.training.small_runs import run


def test_a_mount_that_is_gone_is_not_written_beneath(disk) -> None:
    """Nothing is written into the empty folder that is left where a disk was mounted."""
    saves = failed_saves.FailedSaves(Config(output_dir=disk / "out"))
    subprocess.run(["umount", str(disk)], check=True)
    try:
        assert saves.write("m", 10, lambda folder: folder) is None
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["mount", "-t", "tmpfs", "none", str(disk)], check=True)
    assert saves.write("m", 10, lambda folder: folder) == disk / "out"


def test_a_fallback_whose_mount_is_gone_is_not_written_beneath(disk, work) -> None:
    config = Config(output_dir=work / "out", save_fallback_dir=disk / "saves")
    saves = failed_saves.FailedSaves(config)

    def write(folder: Path) -> Path:
        if folder == config.output_dir:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        folder.mkdir()
        return folder

    subprocess.run(["umount", str(disk)], check=True)
    try:
        assert saves.write("m", 10, write) is None
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["mount", "-t", "tmpfs", "none", str(disk)], check=True)
    assert saves.write("m", 10, write) == disk / "saves"


def test_a_log_whose_mount_is_gone_for_a_while_keeps_all_its_records(disk) -> None:
    """What is written beneath would be lost. The file of the disk would then be cut to the size of the other one."""
    place = disk.with_name("place")
    place.mkdir()
    subprocess.run(["mount", "--bind", str(disk), str(place)], check=True)
    file = LogFile(place / "logs" / "log")
    file.write(b"1\n" * 100)
    subprocess.run(["umount", "-l", str(place)], check=True)
    file.write(b"2\n")
    assert list(place.iterdir()) == []
    subprocess.run(["mount", "--bind", str(disk), str(place)], check=True)
    try:
        file.close()
        assert (disk / "logs" / "log").read_bytes() == b"1\n" * 100 + b"2\n"
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def place(disk) -> Iterator[Path]:
    """A folder in which `disk` is mounted too. It can be unmounted and mounted again, and keeps its files."""
    place = disk.with_name("place")
    place.mkdir()
    subprocess.run(["mount", "--bind", str(disk), str(place)], check=True)
    yield place
    if place.is_mount():
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_previews_and_tag_reports_wait_for_their_disk(disk, place, on_message, caplog) -> None:
    """The disk is gone from the first step until the last checkpoint is refused."""
    beneath = []

    def give_back() -> None:
        beneath.extend(place.iterdir())
        subprocess.run(["mount", "--bind", str(disk), str(place)], check=True)

    on_message("training unet:", lambda: subprocess.run(["umount", "-l", str(place)], check=True))
    on_message("style could not be saved", give_back)
    Path("prompts.txt").write_text("a red house --w 64 --h 64 --s 1 --d 1\n")
    asked = ["--sample_prompts", "prompts.txt", "--sample_every_n_steps", "3", "--sample_at_first"]
    asked += ["--tag_report_every_n_epochs", "1", "--tag_report_tags", "cat, coffee, rocket"]
    assert run("place", "--logging_dir", "logs", "--max_train_steps", "3", *asked) == 0
    for what in ("previews after step 0", "previews after step 3", "tag report after step 0"):
        assert f"no {what}: nothing is mounted at {place} any more. Training goes on" in caplog.text
    assert not beneath and not list(disk.rglob("*.png")) and (disk / "out" / "style.safetensors").exists()


def test_a_dump_is_not_written_beneath(place, on_message, capsys) -> None:
    on_message("training unet:", lambda: subprocess.run(["umount", "-l", str(place)], check=True))
    assert run("place", "--logging_dir", "logs", "--learning_rate", "1e38", "--max_grad_norm", "0") == 1
    said = f"the step could not be dumped ([Errno 19] nothing is mounted at {place} any more)"
    assert said in capsys.readouterr().err and not list(place.iterdir())
