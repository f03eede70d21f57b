"""Runs with stratified, shifted timesteps draw the same timesteps on any number of processes and after a resume."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.training.toy_runs import OPTIONS, losses, read_rows, run, train_on_two_processes

FLOW = ["--flow_model", "--flow_uniform_shift", "--flow_uniform_base_pixels", "2048", "--stratified_timesteps"]
FLOW += ["--gradient_accumulation_steps", "2", "--max_train_steps", "3", "--train_batch_size", "4"]
Histograms = dict[int, list[tuple[float, float]]]
"""Ends and counts of the bars, by step."""


def histograms(folder: str) -> Histograms:
    (events,) = Path(folder).glob("*/finetuning")
    written = EventAccumulator(str(events), size_guidance={"histograms": 0}).Reload().Histograms("timesteps")
    values = {event.step: event.histogram_value for event in written}
    return {
        step: [pair for pair in zip(value.bucket_limit, value.bucket, strict=True) if pair[1]]
        for step, value in values.items()
    }


def test_two_processes_draw_the_timesteps_of_one(work) -> None:
    alone, drawn = losses(run(*FLOW)), histograms("logs")
    assert list(drawn) == [3]
    assert sum(count for _, count in drawn[3]) >= 3 * 4
    words = [*OPTIONS, *FLOW, "--train_batch_size", "2", "--logging_dir", "logs2", "--output_dir", "out2"]
    train_on_two_processes(words)
    assert histograms("logs2") == drawn
    assert losses(read_rows("logs2")) == pytest.approx(alone, rel=1e-3)


def test_a_resumed_run_writes_the_histograms_of_an_uninterrupted_one(work) -> None:
    options = [*FLOW, "--save_state", "--save_every_n_steps", "2"]
    whole = losses(run(*options))
    drawn = histograms("logs")
    assert list(drawn) == [2, 3]
    resumed = losses(run(*options, "--resume", "out/at-step00000002-state"))
    assert resumed == whole[2:]
    assert histograms("logs") == {3: drawn[3]}
