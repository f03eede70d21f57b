"""Learned loss weights are those of EDM2: against an implementation in numpy, autograd of the formula, known losses."""

import math

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from sdxl_finetune.batch import TIMESTEPS
from sdxl_finetune.diffusion.learned_weights import LARGEST_LEVEL, LogLoss, noise_level, uncertainty_loss
from sdxl_finetune.diffusion.objective import build_objective

KINDS = ["noise", "velocity", "flow"]


def timesteps_of(kind: str) -> torch.Tensor:
    timesteps = torch.arange(TIMESTEPS)
    return timesteps + 1.0 if kind == "flow" else timesteps


def edm2_log_variance(network: LogLoss, levels: np.ndarray) -> np.ndarray:
    """EDM2's network in float64: MP-Fourier features, and a linear layer of normalised weights without a gain."""
    frequencies, phases = network.frequencies.double().numpy(), network.phases.double().numpy()
    features = math.sqrt(2) * np.cos(2 * np.pi * np.outer(levels, frequencies) + 2 * np.pi * phases)
    weights = network.weight.detach().double().numpy()
    return features @ (weights / np.linalg.norm(weights))


def test_the_network_is_that_of_edm2_for_weights_of_its_norm() -> None:
    network = LogLoss(128)
    assert (network(torch.linspace(-2, 2, 9)) == 0).all(), "the weight is 1 before the first step"
    with torch.no_grad():
        network.weight.normal_(generator=torch.Generator().manual_seed(1))
        network.weight.mul_(math.sqrt(128) / network.weight.norm())
    levels = torch.linspace(-LARGEST_LEVEL / 4, LARGEST_LEVEL / 4, 1001)
    expected = torch.from_numpy(edm2_log_variance(network, levels.double().numpy()))
    assert expected.abs().max() > 1
    torch.testing.assert_close(network(levels).double(), expected, rtol=0, atol=5e-6)
    assert network.frequencies.std() == pytest.approx(1, abs=0.15) and 0 <= network.phases.min() < 0.05
    features = torch.stack([one(levels) for one in single_features(network)]).detach()
    assert features.square().mean() == pytest.approx(1, abs=0.05), "the features preserve magnitude"


def single_features(network: LogLoss) -> list:
    """A network for each feature, with the weight sqrt(n) for this one and 0 for the others."""
    networks = []
    for number in range(len(network.weight)):
        one = LogLoss(len(network.weight))
        with torch.no_grad():
            one.weight[number] = math.sqrt(len(network.weight))
        networks.append(one)
    return networks


def test_the_noise_level_is_a_quarter_of_the_logarithm_of_sigma() -> None:
    """sigma is that of EDM: of diffusers' Euler scheduler, and t / (1 - t) of its flow scheduler."""
    names = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    sigmas = EulerDiscreteScheduler(**names, timestep_spacing="trailing").sigmas.flip(0)[1:]
    for kind in ("noise", "velocity"):
        found = noise_level(build_objective(kind), timesteps_of(kind))
        torch.testing.assert_close(found, sigmas.log() / 4, rtol=1e-5, atol=1e-6)
    flow = FlowMatchEulerDiscreteScheduler()
    t = flow.sigmas.double()
    expected = ((t / (1 - t)).log().clamp(-8, 8) / 4).float()
    found = noise_level(build_objective("flow"), flow.timesteps)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_noise_level_of_pure_noise_and_of_pure_signal_is_bounded(kind: str) -> None:
    objective = build_objective(kind, zero_terminal_snr=True)
    level = noise_level(objective, timesteps_of(kind))
    assert level.isfinite().all() and (level.diff() > 0).all(), "it rises with the timestep"
    assert level[-1] == LARGEST_LEVEL / 4
    if kind == "flow":
        assert noise_level(objective, torch.tensor([1e-30])) == -LARGEST_LEVEL / 4


def test_gradients_are_those_of_the_formula_of_the_paper() -> None:
    """The network has a backward pass of its own. Model and network get what one backward of loss / e^u + u gives."""
    generator = torch.Generator().manual_seed(2)
    objective, shares = build_objective("velocity"), torch.tensor([0.25, 0.5, 0.125, 0.0])
    levels = noise_level(objective, torch.tensor([1, 400, 400, 998]))
    model = torch.randn(4, generator=generator).requires_grad_()
    network = LogLoss(16)
    with torch.no_grad():
        network.weight.normal_(generator=generator)
    whole = ((model**2 / torch.exp(network(levels)) + network(levels)) * shares).sum()
    expected = torch.autograd.grad(whole, [model, network.weight])

    losses, log_losses = model**2, network(levels)
    uncertainty_loss(losses.detach(), log_losses, shares).backward()
    (losses * (-log_losses.detach()).exp() * shares).sum().backward()
    torch.testing.assert_close((model.grad, network.weight.grad), expected, rtol=1e-6, atol=1e-7)
    assert uncertainty_loss(losses, log_losses, shares).item() == pytest.approx(whole.item(), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_converges_to_the_inverse_of_a_known_loss(kind: str) -> None:
    """The loss falls by 500 between the timesteps, as that of a noise prediction does."""
    timesteps = timesteps_of(kind)
    loss = 0.002 + torch.exp(-timesteps / 150)
    network, levels = LogLoss(128), noise_level(build_objective(kind), timesteps)
    shares = torch.full((TIMESTEPS,), 1 / TIMESTEPS)
    optimizer = torch.optim.LBFGS(network.parameters(), max_iter=1000, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = uncertainty_loss(loss, network(levels), shares)
        value.backward()
        return value

    optimizer.step(closure)
    weight = (-network(levels)).exp().detach()
    assert (weight * loss - 1).square().mean().sqrt() < 0.02
    assert (weight * loss - 1).abs().max() < 0.15


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=8), st.floats(-5, 5))
def test_the_loss_of_one_noise_level_is_smallest_at_the_logarithm_of_its_mean(losses, other) -> None:
    values = torch.tensor(losses)
    shares = torch.full_like(values, 1 / len(losses))
    best = values.mean().log()

    def at(log_loss: torch.Tensor) -> float:
        return float(uncertainty_loss(values, log_loss.expand(len(losses)), shares))

    assert at(best) <= at(best + other) + 1e-4
    assert at(best) == pytest.approx(1 + float(best), abs=1e-4)
