"""A run's log: readable by TensorBoard and as JSON, one reason for its end, nothing read before it has arrived."""

import json
import logging
import math
import os
import sys
import time
from contextlib import nullcontext
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from sdxl_finetune.batch import Position
from sdxl_finetune.config import Config
from sdxl_finetune.errors import UserError
from sdxl_finetune.output.console import console
from sdxl_finetune.output.delayed_scalars import DelayedScalars
from sdxl_finetune.output.log import Log, Step
from sdxl_finetune.output.log_history import run_directory
from sdxl_finetune.output.watch import SMALLEST_LOSS_SCALE, NonFiniteLoss

LOSSES = [4.0, 2.0, 3.0, 1.0, 0.5, 0.25]


def step(index: int = 0, *, epoch: int = 0, loss: torch.Tensor, **values) -> Step:
    """An optimizer step; `index` and `epoch` count from 0."""
    usual = {
        "grad_norm": 10 * loss,
        "measured": {},
        "lr": {},
        "images": 4,
        "data_wait_seconds": 0.25,
    }
    return Step(
        position=Position(epoch=epoch, step=index, micro_batch=0, micro_batches_in_step=1),
        loss=loss,
        **{**usual, **values},
    )


def write_run(config: Config, directory: Path | None, *, rank: int = 0, losses: list[float] = LOSSES) -> None:
    """A run of three steps an epoch."""
    with Log(config, directory, rank=rank) as log:
        log.begin(steps=len(losses), steps_per_epoch=3)
        for index, loss in enumerate(losses):
            lr = {"unet": 1e-5 * (index + 1), "text_encoder1": 1e-6}
            log.record(step(index, epoch=index // 3, loss=torch.tensor(loss), lr=lr))
        logging.getLogger("sdxl_finetune.anything").warning("a message")
        log.previews([(1, Image.new("RGB", (16, 8), "red"), "a red picture")], step=len(losses))


def events(directory: Path, name: str = "finetuning") -> EventAccumulator:
    return EventAccumulator(str(directory / name)).Reload()


def rows(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_tensorboard_reads_the_references_tags(tmp_path: Path) -> None:
    write_run(Config(logging_dir=tmp_path), tmp_path / "run")
    written = events(tmp_path / "run")
    assert [(event.step, event.value) for event in written.Scalars("loss")] == list(enumerate(LOSSES, start=1))
    # The reference's moving average holds an epoch's worth of losses, and its step is the epoch.
    assert [(event.step, event.value) for event in written.Scalars("loss/epoch")] == [
        (1, pytest.approx(3.0)),
        (2, pytest.approx(1.75 / 3)),
    ]
    write_run(Config(logging_dir=tmp_path), tmp_path / "cut", losses=LOSSES[:5])
    assert events(tmp_path / "cut").Scalars("loss/epoch")[-1].value == pytest.approx(4.5 / 3)
    assert [event.value for event in written.Scalars("lr/unet")] == pytest.approx([1e-5 * i for i in range(1, 7)])
    assert {"lr/text_encoder1", "grad_norm", "images_per_second"} <= set(written.Tags()["scalars"])
    (image,) = written.Images("sample_1")
    assert (image.step, image.width, image.height) == (6, 16, 8)
    assert b"a red picture" in written.Tensors("sample_1/prompt/text_summary")[0].tensor_proto.string_val


def test_tensorboard_shows_the_timesteps_that_were_drawn(tmp_path: Path) -> None:
    """One histogram after 100 steps, one at a save and one at the end, each of the timesteps since the one before."""
    timesteps = [[float(7 * number % 1000), 1000.0] for number in range(130)]
    with Log(Config(logging_dir=tmp_path), tmp_path, rank=0) as log:
        log.begin(steps=130, steps_per_epoch=130)
        for number in range(130):
            log.record(step(number, loss=torch.ones(()), timesteps=timesteps[number]))
            if number == 109:
                log.note_save(110)
    written = EventAccumulator(str(tmp_path / "finetuning"), size_guidance={"histograms": 0}).Reload()
    histograms = written.Histograms("timesteps")
    assert [histogram.step for histogram in histograms] == [100, 110, 130]
    for histogram, (first, last) in zip(histograms, ((0, 100), (100, 110), (110, 130)), strict=True):
        value = histogram.histogram_value
        drawn = [number for pair in timesteps[first:last] for number in pair]
        assert value.num == sum(value.bucket) == len(drawn)
        counts, _ = np.histogram(drawn, [0.0, *value.bucket_limit])
        assert counts.tolist() == value.bucket
        assert value.sum == pytest.approx(sum(drawn), abs=10 * len(drawn))


def test_metrics_are_a_json_object_a_step(tmp_path: Path) -> None:
    write_run(Config(), tmp_path)
    first, *_, last = written = rows(tmp_path)
    assert len(written) == 6
    assert first.keys() == {
        "step", "epoch", "loss", "grad_norm", "lr", "images_per_second", "data_wait_seconds", "peak_memory_bytes",
    }  # fmt: skip
    assert (last["step"], last["epoch"], last["loss"], last["grad_norm"]) == (6, 2, 0.25, 2.5)
    assert last["lr"] == {"unet": 1e-5 * 6, "text_encoder1": 1e-6}
    assert all(row["images_per_second"] > 0 and row["data_wait_seconds"] == 0.25 for row in written)
    assert all(1e7 < row["peak_memory_bytes"] < 1e12 for row in written)


def test_a_run_says_what_it_was(tmp_path: Path) -> None:
    config = Config(output_name="m", wandb_api_key="a-secret", train_batch_size=5)
    write_run(config, tmp_path)
    effective = (tmp_path / "config.toml").read_text()
    assert "train_batch_size = 5" in effective and "a-secret" not in effective
    assert json.loads((tmp_path / "versions.json").read_text())["torch"]
    ended = json.loads((tmp_path / "ended.json").read_text())
    assert (ended["reason"], ended["step"]) == ("finished", 6)
    assert datetime.fromisoformat(ended["time"]).tzinfo is not None
    assert "WARNING sdxl_finetune.anything: a message" in (tmp_path / "console_rank0.log").read_text()
    files = [getattr(handler, "baseFilename", "") for handler in logging.getLogger().handlers]
    assert str(tmp_path / "console_rank0.log") not in files


def test_the_end_has_one_reason(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Log(Config(), tmp_path / "a", rank=0):
        raise RuntimeError("out of something")
    assert json.loads((tmp_path / "a" / "ended.json").read_text())["reason"] == "RuntimeError: out of something"
    with Log(Config(), tmp_path / "b", rank=0) as log:
        log.close("stopped by SIGTERM")
    assert json.loads((tmp_path / "b" / "ended.json").read_text())["reason"] == "stopped by SIGTERM"


def test_other_ranks_write_only_their_messages(tmp_path: Path, capsys) -> None:
    write_run(Config(), tmp_path, rank=1)
    assert [path.name for path in tmp_path.iterdir()] == ["console_rank1.log"]
    assert "steps" not in capsys.readouterr().err


def test_without_a_directory_there_is_progress_and_nothing_else(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_directory(Config(), datetime.now()) is None
    write_run(Config(), None)
    assert list(tmp_path.iterdir()) == []
    shown = capsys.readouterr().err
    assert "6/6" in shown and "avr_loss=0.5833" in shown and "images/s=" in shown


@pytest.mark.parametrize("loss", [math.nan, math.inf])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_loss_that_is_no_number_ends_the_run_and_names_the_step(tmp_path: Path, loss: float, rank: int) -> None:
    with pytest.raises(NonFiniteLoss, match="step 3") as caught:
        write_run(Config(), tmp_path, rank=rank, losses=[1.0, 2.0, loss, 1.0])
    assert caught.value.step == 3
    if rank == 0:
        assert rows(tmp_path)[-1]["loss"] is None
        assert "NonFiniteLoss" in json.loads((tmp_path / "ended.json").read_text())["reason"]


@pytest.mark.parametrize(
    ("scale", "ends"), [(None, True), (2.0**15, False), (SMALLEST_LOSS_SCALE, False), (SMALLEST_LOSS_SCALE / 2, True)]
)
def test_a_gradient_that_is_no_number_ends_the_run_unless_its_step_was_skipped(
    tmp_path: Path, caplog, scale: float | None, ends: bool
) -> None:
    """Its step spoils the weights before any loss shows it. With a loss scale the step is skipped."""
    measured = {} if scale is None else {"loss_scale": torch.tensor(scale)}
    with caplog.at_level("INFO"), Log(Config(), tmp_path, rank=0) as log:
        log.begin(steps=1, steps_per_epoch=1)
        expected = pytest.raises(NonFiniteLoss, match="norm of step 1 is inf") if ends else nullcontext()
        with expected:
            log.record(step(loss=torch.ones(()), grad_norm=torch.tensor(math.inf), measured=measured))
    assert ("step 1 was skipped" in caplog.text) != ends


def test_pauses_are_no_part_of_a_step(tmp_path: Path) -> None:
    began = time.perf_counter()
    with Log(Config(), tmp_path, rank=0) as log:
        log.begin(steps=1, steps_per_epoch=1)
        with log.pause():
            time.sleep(0.5)
        log.record(step(loss=torch.ones(()), images=100))
        seconds = time.perf_counter() - began
    (row,) = rows(tmp_path)
    assert row["images_per_second"] > 100 / (seconds - 0.25)


def test_the_directory_is_named_as_the_references(tmp_path: Path) -> None:
    now = datetime(2026, 1, 2, 3, 4, 5)
    assert run_directory(Config(logging_dir=tmp_path), now) == tmp_path / "20260102030405"
    assert run_directory(Config(logging_dir=tmp_path, log_prefix="a_"), now) == tmp_path / "a_20260102030405"


def test_runs_that_start_in_the_same_second_get_logs_of_their_own(tmp_path: Path) -> None:
    config, now = Config(logging_dir=tmp_path), datetime(2026, 1, 2, 3, 4, 5)
    names = [path.name for _ in range(3) if (path := run_directory(config, now))]
    assert names == ["20260102030405", "20260102030405-2", "20260102030405-3"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no flock")
def test_the_log_of_a_run_that_goes_on_is_not_cut_by_a_run_that_resumes_from_its_state(tmp_path: Path, caplog) -> None:
    config, now = Config(logging_dir=tmp_path), datetime(2026, 1, 2, 3, 4, 5)
    with Log(config, tmp_path / "old", rank=0) as log:
        log.begin(steps=2, steps_per_epoch=2)
        log.note_save(0)
        log.record(step(0, loss=torch.ones(())))
        assert run_directory(config, now, resumed=("old", 0)) == tmp_path / "20260102030405"
        assert f"old is the log of another run (process {os.getpid()} on" in caplog.text
    assert [row["step"] for row in rows(tmp_path / "old")] == [1] and not rows(tmp_path / "20260102030405")
    assert run_directory(config, now, resumed=("old", 0)) == tmp_path / "old" and not rows(tmp_path / "old")
    assert not (tmp_path / "old" / ".lock").exists()


def test_another_run_continues_in_a_copy_of_the_log(tmp_path: Path, caplog) -> None:
    """The log of the first run stays as it is. Without a record of the step, nothing is copied."""
    config = Config(logging_dir=tmp_path / "logs")
    old, now = tmp_path / "logs" / "old", datetime(2026, 1, 2, 3, 4, 5)
    with Log(config, old, rank=0) as log:
        log.begin(steps=2, steps_per_epoch=2)
        for number in range(2):
            log.record(step(number, loss=torch.ones(())))
            log.note_save(number + 1)
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    copy = run_directory(config, now, resumed=("old", 1), is_own=False)
    assert copy == tmp_path / "logs" / "20260102030405" and [row["step"] for row in rows(copy)] == [1]
    assert len(list(copy.rglob("events.*"))) == 1
    assert {path: path.read_bytes() for path in old.rglob("*") if path.is_file()} == before
    new = run_directory(config, now, resumed=("old", 7), is_own=False)
    assert new == tmp_path / "logs" / "20260102030405-2" and not list(new.iterdir())
    assert "it has no record of step 7" in caplog.text
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["20260102030405", new.name, "old"]
    assert run_directory(config, now, resumed=("old", 1)) == old and [row["step"] for row in rows(old)] == [1]


def test_trackers_take_their_name_and_arguments(tmp_path: Path) -> None:
    (tmp_path / "tracker.toml").write_text('[tensorboard]\nfilename_suffix = ".mine"\n')
    config = Config(
        logging_dir=tmp_path, log_tracker_name="mine", log_tracker_config=tmp_path / "tracker.toml", log_config=True
    )
    write_run(config, tmp_path / "run")
    assert [path.name.endswith(".mine") for path in (tmp_path / "run" / "mine").iterdir()] == [True]
    (text,) = events(tmp_path / "run", "mine").Tensors("config/text_summary")
    assert b"train_batch_size" in text.tensor_proto.string_val[0]


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_a_missing_wandb_is_said() -> None:
    with pytest.raises(UserError, match=r"log_with.*wandb is not installed"):
        Log(Config(log_with="wandb"), None, rank=0)


def test_mistakes_are_the_users(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"log_with.*needs logging_dir"):
        Log(Config(log_with="tensorboard"), None, rank=0)
    (tmp_path / "file").write_text("= no TOML")
    with pytest.raises(UserError, match=r"logging_dir.*cannot be created"):
        Log(Config(), tmp_path / "file" / "run", rank=0)
    with pytest.raises(UserError, match=r"log_tracker_config.*cannot be read"):
        Log(Config(log_tracker_config=tmp_path / "file"), tmp_path / "run", rank=0)


def test_the_console_shows_messages_above_the_progress(tmp_path: Path, capsys) -> None:
    logger = logging.getLogger("sdxl_finetune.somewhere")
    handlers = list(logging.getLogger().handlers)
    with console(Config(), rank=0), tqdm(total=2, file=sys.stderr) as progress:
        progress.update()
        logger.info("for everyone")
        logger.debug("for nobody")
    with console(Config(console_log_simple=True, console_log_level="ERROR"), rank=0):
        logger.warning("not severe enough")
        logger.error("severe")
    with console(Config(), rank=3):
        logger.info("of another rank")
        logger.warning("a warning of another rank")
    shown = capsys.readouterr().err
    assert "INFO    for everyone\n" in shown and "\nsevere\n" in shown
    assert "[rank 3] " in shown and "a warning of another rank" in shown
    for hidden in ("for nobody", "not severe enough", "INFO    of another"):
        assert hidden not in shown
    assert logging.getLogger().handlers == handlers


def test_debug_messages_of_libraries_are_hidden(capsys) -> None:
    """Pillow alone writes a dozen of them for each image."""
    with console(Config(console_log_level="DEBUG"), rank=0):
        logging.getLogger("sdxl_finetune.somewhere").debug("ours")
        logging.getLogger("PIL.Image").debug("theirs")
        logging.getLogger("PIL.Image").warning("their warning")
    shown = capsys.readouterr().err
    assert "ours" in shown and "their warning" in shown and "theirs" not in shown


def test_the_console_may_be_a_file(tmp_path: Path, capsys) -> None:
    config = Config(console_log_file=tmp_path / "logs" / "console.txt", console_log_simple=True)
    with console(config, rank=0):
        logging.getLogger("sdxl_finetune.somewhere").info("written")
    assert (tmp_path / "logs" / "console.txt").read_text() == "written\n"
    assert capsys.readouterr().err == ""


def test_scalars_of_the_cpu_arrive_at_once() -> None:
    delayed: DelayedScalars[str] = DelayedScalars()
    scalars = {"a": torch.ones(1, dtype=torch.bfloat16), "b": torch.tensor(2)}
    vectors = {"v": torch.tensor([3.0, 4.0]), "none": torch.zeros(0)}
    (arrived,) = delayed.push("first", scalars, vectors)
    assert (arrived.record, arrived.scalars) == ("first", {"a": 1.0, "b": 2.0})
    assert arrived.vectors == {"v": [3.0, 4.0], "none": []}
    assert delayed.flush() == []
