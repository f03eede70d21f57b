"""Timesteps follow the chosen distribution over the reference's range and are functions of seed, step and slot."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.integrate import quad
from scipy.special import logit

from sdxl_finetune.batch import Position
from sdxl_finetune.config import Config
from sdxl_finetune.diffusion.timesteps import draw_timesteps, quantile, shift_ratio, shifted

MEGAPIXEL = 1024 * 1024
DISTRIBUTIONS = {
    "uniform": ({}, stats.uniform.cdf),
    "logit_normal": ({}, lambda t: stats.norm.cdf(logit(t))),
    "logit_normal to noise": (
        {"flow_logit_mean": 0.5, "flow_logit_std": 0.6},
        lambda t: stats.norm(0.5, 0.6).cdf(logit(t)),
    ),
    "beta": ({}, stats.beta(1.5, 1).cdf),
    "beta in the middle": ({"flow_beta_alpha": 2.0, "flow_beta_beta": 3.0}, stats.beta(2, 3).cdf),
    "cosmap": (
        {},
        np.vectorize(lambda t: quad(lambda x: 2 / (math.pi - 2 * math.pi * x + 2 * math.pi * x * x), 0, t)[0]),
    ),
}
"""Options and an independent distribution function of t in (0, 1), by the first word of the name."""


def drawn(
    images: int,
    *,
    step: int = 0,
    micro_batch: int = 0,
    seed: int = 7,
    epoch: int = 0,
    micro_batches: int | None = None,
    pixels: int = MEGAPIXEL,
    **options,
) -> torch.Tensor:
    position = Position(
        epoch=epoch, step=step, micro_batch=micro_batch, micro_batches_in_step=micro_batches or micro_batch + 1
    )
    return draw_timesteps(Config(**options), seed, position, images, pixels)


def test_timesteps_are_uniform_over_all() -> None:
    timesteps = torch.cat([drawn(64, step=step) for step in range(100)])
    assert timesteps.dtype == torch.int64
    assert 0 <= timesteps.min() < 5
    assert 995 <= timesteps.max() < 1000
    counts = torch.histc(timesteps.float(), bins=10, min=0, max=1000)
    expected = len(timesteps) / 10
    assert ((counts - expected) ** 2 / expected).sum() < 27.9  # chi-squared with 9 degrees of freedom, 1 in 1,000


def test_timesteps_without_new_options_are_those_of_older_versions() -> None:
    place = {"step": 3, "micro_batch": 1}
    assert drawn(6, **place).tolist() == [28, 360, 427, 397, 890, 272]
    assert drawn(6, **place, min_timestep=200, max_timestep=700).tolist() == [214, 380, 413, 398, 645, 336]


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
        options = Config.model_construct(min_timestep=low, max_timestep=high)
        position = Position(epoch=0, step=0, micro_batch=0, micro_batches_in_step=1)
        if "raised" in case:
            with pytest.raises(AssertionError, match="no timestep"):
                draw_timesteps(options, 7, position, 3, MEGAPIXEL)
            continue
        timesteps = draw_timesteps(options, 7, position, 50, MEGAPIXEL).tolist()
        first, end = low or 0, 1000 if high is None else high
        if first < end:
            assert first <= min(timesteps)
            assert max(timesteps) < end
            assert len(set(timesteps)) > 1 or end - first == 1
        else:
            assert set(timesteps) == set(case["timesteps"]) == {end}


def test_timesteps_of_a_flow_lie_between_whole_numbers_up_to_the_last() -> None:
    timesteps = torch.cat(
        [
            drawn(64, step=step, flow_model=True, flow_timestep_distribution="uniform", min_timestep=200)
            for step in range(50)
        ]
    )
    assert timesteps.dtype == torch.float32
    assert 200 < timesteps.min() < 205
    assert 995 < timesteps.max() <= 1000
    assert (timesteps != timesteps.round()).float().mean() > 0.99


@pytest.mark.parametrize("stratified", [False, True], ids=["independent", "stratified"])
@pytest.mark.parametrize("ratio", [None, 2.5])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_timesteps_of_a_flow_follow_the_distribution(name: str, ratio: float | None, stratified: bool) -> None:
    """The slot is fixed, so that stratified timesteps are independent too: one of each of 4,000 steps."""
    options, distribution = DISTRIBUTIONS[name]
    options = options | {"flow_timestep_distribution": name.split()[0], "flow_uniform_static_ratio": ratio}
    options |= {"flow_model": True, "stratified_timesteps": stratified, "min_timestep": 100, "max_timestep": 900}
    place = {"micro_batch": 1, "micro_batches": 3}
    timesteps = torch.stack([drawn(3, step=step, **place, **options)[2] for step in range(4000)])
    assert timesteps.dtype == torch.float32
    t, ratio = (timesteps.double().numpy() - 100) / 800, ratio or 1.0
    assert stats.kstest(t / (ratio - (ratio - 1) * t), distribution).pvalue > 0.001


@pytest.mark.parametrize("objective", [{}, {"v_parameterization": True}], ids=["noise", "velocity"])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_whole_timesteps_follow_the_same_distribution(name: str, objective: dict) -> None:
    options, distribution = DISTRIBUTIONS[name]
    options = options | objective | {"flow_timestep_distribution": name.split()[0], "flow_uniform_static_ratio": 2.0}
    timesteps = torch.cat([drawn(40, step=step, **options) for step in range(100)]).numpy()
    assert timesteps.dtype == np.int64
    assert 0 <= timesteps.min() < timesteps.max() < 1000
    edges = np.linspace(0, 1, 21)
    expected = 4000 * np.diff(distribution(np.clip(edges / (2 - edges), 1e-12, 1 - 1e-12)))
    counts = np.histogram(timesteps, edges * 1000)[0]
    few = expected < 5  # too few for a chi-squared test on their own
    counts, expected = ([*numbers[~few], numbers[few].sum() + 1e-9] for numbers in (counts, expected))
    assert stats.chisquare(counts, expected, sum_check=False).pvalue > 0.001


@pytest.mark.parametrize("kind", ["noise", "velocity", "flow"])
def test_laplace_weights_timesteps_by_their_log_snr(kind: str) -> None:
    options = {"laplace_timestep_sampling_mu": 1.0, "laplace_timestep_sampling_b": 2.0, "min_timestep": 100}
    options |= {"noise": {}, "velocity": {"v_parameterization": True}, "flow": {"flow_model": True}}[kind]
    timesteps = torch.cat([drawn(40, step=step, **options) for step in range(100)]).double().numpy()
    if kind == "flow":
        middles = (np.arange(1000) + 0.5) / 1000
        log_snr = 2 * np.log(1 / middles - 1)
    else:
        scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        alphas = scheduler.alphas_cumprod.double().numpy()
        log_snr = np.log(alphas / (1 - alphas))
    weights = stats.laplace(1, 2).pdf(log_snr)[100:]
    expected = 4000 * weights.reshape(20, 45).sum(1) / weights.sum()
    counts = np.histogram(timesteps, np.linspace(100, 1000, 21))[0]
    assert counts.sum() == 4000
    assert stats.chisquare(counts, expected).pvalue > 0.001


def test_laplace_trains_the_only_timestep_of_zero_terminal_snr() -> None:
    options = {"laplace_timestep_sampling_mu": 0.0, "laplace_timestep_sampling_b": 0.5, "min_timestep": 999}
    assert drawn(3, **options, v_parameterization=True, zero_terminal_snr=True).tolist() == [999] * 3


@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_stratified_timesteps_of_a_step_cover_each_stratum_once(images: int, micro_batches: int, step: int) -> None:
    place = {"step": step, "micro_batches": micro_batches, "stratified_timesteps": True, "flow_model": True}
    place |= {"flow_timestep_distribution": "uniform"}
    parts = [drawn(images, micro_batch=micro_batch, **place).double() / 1000 for micro_batch in range(micro_batches)]
    for part in parts:
        assert sorted((part * images).ceil().tolist()) == list(range(1, images + 1))
    cells = images * micro_batches
    # float32 may round a timestep to the other side of an edge.
    number = ((torch.cat(parts) * cells).sort().values - torch.arange(cells)).numpy()
    assert (number > -1e-4).all()
    assert (number < 1 + 1e-4).all()


def test_stratified_whole_timesteps_cover_each_range_once() -> None:
    timesteps = drawn(20, stratified_timesteps=True)
    assert sorted((timesteps // 50).tolist()) == list(range(20))
    assert timesteps.tolist() != sorted(timesteps.tolist())


def test_stratified_slots_have_no_order() -> None:
    """Every slot is in every stratum equally often, so that no rank trains on more noise than another."""
    strata = torch.stack([drawn(4, step=step, stratified_timesteps=True) // 250 for step in range(1000)])
    counts = torch.stack([(strata == stratum).sum(0) for stratum in range(4)]).flatten().numpy()
    assert stats.chisquare(counts).pvalue > 0.001


def test_shift_of_a_static_ratio_is_that_of_diffusers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.5)
    t = np.arange(1000, 0, -1) / 1000
    np.testing.assert_allclose(shifted(t, 2.5), scheduler.sigmas[:1000].numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("width", "height"), [(1024, 1024), (1536, 1536), (832, 1216), (512, 512)])
def test_shift_by_resolution_is_that_of_sd3(width: int, height: int) -> None:
    """diffusers' time_shift takes the logarithm of the ratio, which is the root of the share of pixels."""
    t = np.linspace(0.001, 1, 500)
    ours = shifted(t, shift_ratio(Config(flow_model=True, flow_uniform_shift=True), width * height))
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    theirs = scheduler.time_shift(0.5 * math.log(width * height / MEGAPIXEL), 1.0, torch.from_numpy(t))
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-6)


def test_static_ratio_wins_over_the_resolution_and_the_base_is_an_option() -> None:
    by_pixels = Config(flow_uniform_shift=True, flow_uniform_base_pixels=512 * 512)
    assert shift_ratio(by_pixels, MEGAPIXEL) == 2
    assert shift_ratio(Config(flow_uniform_shift=True, flow_uniform_static_ratio=3), 5) == 3
    assert shift_ratio(Config(), 5) == 1
    larger = drawn(8, pixels=4 * MEGAPIXEL, flow_model=True, flow_uniform_shift=True)
    assert torch.equal(larger, drawn(8, flow_model=True, flow_uniform_static_ratio=2))


def test_density_of_cosmap_is_that_of_diffusers() -> None:
    config, p = Config(flow_timestep_distribution="cosmap"), np.linspace(0.01, 0.99, 99)
    slope = (quantile(config, p + 1e-6) - quantile(config, p - 1e-6)) / 2e-6
    density = compute_loss_weighting_for_sd3("cosmap", torch.from_numpy(quantile(config, p))).numpy()
    np.testing.assert_allclose(1 / slope, density, rtol=1e-6)


def test_timesteps_of_a_flow_are_above_0_for_every_option() -> None:
    """The signal-to-noise ratio, which loss weights divide by and take the root of, is finite then."""
    for options in (
        {"flow_logit_mean": -300.0},
        {"flow_timestep_distribution": "beta", "flow_beta_alpha": 1e-3},
        {"flow_uniform_static_ratio": 1e-12},
    ):
        timesteps = drawn(50, flow_model=True, **options)
        assert (timesteps > 0).all()
        assert torch.isfinite(((1000 - timesteps) / timesteps) ** 2).all()


def test_default_of_a_flow_is_logit_normal_and_of_others_uniform() -> None:
    flow = {"flow_model": True}
    assert torch.equal(drawn(9, **flow), drawn(9, **flow, flow_timestep_distribution="logit_normal"))
    assert torch.equal(drawn(9), drawn(9, flow_timestep_distribution="uniform"))
    assert Config(v_parameterization=True).flow_timestep_distribution is None
