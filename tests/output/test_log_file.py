"""Files of a log on storage that fails: training goes on, records wait, and a file holds whole records only."""

import json
import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sdxl_finetune.batch import Position
from sdxl_finetune.config import Config
from sdxl_finetune.errors import UserError
from sdxl_finetune.output import log_file
from sdxl_finetune.output.console import console
from sdxl_finetune.output.log import Log, Step
from sdxl_finetune.output.log_file import LogFile, MessageFile


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Within the context this process cannot write beyond `size` bytes of a file. A write up to there is cut short."""
    resource = pytest.importorskip("resource")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_record_that_was_written_in_part_is_written_whole_later(tmp_path: Path, caplog) -> None:
    path = tmp_path / "log"
    file = LogFile(path)
    file.write(b"first\n")
    with largest_file(9):
        file.write(b"second\n")
        file.write(b"third\n")
        assert path.read_bytes() == b"first\nsec"
    file.flush()
    file.close()
    assert path.read_bytes() == b"first\nsecond\nthird\n"
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2 and "cannot be written (File too large)" in messages[0]
    assert messages[1].endswith("is written again")


def test_what_a_file_holds_is_kept_and_a_torn_end_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"of an earlier run\n")
    file = LogFile(path)
    with largest_file(20):
        file.write(b"torn\n")
    file.close()
    assert path.read_bytes() == b"of an earlier run\ntorn\n"


def test_records_beyond_the_limit_are_dropped_and_counted(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(log_file, "MOST_WAITING", 10)
    folder = tmp_path / "folder"
    folder.touch()
    file = LogFile(folder / "log")
    for _ in range(5):
        file.write(b"12345")
    folder.unlink()
    file.close()
    assert (folder / "log").read_bytes() == b"1234512345"
    assert "is written again; 3 records were lost, because too many waited" in caplog.text


def test_a_deleted_file_is_made_again(tmp_path: Path) -> None:
    file = LogFile(tmp_path / "folder" / "log")
    file.write(b"first")
    (tmp_path / "folder" / "log").unlink()
    (tmp_path / "folder").rmdir()
    file.write(b"second")
    file.close()
    assert (tmp_path / "folder" / "log").read_bytes() == b"second"


def test_a_file_that_is_never_written_says_what_is_lost(tmp_path: Path, caplog) -> None:
    (tmp_path / "folder").touch()
    file = LogFile(tmp_path / "folder" / "log")
    file.write(b"1")
    file.write(b"2")
    file.close()
    assert "the last 2 records are lost" in caplog.text


def test_messages_go_on_when_their_file_takes_them_again(tmp_path: Path, capsys) -> None:
    handler, logger = MessageFile(tmp_path / "messages"), logging.getLogger("a test of messages")
    logger.addHandler(handler)
    try:
        with largest_file(4):
            logger.warning("a long message")
            logger.warning("another")
        logger.warning("the last")
    finally:
        logger.removeHandler(handler)
        handler.close()
    assert (tmp_path / "messages").read_text().endswith("the last\n")
    assert capsys.readouterr().err == f"{tmp_path / 'messages'} cannot be written (File too large)\n"


def test_a_console_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    options = Config(console_log_file=tmp_path / "file" / "messages")
    with pytest.raises(UserError, match=r"console_log_file.*cannot be written"), console(options, 0):
        pass


def test_a_whole_log_survives_a_disk_that_is_full_for_a_while(tmp_path: Path) -> None:
    """Metrics and TensorBoard then hold every step."""
    with Log(Config(logging_dir=tmp_path), tmp_path / "run", rank=0) as log:
        log.begin(steps=40, steps_per_epoch=40)
        for number in range(40):
            step = Step(
                position=Position(epoch=0, step=number, micro_batch=0, micro_batches_in_step=1),
                loss=torch.tensor(float(number)),
                grad_norm=torch.ones(()),
                measured={},
                lr={},
                images=1,
                data_wait_seconds=0.0,
            )
            if 10 <= number < 30:
                with largest_file(100):
                    log.record(step)
                    log.note_save(number)
            else:
                log.record(step)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == list(range(40))
    events = EventAccumulator(str(tmp_path / "run" / "finetuning"), size_guidance={"scalars": 0}).Reload()
    assert [event.value for event in events.Scalars("loss")] == list(range(40))
    assert json.loads((tmp_path / "run" / "ended.json").read_text())["reason"] == "finished"
