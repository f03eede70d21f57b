"""Timesteps are uniform over the reference's range and functions of seed, step, micro-batch and slot."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_finetune.batch import Position
from sdxl_finetune.config import Config
from sdxl_finetune.diffusion.timesteps import draw_timesteps


def drawn(
    images: int, *, step: int = 0, micro_batch: int = 0, seed: int = 7, epoch: int = 0, objective="noise", **options
) -> torch.Tensor:
    position = Position(epoch=epoch, step=step, micro_batch=micro_batch, micro_batches_in_step=micro_batch + 1)
    return draw_timesteps(NoiseOptions(**options), objective, seed, position, images)


def test_timesteps_are_uniform_over_all() -> None:
    timesteps = torch.cat([drawn(64, step=step) for step in range(100)])
    assert timesteps.dtype == torch.int64
    assert 0 <= timesteps.min() < 5
    assert 995 <= timesteps.max() < 1000
    counts = torch.histc(timesteps.float(), bins=10, min=0, max=1000)
    expected = len(timesteps) / 10
    assert ((counts - expected) ** 2 / expected).sum() < 27.9  # chi-squared with 9 degrees of freedom, 1 in 1,000


@given(st.integers(0, 2**63), st.integers(0, 10**7), st.integers(0, 9), st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_timestep_of_an_image_does_not_depend_on_the_number_of_images(
    seed, step, micro_batch, images1, images2
) -> None:
    first, second = (drawn(images, seed=seed, step=step, micro_batch=micro_batch) for images in (images1, images2))
    rows = min(images1, images2)
    assert torch.equal(first[:rows], second[:rows])


def test_noise_options_do_not_change_the_timesteps() -> None:
    """docs/differences.md: one option does not change the numbers that another option draws."""
    for options in ({"noise_offset": 0.1}, {"multires_noise_iterations": 6}, {"ip_noise_gamma": 0.1}):
        assert torch.equal(drawn(8, **options), drawn(8))


def test_timesteps_differ_between_seeds_steps_and_micro_batches_but_not_epochs() -> None:
    places = [
        {"seed": seed, "step": step, "micro_batch": micro_batch}
        for seed in (0, 1)
        for step in (0, 1, 2)
        for micro_batch in (0, 1)
    ]
    assert len({tuple(drawn(4, **place).tolist()) for place in places}) == len(places)
    assert torch.equal(drawn(4, epoch=3), drawn(4))


def test_timestep_range_is_the_reference_s(golden) -> None:
    """`max_timestep` itself is drawn only if the range is empty."""
    ranges = {(case["args"].get("min_timestep"), case["args"].get("max_timestep")): case
              for case in golden("noise.json")["cases"]}  # fmt: skip
    assert len(ranges) > 8
    for (low, high), case in ranges.items():
        options = NoiseOptions.model_construct(min_timestep=low, max_timestep=high)
        position = Position(epoch=0, step=0, micro_batch=0, micro_batches_in_step=1)
        if "raised" in case:
            with pytest.raises(AssertionError, match="no timestep"):
                draw_timesteps(options, "noise", 7, position, 3)
            continue
        timesteps = draw_timesteps(options, "noise", 7, position, 50).tolist()
        first, end = low or 0, 1000 if high is None else high
        if first < end:
            assert first <= min(timesteps)
            assert max(timesteps) < end
            assert len(set(timesteps)) > 1 or end - first == 1
        else:
            assert set(timesteps) == set(case["timesteps"]) == {end}


def test_timesteps_of_a_flow_lie_between_whole_numbers_up_to_the_last() -> None:
    timesteps = torch.cat([drawn(64, step=step, objective="flow", min_timestep=200) for step in range(50)])
    assert timesteps.dtype == torch.float32
    assert 200 < timesteps.min() < 205
    assert 995 < timesteps.max() <= 1000
    assert (timesteps != timesteps.round()).float().mean() > 0.99
