"""Gain and accuracy of a denoiser whose loss is known in closed form, and of interrupted measurements."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from sdxl_finetune.batch import TextOutputs
from sdxl_finetune.runtime.signals import StopRequest
from sdxl_finetune.tag_report import measure as measuring
from sdxl_finetune.tag_report.choice import choose
from sdxl_finetune.tag_report.finished import Finished
from sdxl_finetune.tag_report.making import Job, make_report
from sdxl_finetune.tag_report.measure import MeasurementFailed, measure
from sdxl_finetune.tag_report.results import share_error
from sdxl_finetune.tag_report.schema import Report, load_report
from tests.tag_report.conftest import KnownDenoiser, by_tag, dataset_of, index_of, options, subject_of

KNOWN = {"style_a": 0.4, "Style B": 0.9, "style_b": 0.8, "style_d": 0.9}
ASKED = ["--tag_report_tags", "style_*", "--tag_report_others", "2", "--tag_report_timesteps", "100,900,999"]


def build_job(*more: str) -> Job:
    config = options(*ASKED, *more)
    index = index_of(config)
    model = KnownDenoiser(lambda _: 1.0)
    return Job(
        config=config,
        index=index,
        choice=choose(config, index),
        dataset=dataset_of(index, model),
        accelerator=Accelerator(cpu=True),
        folder=Path("tags"),
    )


def report_on(job: Job, model: KnownDenoiser, step: int = 0, **more) -> Report:
    facts = job.facts("model.safetensors", step=step, epoch=0)
    report = make_report(job, subject_of(model, job.config), facts, epochs=2.0, **more)
    assert report is not None
    return report


@pytest.mark.parametrize("predicts_v", [False, True])
def test_gain_and_accuracy_are_those_of_the_known_losses(folder: Path, predicts_v: bool) -> None:
    """v-prediction is measured with zero terminal SNR, whose last timestep is 999."""
    report = report_on(build_job(), KnownDenoiser(by_tag(KNOWN, 1.0), predicts_v))
    rows = {row["tag"]: row for row in report.tags.to_pylist()}
    assert rows["style_a"]["gain"] == pytest.approx(1 - 0.4**2, rel=1e-3)
    # Two images write style_b and c0 keeps 0.8 without style_c; one writes Style B.
    assert rows["style_b"]["gain"] == pytest.approx(np.mean([1 - 0.8**2, 1 - 0.8**2, 1 - 0.9**2]), rel=1e-3)
    assert rows["style_c"]["gain"] == pytest.approx(0, abs=1e-3)
    assert rows["style_a"]["accuracy"] == 1.0 and rows["style_a"]["chance"] == 1 / 2
    assert rows["style_c"]["chance"] == pytest.approx(1 / 3)
    assert rows["style_c"]["accuracy"] == 0.0
    gains = [1 - 0.8**2, 1 - 0.8**2, 1 - 0.9**2]
    assert rows["style_b"]["gain_error"] == pytest.approx(np.std(gains, ddof=1) / np.sqrt(3), rel=1e-3)
    assert rows["style_a"]["accuracy_error"] == pytest.approx(share_error(np.ones(3)), rel=1e-5)
    assert [rows[tag]["exposures"] for tag in sorted(rows)] == [6, 6, 2, 2]
    assert rows["style_d"]["gain_error"] is None and rows["style_d"]["state"] == "unclear", "one image says little"
    ranks = {(row["tag"], row["image"]): row["rank"] for row in report.images.to_pylist()}
    assert ranks["style_a", "images/a0.png"] == 0
    assert ranks["style_c", "images/c0.png"] > 0


def test_each_caption_is_encoded_once_and_passes_are_those_foretold(folder: Path) -> None:
    job, model = build_job(), KnownDenoiser(by_tag(KNOWN, 1.0))
    report_on(job, model)
    assert len(model.encoded) == len(set(model.encoded))
    assert model.passes == job.choice.passes == 3 * sum(len(unit.captions) for unit in job.choice.units)
    assert f"{job.choice.passes:,} forward passes" in job.choice.describe()


def test_a_report_is_repeated_exactly_and_compares_with_the_earlier_ones(folder: Path) -> None:
    job = build_job()
    first = report_on(job, KnownDenoiser(by_tag(KNOWN, 1.0)))
    again = report_on(job, KnownDenoiser(by_tag(KNOWN, 1.0)))
    assert first.tags.equals(again.tags) and first.images.equals(again.images)
    assert first.tags["gain_since_base"].null_count == 4
    report_on(job, KnownDenoiser(by_tag(KNOWN | {"style_a": 0.3}, 1.0)), step=10)
    last = report_on(job, KnownDenoiser(by_tag(KNOWN | {"style_a": 0.2}, 1.0)), step=20)
    row = last.tags.to_pylist()[0]
    assert row["gain_since_base"] == pytest.approx(0.4**2 - 0.2**2, rel=1e-3)
    assert row["gain_since_last"] == pytest.approx(0.3**2 - 0.2**2, rel=1e-3)
    assert load_report(Path("tags/00000020.parquet")).tags.equals(last.tags)
    other = build_job("--tag_report_images", "1")
    assert report_on(other, KnownDenoiser(by_tag(KNOWN, 1.0)), step=30).tags["gain_since_last"].null_count == 4


def test_an_interrupted_measurement_goes_on_where_it_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "ROUND", 2)
    job, stop = build_job(), StopRequest()
    whole = report_on(job, KnownDenoiser(by_tag(KNOWN, 1.0)))
    model = KnownDenoiser(by_tag(KNOWN, 1.0))
    stop.number = 15
    facts = job.facts("model.safetensors", step=0, epoch=0)
    assert make_report(job, subject_of(model, job.config), facts, epochs=2.0, stop=stop) is None
    (kept,) = Path("tags").glob("measuring-*")
    done = 3 * sum(len(unit.captions) for unit in job.choice.units[:2])
    assert model.passes == done
    with kept.open("a") as file:
        file.write("[3, [[0.1, 0.")  # a killed process
    model.passes = 0
    state = model.state_dict()
    rest = report_on(job, model)
    assert model.passes == job.choice.passes - done
    assert rest.tags.equals(whole.tags) and rest.images.equals(whole.images)
    assert not list(Path("tags").glob("measuring-*"))
    stop_again = KnownDenoiser(by_tag(KNOWN, 1.0))
    stop_again.load_state_dict(state)
    make_report(job, subject_of(stop_again, job.config), facts, epochs=2.0, stop=stop)
    other = KnownDenoiser(by_tag(KNOWN, 1.0))  # other weights
    report_on(job, other)
    assert other.passes == job.choice.passes


def test_a_failure_names_its_reason(folder: Path) -> None:
    job = build_job()
    model = KnownDenoiser(lambda caption: 1.0)
    model.encode_text = None  # type: ignore[assignment,method-assign]
    with pytest.raises(MeasurementFailed, match="TypeError: 'NoneType' object is not callable"):
        measure(subject_of(model, job.config), job.choice, job.dataset, job.accelerator, Finished(None))
    with pytest.raises(MeasurementFailed, match="infinite or not a number"):
        infinite = KnownDenoiser(lambda caption: 1.0)
        infinite.encode_text = lambda _: TextOutputs(torch.zeros(1, 1, 1), torch.full((1, 1), torch.inf))
        measure(subject_of(infinite, job.config), job.choice, job.dataset, job.accelerator, Finished(None))
