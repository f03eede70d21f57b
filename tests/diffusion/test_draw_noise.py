"""Noise is a function of its position: repeated for the same position, new for any other, and well distributed."""

import pickle
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdxl_finetune.batch import Position
from sdxl_finetune.config import NoiseOptions
from sdxl_finetune.diffusion.noise import draw_noise

SHAPE = (3, 4, 16, 12)
OFFSET = {"noise_offset": 0.1}
MULTIRES = {"multires_noise_iterations": 6, "multires_noise_discount": 0.4}
PERTURBED = {"ip_noise_gamma": 0.1}
RANDOM_STRENGTHS = {"noise_offset_random_strength": True, "ip_noise_gamma_random_strength": True}
EVERYTHING = OFFSET | PERTURBED | RANDOM_STRENGTHS

Noise = tuple[Tensor, Tensor | None]


def at(step: int = 0, micro_batch: int = 0) -> Position:
    return Position(epoch=0, step=step, micro_batch=micro_batch, micro_batches_in_step=micro_batch + 1)


def drawn(options=None, *, seed=7, step=0, micro_batch=0, shape=SHAPE, latents=None) -> Noise:
    return draw_noise(NoiseOptions(**(options or {})), seed, at(step, micro_batch), shape, latents)


def assert_equal_rows(first: Noise, second: Noise, rows: int) -> None:
    for left, right in zip(first, second, strict=True):
        assert (left is None) == (right is None)
        assert left is None or torch.equal(left[:rows], right[:rows])


@given(st.integers(0, 2**63), st.integers(0, 10**7), st.integers(0, 9), st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_noise_of_an_image_does_not_depend_on_the_number_of_images(seed, step, micro_batch, images1, images2) -> None:
    first, second = (
        drawn(EVERYTHING, seed=seed, step=step, micro_batch=micro_batch, shape=(images, 4, 8, 6))
        for images in (images1, images2)
    )
    assert_equal_rows(first, second, min(images1, images2))


@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_multires_noise_differs_by_one_factor_with_the_number_of_images(seed, images1, images2) -> None:
    """It is divided by the deviation of the whole micro-batch, as in the reference; everything else is per image."""
    first, second = (drawn(MULTIRES, seed=seed, shape=(images, 4, 16, 12))[0] for images in (images1, images2))
    rows = min(images1, images2)
    ratio = first[:rows] / second[:rows]
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-4, atol=0)


def test_noise_at_different_positions_is_independent() -> None:
    """docs/differences.md: noise is a function of position, so no two ranks share it."""
    draws = [
        drawn(EVERYTHING, seed=seed, step=step, micro_batch=micro_batch, shape=(4, 4, 8, 8))
        for seed in (0, 1)
        for step in (0, 1, 2)
        for micro_batch in (0, 1)
    ]
    for rows in (torch.cat([noise for noise, _ in draws]), torch.cat([input_noise for _, input_noise in draws])):
        correlation = torch.corrcoef(rows.flatten(1)) - torch.eye(len(rows))
        # The correlation of 256 independent numbers deviates by 1/16; that of repeated numbers is 1.
        assert correlation.abs().max() < 6 / 16


def test_multires_layers_differ_between_images_and_steps() -> None:
    added = []
    for step in range(3):
        base, noise = drawn(step=step)[0], drawn(MULTIRES, step=step)[0]
        # The first layer is a multiple of the base. What is orthogonal to the base comes from the other layers.
        rest = noise - (noise * base).sum() / base.square().sum() * base
        added += list(rest.flatten(1))
    correlation = torch.corrcoef(torch.stack(added)) - torch.eye(len(added))
    assert correlation.abs().max() < 0.8


def test_noise_depends_neither_on_the_epoch_nor_on_the_number_of_micro_batches() -> None:
    first = draw_noise(NoiseOptions(), 7, Position(epoch=0, step=5, micro_batch=0, micro_batches_in_step=1), SHAPE)
    second = draw_noise(NoiseOptions(), 7, Position(epoch=3, step=5, micro_batch=0, micro_batches_in_step=4), SHAPE)
    assert_equal_rows(first, second, SHAPE[0])


def test_input_noise_option_does_not_change_the_noise() -> None:
    """docs/differences.md: one option does not change the numbers that another option draws."""
    assert torch.equal(drawn()[0], drawn(PERTURBED)[0])


def test_noise_is_standard_normal() -> None:
    noise, _ = drawn(shape=(16, 4, 64, 64))
    assert noise.dtype == torch.float32
    for image in noise:
        assert abs(image.mean()) < 5 / image.numel() ** 0.5
        assert abs(image.std() - 1) < 5 / (2 * image.numel()) ** 0.5
    beyond = (noise.abs() > 1.959964).float().mean()
    assert abs(beyond - 0.05) < 0.003


def test_noise_offset_adds_one_constant_to_each_channel() -> None:
    shift = drawn(OFFSET, shape=(64, 4, 4, 4))[0] - drawn(shape=(64, 4, 4, 4))[0]
    assert torch.allclose(shift, shift[..., :1, :1], atol=1e-6)
    assert shift[..., 0, 0].std() == pytest.approx(0.1, rel=0.2)


def test_random_strengths_lie_between_zero_and_the_full_strength() -> None:
    shares = {"offset": set(), "input": set()}
    for step in range(40):
        (full, full_input), (plain, _) = drawn(OFFSET | PERTURBED, step=step), drawn(step=step)
        scaled, scaled_input = drawn(EVERYTHING, step=step)
        shares["offset"].add(float((scaled - plain).sum() / (full - plain).sum()))
        shares["input"].add(float(scaled_input.sum() / full_input.sum()))
    for values in shares.values():
        assert len(values) == 40
        assert 0 <= min(values) < 0.2
        assert 0.8 < max(values) <= 1


def test_adaptive_offset_follows_the_latents() -> None:
    latents = torch.zeros(SHAPE)
    latents[1] = -3.0
    options = OFFSET | {"adaptive_noise_scale": 0.5}
    shift = drawn(options, latents=latents)[0] - drawn()[0]
    fixed = drawn(OFFSET)[0] - drawn()[0]
    torch.testing.assert_close(shift[0], fixed[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(shift[1], fixed[1] * (0.1 + 1.5) / 0.1, rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError, match="latents"):
        drawn(options)


def test_multires_noise_has_deviation_one_and_is_coarser() -> None:
    plain, coarse = drawn(shape=(4, 4, 64, 64))[0], drawn(MULTIRES, shape=(4, 4, 64, 64))[0]
    assert coarse.std() == pytest.approx(1, abs=1e-5)
    neighbours = [(noise[..., 1:] * noise[..., :-1]).mean() for noise in (plain, coarse)]
    assert abs(neighbours[0]) < 0.02
    assert neighbours[1] > 0.03


def test_input_noise_is_independent_of_the_noise() -> None:
    noise, input_noise = drawn(PERTURBED, shape=(4, 4, 64, 64))
    assert input_noise.std() == pytest.approx(0.1, rel=0.02)
    assert abs((noise * input_noise).mean()) < 1e-3
    assert drawn()[1] is None
    assert drawn({"ip_noise_gamma": 0.0})[1] is None


def test_draw_noise_passes_to_worker_processes() -> None:
    call = partial(draw_noise, NoiseOptions(**EVERYTHING), 7)
    copy = pickle.loads(pickle.dumps(call))
    assert_equal_rows(copy(at(3), SHAPE), call(at(3), SHAPE), SHAPE[0])


def test_global_generators_are_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    drawn(EVERYTHING | MULTIRES)
    assert torch.equal(torch.get_rng_state(), before)
