"""Inputs and targets are the reference's and diffusers', each objective gives the latents back, all in float32."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from sdxl_finetune.batch import TIMESTEPS
from sdxl_finetune.diffusion.objective import OBJECTIVES, build_objective
from sdxl_finetune.diffusion.schedule import DiscreteSchedule, discrete_schedule

NAMES = {False: "before", True: "after_zero_terminal_snr"}
EVERY_TIMESTEP = torch.arange(TIMESTEPS)


def known(count: int, seed: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and noise."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.empty(count, 4, 4, 4).normal_(generator=generator)
    return latents, torch.empty(count, 4, 4, 4).normal_(generator=generator)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_alphas_are_the_reference_s(golden, zero_terminal_snr) -> None:
    schedule = discrete_schedule(zero_terminal_snr=zero_terminal_snr)
    expected = torch.tensor(golden("loss.json")["schedule"][NAMES[zero_terminal_snr]]["alphas_cumprod"])
    # The reference goes through betas and multiplies them up again, which costs it some bits.
    tolerance = {"rtol": 2e-5, "atol": 1e-8} if zero_terminal_snr else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(schedule.alphas_cumprod, expected, **tolerance)
    assert schedule.alphas_cumprod.dtype == schedule.snr(EVERY_TIMESTEP).dtype == torch.float32


def test_snr_is_the_reference_s(golden) -> None:
    expected = torch.tensor(golden("loss.json")["schedule"]["all_snr"])
    schedule = discrete_schedule(zero_terminal_snr=False)
    torch.testing.assert_close(schedule.snr(EVERY_TIMESTEP), expected, rtol=1e-5, atol=0)


def test_snr_follows_the_zero_terminal_snr_fix(golden) -> None:
    """docs/differences.md: the SNR is taken after the zero-terminal-SNR fix."""
    expected = golden("loss.json")["schedule"]["all_snr_if_computed_after_fix"]
    snr = discrete_schedule(zero_terminal_snr=True).snr(EVERY_TIMESTEP)
    torch.testing.assert_close(snr[:3], torch.tensor(expected["first3"]), rtol=1e-4, atol=0)
    torch.testing.assert_close(snr[-5:], torch.tensor(expected["last5"]), rtol=1e-4, atol=0)
    assert snr[-1] == 0
    assert (snr[:-1] > snr[1:]).all()


@pytest.mark.parametrize(("kind", "zero_terminal_snr"), [("normal", False), ("zero_terminal_snr", True)])
def test_noisy_latents_and_velocity_are_the_reference_s(golden, kind, zero_terminal_snr) -> None:
    expected = golden("loss.json")["velocity"]
    latents, noise = known(3)
    torch.testing.assert_close(latents.flatten(1)[:, :8], torch.tensor(expected["latents_head"]))
    objective = build_objective("velocity", zero_terminal_snr=zero_terminal_snr)
    timesteps = torch.tensor(expected["timesteps"])
    for name, function in (("", objective.target), ("noisy_", objective.noisy)):
        actual = function(latents, noise, timesteps).flatten(1)
        wanted = torch.tensor(expected[f"{name}{kind}"])
        torch.testing.assert_close(actual[:, : wanted.shape[1]], wanted, rtol=1e-5, atol=1e-6)


def test_flow_is_the_flow_of_diffusers() -> None:
    """FlowMatchEulerDiscreteScheduler makes the noisy latents, and one step along the target gives the latents back."""
    latents, noise = known(1)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMESTEPS)
    objective = build_objective("flow")
    for timestep in scheduler.timesteps[::37]:
        noisy = objective.noisy(latents, noise, timestep[None])
        torch.testing.assert_close(noisy, scheduler.scale_noise(latents, timestep[None], noise), rtol=0, atol=1e-6)
        # The target is the derivative of the noisy latents by t.
        t = timestep / TIMESTEPS
        torch.testing.assert_close(
            noisy - t * objective.target(latents, noise, timestep[None]), latents, rtol=0, atol=2e-6
        )


@given(st.sampled_from(sorted(OBJECTIVES)), st.integers(1, TIMESTEPS - 2), st.booleans(), st.integers(0, 2**32))
def test_the_target_gives_the_latents_back(kind, timestep, zero_terminal_snr, seed) -> None:
    latents, noise = known(1, seed)
    objective = build_objective(kind, zero_terminal_snr=zero_terminal_snr)
    timesteps = torch.tensor([timestep])
    noisy, target = objective.noisy(latents, noise, timesteps), objective.target(latents, noise, timesteps)
    # A noise prediction is divided by alpha, which is small at late timesteps.
    tolerance = 2e-6 / objective.schedule.alpha_sigma(timesteps)[0].item() if kind == "noise" else 1e-5
    torch.testing.assert_close(objective.latents(noisy, target, timesteps), latents, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("kind", sorted(OBJECTIVES))
def test_snr_is_that_of_the_input(kind) -> None:
    objective, timesteps = build_objective(kind), torch.tensor([1, 250, 800])
    alpha, sigma = objective.schedule.alpha_sigma(timesteps)
    torch.testing.assert_close(objective.schedule.snr(timesteps), (alpha / sigma) ** 2, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("kind", "last"), [("velocity", TIMESTEPS - 1), ("flow", TIMESTEPS)])
def test_the_last_timestep_is_pure_noise(kind, last) -> None:
    latents, noise = known(1)
    objective = build_objective(kind, zero_terminal_snr=True)
    timesteps = torch.tensor([last])
    assert objective.ends_in_noise
    assert objective.schedule.snr(timesteps) == 0
    assert torch.equal(objective.noisy(latents, noise, timesteps), noise)
    assert torch.equal(objective.target(latents, noise, timesteps), -latents if kind == "velocity" else noise - latents)


@pytest.mark.parametrize("kind", sorted(OBJECTIVES))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(dtype, kind) -> None:
    latents, noise = (part.to(dtype) for part in known(2))
    timesteps = torch.tensor([3, 998])
    objective = build_objective(kind)
    for function in (objective.noisy, objective.target, objective.latents):
        full = function(latents.float(), noise.float(), timesteps)
        assert full.dtype == torch.float32
        assert torch.equal(function(latents, noise, timesteps), full)


def test_to_moves_every_tensor() -> None:
    moved = build_objective("noise").to(torch.device("meta")).schedule
    assert isinstance(moved, DiscreteSchedule)
    assert moved.alphas_cumprod.is_meta
    assert moved.snr_table.is_meta
