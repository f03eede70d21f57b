"""Tag reports in training and by sdxl-model tags, with the small model that draws."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from scripts.toy.palettes import write_styles
from sdxl_finetune.commands.model import main
from sdxl_finetune.errors import UserError
from sdxl_finetune.runtime.signals import Interrupt, StopRequest
from sdxl_finetune.tag_report import measure as measuring
from sdxl_finetune.tag_report.schema import Report, load_report
from sdxl_finetune.training import tag_reports
from tests.training.toy_runs import OPTIONS, run, use_toy

REPORTS = ["--tag_report_every_n_epochs", "1", "--tag_report_tags", "style_monet, style_titian, style_dali"]
REPORTS += ["--tag_report_images", "2", "--tag_report_timesteps", "750"]
COMMAND = ["--tags", "style_monet, style_titian, style_dali", "--images", "2", "--timesteps", "750", "--draw", "1"]


@pytest.fixture
def styles(work: Path) -> Path:
    """A user's folder with the small model and some pictures of ten styles."""
    use_toy(work)
    for path in (work / "images").iterdir():
        path.unlink()
    write_styles(work / "images", 0, share=0.01)
    (work / "style.toml").write_text(
        "\n".join(f"{OPTIONS[at][2:]} = {_toml(OPTIONS[at + 1])}" for at in range(0, len(OPTIONS) - 1, 2))
        + "\ncache_latents = true\n"
    )
    return work


def _toml(text: str) -> str:
    return text if text.isdecimal() else json.dumps(text)


def reports(folder: str = "out/tags") -> list[Report]:
    paths = sorted(path for path in Path(folder).glob("*.parquet") if ".images" not in path.name)
    return [load_report(path) for path in paths]


def test_reports_do_not_change_training(styles: Path) -> None:
    """Weights and losses are those of a run without reports, bit for bit."""
    asked = ["--max_train_steps", "2", "--train_batch_size", "40", "--learning_rate", "1e-3", "--caption_dropout_rate"]
    plain = run(*asked, "0.3")
    first = load_file("out/last.safetensors")
    rows = run(*asked, "0.3", *REPORTS)
    second = load_file("out/last.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [row["loss"] for row in plain if "loss" in row] == [row["loss"] for row in rows if "loss" in row]
    base, last = reports()
    assert (base.facts.step, last.facts.step) == (0, 2) and last.facts.epoch == 1
    assert base.facts.options == last.facts.options
    tags, before = last.tags.to_pylist(), base.tags.to_pylist()
    for now, old in zip(tags, before, strict=True):
        assert now["gain_since_base"] == pytest.approx(now["gain"] - old["gain"], abs=1e-6)
        assert old["exposures"] == 0 and now["exposures"] == 4 and now["images"] == 2
    assert any(now["gain_since_base"] != 0 for now in tags)
    assert [row["step"] for row in rows if "tags" in row] == [0, 2]
    assert {path.suffix for path in Path("out/tags").iterdir()} >= {".parquet", ".csv", ".html"}


def test_a_report_that_fails_leaves_training_alone(styles: Path, monkeypatch, caplog) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(tag_reports, "make_report", fail)
    rows = run("--max_train_steps", "1", *REPORTS)
    assert [row["step"] for row in rows if "loss" in row] == [1]
    assert "no tag report after step 0: no space left. Training goes on" in caplog.text


def test_unknown_tags_are_refused_before_training(styles: Path) -> None:
    with pytest.raises(UserError, match="no caption has 'style_nobody'"):
        run("--tag_report_every_n_epochs", "1", "--tag_report_tags", "style_monet, style_nobody")
    assert not Path("out").exists() or not list(Path("out").glob("*.safetensors"))


def command(*more: str) -> list[str]:
    return ["tags", "base.safetensors", "--config", "style.toml", *COMMAND, *more]


def test_the_command_measures_a_model_and_compares_it(styles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--max_train_steps", "2", "--train_batch_size", "40", "--learning_rate", "1e-3")
    AcceleratorState._reset_state(reset_partial_state=True)
    trained = ["tags", "out/last.safetensors", "--config", "style.toml", "--train_batch_size", "40", *COMMAND]
    assert main([*trained, "--base", "base.safetensors", "--output", "mine"]) == 0
    base, now = sorted(reports("mine"), key=lambda report: report.facts.model)
    assert base.facts.model == "base.safetensors" and now.facts.step == 2 and now.facts.model_hash
    assert base.tags["exposures"].null_count == 3, "nothing says what a foreign model was trained on"
    assert now.tags["exposures"].to_pylist() == [4, 4, 4]
    assert now.tags["gain_since_base"].null_count == 0
    shown = capsys.readouterr().out
    assert "style_monet" in shown and "since base" in shown and "page: " in shown
    assert "data:image" in Path("mine/00000002.html").read_text(encoding="utf-8")


def test_two_processes_give_the_report_of_one(styles: Path) -> None:
    assert main(command("--output", "one")) == 0
    code = "from sdxl_finetune.cli import model; model()"
    two = [str(Path(sys.executable).with_name("accelerate")), "launch", "--multi_gpu", "--num_processes", "2"]
    two += ["--main_process_port", "0", "--no_python", sys.executable, "-c", code, *command("--output", "two")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(two, check=True, env=environment, capture_output=True)
    (one,), (other,) = reports("one"), reports("two")
    assert one.tags.equals(other.tags) and one.images.equals(other.images)


def test_a_stopped_run_completes_its_report_on_resume(styles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal during the report of an epoch: the state is saved, and the resumed run measures only what is missing."""
    monkeypatch.setattr(measuring, "ROUND", 2)
    measured: list[int] = []
    attempt = measuring._attempt

    def interrupted(subject, choice, numbers, *rest):  # type: ignore[no-untyped-def]
        measured.extend(numbers)
        if len(measured) == 8:  # in the second report
            os.kill(os.getpid(), signal.SIGTERM)
        return attempt(subject, choice, numbers, *rest)

    monkeypatch.setattr(measuring, "_attempt", interrupted)
    asked = ["--max_train_steps", "4", "--train_batch_size", "40", *REPORTS]
    with pytest.raises((AssertionError, Interrupt)):
        run(*asked)
    assert [report.facts.step for report in reports()] == [0] and list(Path("out/tags").glob("measuring-*"))
    assert list(Path("out").glob("*-state"))
    before = len(measured)
    run(*asked, "--resume", "auto")
    steps = [report.facts.step for report in reports()]
    assert steps == [0, 2, 4]
    units = len(set(measured))
    assert len(measured) - before == (units - 2) + units, "the two finished images are not measured again"
    assert not list(Path("out/tags").glob("measuring-*"))


def test_a_stop_request_ends_the_command(styles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, stop: StopRequest, **__: object) -> None:
        stop.number = signal.SIGINT

    monkeypatch.setattr("sdxl_finetune.commands.tags.make_report", stopped)
    assert main(command()) == 130


def test_noise_is_the_same_for_all_captions(styles: Path) -> None:
    """Twice the same measurement gives the same numbers to the last bit."""
    assert main(command("--output", "one")) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    np.random.seed(5)
    torch.manual_seed(9)
    assert main(command("--output", "two")) == 0
    (one,), (other,) = reports("one"), reports("two")
    assert one.tags.equals(other.tags) and one.images.equals(other.images)
