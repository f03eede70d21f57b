"""Loss weights are the reference's; with zero terminal SNR they follow the rescaled schedule and are finite."""

import re

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from sdxl_finetune.batch import TIMESTEPS
from sdxl_finetune.config import LossOptions
from sdxl_finetune.diffusion.loss_weights import loss_weight
from sdxl_finetune.diffusion.objective import build_objective

PLAIN, BEFORE_FIX, AFTER_FIX = range(3)
WEIGHTINGS = {
    "min_snr_gamma": 5.0,
    "soft_min_snr_gamma": 5.0,
    "scale_v_pred_loss_like_noise_pred": True,
    "v_pred_like_loss": 0.5,
    "debiased_estimation_loss": True,
}
EVERY_TIMESTEP = torch.arange(TIMESTEPS)


def loss_options(name: str) -> LossOptions:
    """The options that the name of a golden weighting describes."""
    options: dict = {"v_parameterization": name.endswith("v_prediction=True")}
    if gamma := re.search(r"gamma=([\d.]+)", name):
        options["min_snr_gamma"] = float(gamma[1])
    elif name.startswith("apply_debiased"):
        options["debiased_estimation_loss"] = True
    elif name.startswith("scale_v"):
        options |= {"scale_v_pred_loss_like_noise_pred": True, "v_parameterization": True}
    else:
        # Golden is the loss with the addition, of a loss of 1.
        options["v_pred_like_loss"] = float(name.split()[-1])
    return LossOptions.model_construct(**options)


def weightings(entry: dict) -> dict[str, list]:
    names = [name for name in entry if name not in ("scheduler", "timesteps")]
    assert len(names) == 15
    return {name: entry[name] for name in names}


def test_loss_weights_are_the_reference_s(golden) -> None:
    entry = golden("loss.json")["weights"][PLAIN]
    timesteps = torch.tensor(entry["timesteps"])
    for name, expected in weightings(entry).items():
        options = loss_options(name)
        actual = loss_weight(options, build_objective(options.objective), timesteps)
        torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-5, atol=0, msg=name)


def test_weights_follow_the_zero_terminal_snr_fix(golden) -> None:
    """docs/differences.md: the SNR is taken after the zero-terminal-SNR fix, and the terminal weight is 1.

    The reference's trainer uses the second entry of the golden weights, which equals that without the fix. We use the
    third entry, except at timestep 999, where it has 0, infinity and NaN.
    """
    entry = golden("loss.json")["weights"][AFTER_FIX]
    timesteps = torch.tensor(entry["timesteps"])
    terminal = timesteps == TIMESTEPS - 1
    reference = golden("loss.json")["weights"][BEFORE_FIX]
    assert terminal.sum() == 1
    for name, expected in weightings(entry).items():
        assert reference[name] == golden("loss.json")["weights"][PLAIN][name]
        options = loss_options(name)
        actual = loss_weight(options, build_objective(options.objective, zero_terminal_snr=True), timesteps)
        wanted = torch.tensor([value if isinstance(value, float) else torch.nan for value in expected])
        torch.testing.assert_close(actual[~terminal], wanted[~terminal], rtol=2e-4, atol=0, msg=name)
        assert actual[terminal] == 1, name


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("kind", ["noise", "velocity", "flow"])
@pytest.mark.parametrize("weighting", [*WEIGHTINGS, "all"])
def test_every_weight_is_finite_and_positive(zero_terminal_snr, kind, weighting) -> None:
    options = WEIGHTINGS if weighting == "all" else {weighting: WEIGHTINGS[weighting]}
    objective = build_objective(kind, zero_terminal_snr=zero_terminal_snr)
    timesteps = EVERY_TIMESTEP + 1.0 if kind == "flow" else EVERY_TIMESTEP
    weight = loss_weight(LossOptions.model_construct(**options), objective, timesteps)
    assert weight.isfinite().all()
    assert (weight > 0).all()
    assert weight.dtype == torch.float32


def test_terminal_timestep_has_weight_one_with_v_prediction() -> None:
    """docs/differences.md: the terminal weight is 1. The formulas of min-SNR and of the scaling of v give 0."""
    objective = build_objective("velocity", zero_terminal_snr=True)
    options = LossOptions.model_construct(
        v_parameterization=True, min_snr_gamma=5.0, scale_v_pred_loss_like_noise_pred=True
    )
    weight = loss_weight(options, objective, EVERY_TIMESTEP)
    assert weight[-1] == 1
    assert weight[-2] < 1e-6


def test_without_weightings_every_weight_is_one() -> None:
    weight = loss_weight(LossOptions.model_construct(min_snr_gamma=0.0), build_objective("noise"), EVERY_TIMESTEP)
    assert torch.equal(weight, torch.ones(TIMESTEPS))


@pytest.mark.parametrize("kind", ["noise", "velocity", "flow"])
def test_min_snr_and_debiasing_weight_the_error_of_latents_and_noise(kind) -> None:
    """min-SNR is min(SNR, gamma) times the squared error of x_0; debiasing is the error of the noise / sqrt(SNR).

    The errors follow from a wrong prediction. The reference's debiasing of velocity is another formula.
    """
    objective, generator = build_objective(kind), torch.Generator().manual_seed(0)
    timesteps = torch.tensor([40, 300, 700, 990])
    latents, noise = torch.randn(2, 4, 4, 2, 2, generator=generator, dtype=torch.float64)
    target, noisy = objective.target(latents, noise, timesteps), objective.noisy(latents, noise, timesteps)
    restored = objective.latents(noisy, target + 0.1, timesteps)
    error = ((restored - latents) ** 2).mean(dim=(1, 2, 3))
    snr = objective.schedule.snr(timesteps)
    weight = loss_weight(LossOptions.model_construct(min_snr_gamma=5.0), objective, timesteps)
    torch.testing.assert_close(0.01 * weight, snr.clamp(max=5) * error.float(), rtol=2e-3, atol=0)
    if kind != "velocity":
        alpha, sigma = objective.schedule.alpha_sigma(timesteps)
        noise_error = (alpha / sigma) ** 2 * error
        debiased = loss_weight(LossOptions.model_construct(debiased_estimation_loss=True), objective, timesteps)
        torch.testing.assert_close(0.01 * debiased, (noise_error * snr.rsqrt()).float(), rtol=2e-3, atol=0)


def soft_weight(kind: str, gamma: float, timesteps: torch.Tensor) -> torch.Tensor:
    return loss_weight(LossOptions.model_construct(soft_min_snr_gamma=gamma), build_objective(kind), timesteps)


@pytest.mark.parametrize("gamma", [1.0, 4.0, 5.0])
def test_soft_min_snr_is_that_of_the_paper(gamma) -> None:
    """1 / (sigma^2 + 1 / gamma) times the squared error of x_0, where sigma is that of diffusers' Euler scheduler.

    For a velocity and gamma 1 this is the weight of the authors' program, (s d)^2 / (s^2 + d^2)^2 with d = 1.
    """
    names = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    sigma = EulerDiscreteScheduler(**names, timestep_spacing="trailing").sigmas.flip(0)[1:].double()
    of_latents = 1 / (sigma**2 + 1 / gamma)
    noise, velocity = sigma**2 * of_latents, sigma**2 / (sigma**2 + 1) * of_latents
    torch.testing.assert_close(soft_weight("noise", gamma, EVERY_TIMESTEP), noise.float(), rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(soft_weight("velocity", gamma, EVERY_TIMESTEP), velocity.float(), rtol=2e-5, atol=1e-6)
    if gamma == 1:
        torch.testing.assert_close(velocity, sigma**2 / (sigma**2 + 1) ** 2)
    t = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    flow = t**2 / ((t / (1 - t)) ** 2 + 1 / gamma)  # the error of x_0 is t times the error of e - x_0
    torch.testing.assert_close(soft_weight("flow", gamma, (1000 * t).float()), flow.float(), rtol=2e-5, atol=1e-6)


@given(st.sampled_from(["noise", "velocity", "flow"]), st.floats(0.1, 20), st.integers(1, 999))
def test_soft_min_snr_stays_below_min_snr_and_above_half_of_it(kind, gamma, timestep) -> None:
    """SNR gamma / (SNR + gamma) is between min(SNR, gamma) / 2 and min(SNR, gamma)."""
    timesteps = torch.tensor([timestep])
    hard = loss_weight(LossOptions.model_construct(min_snr_gamma=gamma), build_objective(kind), timesteps)
    ratio = (soft_weight(kind, gamma, timesteps) / hard).item()
    assert 0.5 - 1e-5 <= ratio <= 1 + 1e-5


def test_the_multiplier_of_forks_multiplies_every_loss_and_zero_is_off() -> None:
    objective = build_objective("velocity", zero_terminal_snr=True)
    base = loss_weight(LossOptions.model_construct(min_snr_gamma=5.0), objective, EVERY_TIMESTEP)
    doubled = LossOptions.model_construct(min_snr_gamma=5.0, loss_multiplier=2.0)
    assert torch.equal(loss_weight(doubled, objective, EVERY_TIMESTEP), 2 * base)
    off = LossOptions.model_construct(min_snr_gamma=5.0, loss_multiplier=0.0)
    assert torch.equal(loss_weight(off, objective, EVERY_TIMESTEP), base)
