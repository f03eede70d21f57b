"""Draws are functions of their position: repeated for the same, new for any other, and well distributed."""

import pickle
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_finetune.batch import Position
from sdxl_finetune.config import Config
from sdxl_finetune.diffusion.draws import draw

SHAPE = (3, 4, 16, 12)
OFFSET = {"noise_offset": 0.1}
MULTIRES = {"multires_noise_iterations": 6, "multires_noise_discount": 0.4}
PERTURBED = {"ip_noise_gamma": 0.1}
RANDOM_STRENGTHS = {"noise_offset_random_strength": True, "ip_noise_gamma_random_strength": True}
EVERYTHING = OFFSET | PERTURBED | RANDOM_STRENGTHS


def at(step: int = 0, micro: int = 0) -> Position:
    return Position(epoch=0, step=step, micro=micro, micros=micro + 1)


def drawn(options=None, *, seed=7, step=0, micro=0, shape=SHAPE, latents=None):
    return draw(Config.model_construct(**(options or {})), seed, at(step, micro), shape, latents)


def assert_equal_rows(first, second, rows: int) -> None:
    for name in ("noise", "input_noise", "timesteps"):
        one, other = getattr(first, name), getattr(second, name)
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one[:rows], other[:rows])


@given(st.integers(0, 2**63), st.integers(0, 10**7), st.integers(0, 9), st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_an_image_s_draws_do_not_depend_on_the_number_of_images(seed, step, micro, one, other) -> None:
    first, second = (
        drawn(EVERYTHING, seed=seed, step=step, micro=micro, shape=(images, 4, 8, 6)) for images in (one, other)
    )
    assert_equal_rows(first, second, min(one, other))


@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_multires_noise_differs_by_one_factor_with_the_number_of_images(seed, one, other) -> None:
    """It divides by the deviation of the whole micro-batch, as in the reference; the rest holds per image."""
    first, second = (drawn(MULTIRES, seed=seed, shape=(images, 4, 16, 12)).noise for images in (one, other))
    ratio = first[: min(one, other)] / second[: min(one, other)]
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-4, atol=0)


def test_every_position_has_draws_of_its_own() -> None:
    """docs/differences.md: noise is a function of position, so no two ranks share it."""
    draws = [
        drawn(EVERYTHING, seed=seed, step=step, micro=micro, shape=(4, 4, 8, 8))
        for seed in (0, 1)
        for step in (0, 1, 2)
        for micro in (0, 1)
    ]
    for rows in (torch.cat([each.noise for each in draws]), torch.cat([each.input_noise for each in draws])):
        correlation = torch.corrcoef(rows.flatten(1)) - torch.eye(len(rows))
        # The correlation of 256 independent numbers deviates by 1/16; of repeated ones it is 1.
        assert correlation.abs().max() < 6 / 16
    assert len({tuple(each.timesteps.tolist()) for each in draws}) == len(draws)


def test_multires_layers_differ_between_images_and_steps() -> None:
    """Without the base: what the pyramid adds to it, freed of the common factor."""
    added = []
    for step in range(3):
        base, noise = drawn(step=step).noise, drawn(MULTIRES, step=step).noise
        # The first layer is a multiple of the base, so the rest is what is orthogonal to it.
        rest = noise - (noise * base).sum() / base.square().sum() * base
        added += list(rest.flatten(1))
    correlation = torch.corrcoef(torch.stack(added)) - torch.eye(len(added))
    assert correlation.abs().max() < 0.8


def test_epoch_and_window_length_do_not_matter() -> None:
    one = draw(Config.model_construct(), 7, Position(epoch=0, step=5, micro=0, micros=1), SHAPE)
    other = draw(Config.model_construct(), 7, Position(epoch=3, step=5, micro=0, micros=4), SHAPE)
    assert_equal_rows(one, other, SHAPE[0])


@pytest.mark.parametrize("options", [OFFSET, MULTIRES, PERTURBED, EVERYTHING])
def test_options_do_not_move_each_other_s_draws(options) -> None:
    """docs/differences.md: one option does not move the draws of another."""
    plain, other = drawn(), drawn(options)
    assert torch.equal(plain.timesteps, other.timesteps)
    if options is PERTURBED:
        assert torch.equal(plain.noise, other.noise)


def test_noise_is_standard_normal() -> None:
    noise = drawn(shape=(16, 4, 64, 64)).noise
    assert noise.dtype == torch.float32
    for image in noise:
        assert abs(image.mean()) < 5 / image.numel() ** 0.5
        assert abs(image.std() - 1) < 5 / (2 * image.numel()) ** 0.5
    beyond = (noise.abs() > 1.959964).float().mean()
    assert abs(beyond - 0.05) < 0.003


def test_offset_is_one_constant_per_channel() -> None:
    shift = drawn(OFFSET, shape=(64, 4, 4, 4)).noise - drawn(shape=(64, 4, 4, 4)).noise
    assert torch.allclose(shift, shift[..., :1, :1], atol=1e-6)
    assert shift[..., 0, 0].std() == pytest.approx(0.1, rel=0.2)


def test_random_strengths_lie_between_nothing_and_all() -> None:
    full, plain = drawn(OFFSET | PERTURBED), drawn()
    shares = {"offset": set(), "input": set()}
    for step in range(40):
        full, plain = drawn(OFFSET | PERTURBED, step=step), drawn(step=step)
        scaled = drawn(EVERYTHING, step=step)
        offset = (scaled.noise - plain.noise).sum() / (full.noise - plain.noise).sum()
        shares["offset"].add(float(offset))
        shares["input"].add(float(scaled.input_noise.sum() / full.input_noise.sum()))
    for values in shares.values():
        assert len(values) == 40
        assert 0 <= min(values) < 0.2
        assert 0.8 < max(values) <= 1


def test_adaptive_offset_follows_the_latents() -> None:
    latents = torch.zeros(SHAPE)
    latents[1] = -3.0
    options = OFFSET | {"adaptive_noise_scale": 0.5}
    shift = drawn(options, latents=latents).noise - drawn().noise
    fixed = drawn(OFFSET).noise - drawn().noise
    torch.testing.assert_close(shift[0], fixed[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(shift[1], fixed[1] * (0.1 + 1.5) / 0.1, rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError, match="latents"):
        drawn(options)


def test_multires_noise_has_unit_deviation_and_is_coarser() -> None:
    plain, coarse = drawn(shape=(4, 4, 64, 64)).noise, drawn(MULTIRES, shape=(4, 4, 64, 64)).noise
    assert coarse.std() == pytest.approx(1, abs=1e-5)
    neighbours = [(noise[..., 1:] * noise[..., :-1]).mean() for noise in (plain, coarse)]
    assert abs(neighbours[0]) < 0.02
    assert neighbours[1] > 0.03


def test_input_noise_has_its_own_draws() -> None:
    both = drawn(PERTURBED, shape=(4, 4, 64, 64))
    assert both.input_noise.std() == pytest.approx(0.1, rel=0.02)
    assert abs((both.noise * both.input_noise).mean()) < 1e-3
    assert drawn().input_noise is None
    assert drawn({"ip_noise_gamma": 0.0}).input_noise is None


def test_timesteps_are_uniform_over_all() -> None:
    timesteps = torch.cat([drawn(step=step, shape=(64, 1, 1, 1)).timesteps for step in range(100)])
    assert timesteps.dtype == torch.int64
    assert 0 <= timesteps.min() < 5
    assert 995 <= timesteps.max() < 1000
    counts = torch.histc(timesteps.float(), bins=10, min=0, max=1000)
    expected = len(timesteps) / 10
    assert ((counts - expected) ** 2 / expected).sum() < 27.9  # chi-squared of 9 degrees, 1 in 1,000


def test_timestep_range_is_the_reference_s(golden) -> None:
    """The maximum is not drawn, except that an empty range gives it."""
    ranges = {(case["args"].get("min_timestep"), case["args"].get("max_timestep")): case
              for case in golden("noise.json")["cases"]}  # fmt: skip
    assert len(ranges) > 8
    for (low, high), case in ranges.items():
        options = {"min_timestep": low, "max_timestep": high}
        if "raised" in case:
            with pytest.raises(AssertionError, match="no timestep"):
                drawn(options)
            continue
        timesteps = drawn(options, shape=(50, 1, 1, 1)).timesteps.tolist()
        first, end = low or 0, 1000 if high is None else high
        if first < end:
            assert first <= min(timesteps)
            assert max(timesteps) < end
            assert len(set(timesteps)) > 1 or end - first == 1
        else:
            assert set(timesteps) == set(case["timesteps"]) == {end}


def test_draws_pass_to_worker_processes() -> None:
    call = partial(draw, Config.model_construct(**EVERYTHING), 7)
    copy = pickle.loads(pickle.dumps(call))
    assert_equal_rows(copy(at(3), SHAPE), call(at(3), SHAPE), SHAPE[0])
    result = call(at(3), SHAPE)
    assert_equal_rows(pickle.loads(pickle.dumps(result)), result, SHAPE[0])


def test_global_generators_are_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    drawn(EVERYTHING | MULTIRES)
    assert torch.equal(torch.get_rng_state(), before)
