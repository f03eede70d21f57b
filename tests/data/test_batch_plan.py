"""Each image is in exactly num_repeats batches of an epoch, batches have one shape, and steps stay within an epoch."""

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_finetune.data.batch_plan import Plan, build_plan
from sdxl_finetune.data.index import build_index

AREAS = [64 * 64, 96 * 32, 32 * 96, 128 * 128]


def build(bucket: list[int], repeats: list[int], batch_sizes: list[int], **options: int) -> Plan:
    return Plan(
        bucket=np.array(bucket, np.int32),
        repeats=np.array(repeats, np.int32),
        batch_sizes=np.array(batch_sizes),
        areas=np.array(AREAS[: len(batch_sizes)]),
        **{"accumulation": 1, "seed": 1, **options},
    )


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    rows = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
    bucket, repeats = zip(*rows, (0, 1), strict=True)
    batch_sizes = draw(st.lists(st.integers(1, 5), min_size=4, max_size=4))
    options = {"accumulation": draw(st.integers(1, 4)), "seed": draw(st.integers(0, 9))}
    return build(list(bucket), list(repeats), batch_sizes, **options)


@settings(deadline=None)
@given(plans())
def test_every_image_is_used_num_repeats_times_an_epoch(plan: Plan) -> None:
    micro_batches = list(plan.micro_batches(0, 3 * plan.steps_per_epoch))
    for epoch in range(3):
        mine = [micro_batch for micro_batch in micro_batches if micro_batch.position.epoch == epoch]
        counts = Counter(np.concatenate([micro_batch.rows for micro_batch in mine]).tolist())
        assert counts == {row: n for row, n in enumerate(plan.repeats.tolist()) if n}
        assert len(mine) == plan.batches_per_epoch
        assert len({micro_batch.position.step for micro_batch in mine}) == plan.steps_per_epoch
    for micro_batch in micro_batches:
        assert len(set(plan.bucket[micro_batch.rows])) == 1
        assert 1 <= len(micro_batch.rows) <= plan.batch_sizes[plan.bucket[micro_batch.rows[0]]]


@settings(deadline=None)
@given(plans())
def test_steps_have_all_their_micro_batches_within_one_epoch(plan: Plan) -> None:
    """Only the last step of an epoch has fewer micro-batches."""
    steps = plan.steps_per_epoch
    positions_of_step: dict[int, list] = {}
    for micro_batch in plan.micro_batches(0, 2 * steps):
        positions_of_step.setdefault(micro_batch.position.step, []).append(micro_batch.position)
    assert list(positions_of_step) == list(range(2 * steps))
    for step, positions in positions_of_step.items():
        assert [position.micro_batch for position in positions] == list(range(len(positions)))
        assert {position.micro_batches_in_step for position in positions} == {len(positions)}
        assert {position.epoch for position in positions} == {step // steps}
        assert positions[-1].is_last_micro_batch
        assert len(positions) == plan.accumulation or step % steps == steps - 1


@settings(deadline=None)
@given(plans(), st.data())
def test_a_plan_that_starts_at_a_step_continues_like_the_whole_plan(plan: Plan, data: st.DataObject) -> None:
    """A resumed run gets the micro-batches that an uninterrupted run gets from that step on."""
    last = 3 * plan.steps_per_epoch
    first = data.draw(st.integers(0, last))
    whole = [micro_batch for micro_batch in plan.micro_batches(0, last) if micro_batch.position.step >= first]
    resumed = list(plan.micro_batches(first, last))
    assert [micro_batch.position for micro_batch in resumed] == [micro_batch.position for micro_batch in whole]
    assert all((a.rows == b.rows).all() for a, b in zip(resumed, whole, strict=True))
    assert list(plan.micro_batches(last, last)) == []


@settings(deadline=None)
@given(plans())
def test_the_first_batch_has_the_most_pixels(plan: Plan) -> None:
    pixels = [
        plan.areas[plan.bucket[micro_batch.rows]].sum() for micro_batch in plan.micro_batches(0, plan.steps_per_epoch)
    ]
    assert pixels[0] == max(pixels)


def test_the_order_differs_between_epochs_and_seeds() -> None:
    plans = [build([0] * 40, [1] * 40, [4], seed=seed) for seed in (1, 2)]
    orders = [plan.epoch(epoch).rows.tolist() for plan in plans for epoch in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == 6


def test_two_ranks_at_half_the_batch_size_use_the_same_global_batches(
    tmp_path: Path, subset, dataset, write_images
) -> None:
    """Each dataset keeps its own batch size and buckets."""
    write_images(tmp_path / "a", {f"{number}.png": (64, 64) for number in range(9)})
    plans = []
    for batch_size, ranks in ((4, 1), (2, 2)):
        first = dataset(subset(tmp_path / "a"), batch_size=batch_size)
        second = dataset(subset(tmp_path / "a"), batch_size=2, resolution=(96, 96))
        index = build_index([first, second], tmp_path / "cache", on_bad_image="stop")
        plans.append(build_plan(index, ranks=ranks, accumulation=1, seed=3))
    assert [plan.batch_sizes.tolist() for plan in plans] == [[4, 2], [4, 4]]
    assert [plan.areas.tolist() for plan in plans] == [[64 * 64, 96 * 96]] * 2
    first, second = (plan.epoch(1).rows for plan in plans)
    assert (first == second).all()


def test_a_pickled_micro_batch_is_small() -> None:
    micro_batch = next(build([0] * 1000, [1] * 1000, [8]).micro_batches(0, 5))
    assert len(pickle.dumps(micro_batch)) < 1000
