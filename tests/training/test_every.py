"""When previews, validation and saves are due: golden times, and the same answer for the run and for sdxl-check."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_finetune.config import PreviewOptions, ResumeOptions, SavingOptions, ValidationOptions
from sdxl_finetune.data.batch_plan import Plan
from sdxl_finetune.training.every import Every, Timeline, first_step, previews_every, saves_every, validation_every


def timeline(steps: int, steps_per_epoch: int, origin: tuple[int, int] = (0, 0)) -> Timeline:
    """A run of one bucket whose epochs have `steps_per_epoch` steps."""
    zeros = np.zeros(steps_per_epoch, np.int32)
    plan = Plan(
        bucket=zeros,
        repeats=zeros + 1,
        batch_sizes=np.ones(1, np.int64),
        areas=np.ones(1, np.int64),
        accumulation=1,
        seed=0,
        origin=origin,
    )
    return Timeline(plan, steps)


def steps_due(every: Every, steps: int, steps_per_epoch: int) -> list[int]:
    return [moment.step for moment in every.moments(timeline(steps, steps_per_epoch))]


def test_previews_are_drawn_when_the_reference_draws_them(golden) -> None:
    for line in golden("sample_prompts.json")["when"]["timelines"]:
        periods = {
            name.removeprefix("--"): int(value)
            for name, value in itertools.pairwise(line["cli"])
            if name.startswith("--sample_every")
        }
        options = PreviewOptions(**periods, sample_at_first="--sample_at_first" in line["cli"])
        steps = line["epochs"] * line["steps_per_epoch"]
        expected = [call["steps_argument"] for call in line["sampled"]]
        assert steps_due(previews_every(options), steps, line["steps_per_epoch"]) == expected


@pytest.mark.parametrize(
    ("options", "steps_per_epoch", "expected"),
    [
        ({}, 4, [0, 4, 8, 10]),
        ({"validate_every_n_epochs": 2}, 2, [0, 4, 8, 10]),
        ({"validate_every_n_steps": 3}, 4, [0, 3, 6, 9, 10]),
        ({"validate_every_n_steps": 3, "validate_every_n_epochs": 1}, 4, [0, 4, 8, 10]),
        ({"validate_every_n_steps": 0}, 4, [0, 10]),
    ],
)
def test_validation_is_due_at_start_and_end_and_in_its_period(
    options: dict, steps_per_epoch: int, expected: list[int]
) -> None:
    assert steps_due(validation_every(ValidationOptions(**options)), 10, steps_per_epoch) == expected


def test_save_n_epoch_ratio_asks_for_a_number_of_checkpoints() -> None:
    assert saves_every(SavingOptions(save_n_epoch_ratio=5, save_every_n_epochs=1), 20).epochs == 4
    assert saves_every(SavingOptions(save_n_epoch_ratio=5), 3).epochs == 1
    assert saves_every(SavingOptions(save_every_n_epochs=3), 3).epochs == 3


def test_the_end_of_the_run_ends_its_last_epoch() -> None:
    run = timeline(10, 4)
    assert [run.after(step).epoch for step in range(11)] == [None, None, None, None, 1, None, None, None, 2, None, 3]
    assert run.after(10).is_last and not run.after(9).is_last
    assert run.epochs == 3
    resumed_at_next_epoch = timeline(12, 3, origin=(6, 2))
    assert [resumed_at_next_epoch.after(step).epoch for step in (7, 9, 12)] == [None, 3, 4]


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({}, 0),
        ({"initial_epoch": 1}, 0),
        ({"initial_epoch": 3}, 8),
        ({"initial_step": 5}, 5),
        ({"initial_step": 5, "initial_epoch": 3}, 5),
        ({"initial_step": 0, "initial_epoch": 3}, 0),
        ({"initial_step": 9}, 9),
        ({"initial_step": 10}, 0),
        ({"initial_epoch": 4}, 0),
    ],
)
def test_a_new_run_may_count_from_a_later_step(options: dict, first: int) -> None:
    run = timeline(10, 4)
    assert first_step(ResumeOptions(**options), run.plan, 10) == first
    later = Timeline(run.plan, 10, first)
    every = Every(steps=3, at_start=True)
    assert [moment.step for moment in every.moments(later)] == [first, *(step for step in (3, 6, 9) if step > first)]


periods = st.one_of(st.none(), st.integers(0, 9))


@given(periods, periods, st.booleans(), st.booleans(), st.integers(1, 40), st.integers(1, 9))
def test_the_moments_that_sdxl_check_lists_are_those_of_the_run(
    steps: int | None, epochs: int | None, at_start: bool, at_end: bool, length: int, steps_per_epoch: int
) -> None:
    every = Every(steps=steps, epochs=epochs, at_start=at_start, at_end=at_end)
    run = timeline(length, steps_per_epoch)
    asked_after_each_step = [step for step in range(length + 1) if every.is_due(run.after(step))]
    assert steps_due(every, length, steps_per_epoch) == asked_after_each_step
    for step in range(length):
        assert step < every.next_step(run, step) <= length
