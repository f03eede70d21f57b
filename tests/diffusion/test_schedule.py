"""The noise schedule is the reference's, x_t and v are a rotation of x_0 and noise, and everything is float32."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdxl_finetune.batch import TIMESTEPS
from sdxl_finetune.diffusion.schedule import add_noise, build_schedule, velocity

NAMES = {False: "before", True: "after_zero_terminal_snr"}


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_alphas_are_the_reference_s(golden, zero_terminal_snr) -> None:
    schedule = build_schedule(zero_terminal_snr=zero_terminal_snr)
    expected = torch.tensor(golden("loss.json")["schedule"][NAMES[zero_terminal_snr]]["alphas_cumprod"])
    # The reference goes through betas and multiplies them up again, which costs it some bits.
    tolerance = {"rtol": 2e-5, "atol": 1e-8} if zero_terminal_snr else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(schedule.alphas_cumprod, expected, **tolerance)
    assert schedule.alphas_cumprod.dtype == schedule.snr.dtype == torch.float32


def test_snr_is_the_reference_s(golden) -> None:
    expected = torch.tensor(golden("loss.json")["schedule"]["all_snr"])
    torch.testing.assert_close(build_schedule(zero_terminal_snr=False).snr, expected, rtol=1e-5, atol=0)


def test_snr_follows_the_zero_terminal_snr_fix(golden) -> None:
    """docs/differences.md: the SNR is taken after the zero-terminal-SNR fix."""
    expected = golden("loss.json")["schedule"]["all_snr_if_computed_after_fix"]
    snr = build_schedule(zero_terminal_snr=True).snr
    torch.testing.assert_close(snr[:3], torch.tensor(expected["first3"]), rtol=1e-4, atol=0)
    torch.testing.assert_close(snr[-5:], torch.tensor(expected["last5"]), rtol=1e-4, atol=0)
    assert snr[-1] == 0
    assert (snr[:-1] > snr[1:]).all()


@pytest.mark.parametrize(("kind", "zero_terminal_snr"), [("normal", False), ("zero_terminal_snr", True)])
def test_noisy_latents_and_velocity_are_the_reference_s(golden, kind, zero_terminal_snr) -> None:
    expected = golden("loss.json")["velocity"]
    generator = torch.Generator().manual_seed(9)
    latents = torch.empty(3, 4, 4, 4).normal_(generator=generator)
    noise = torch.empty(3, 4, 4, 4).normal_(generator=generator)
    torch.testing.assert_close(latents.flatten(1)[:, :8], torch.tensor(expected["latents_head"]))
    schedule = build_schedule(zero_terminal_snr=zero_terminal_snr)
    timesteps = torch.tensor(expected["timesteps"])
    for name, function in (("", velocity), ("noisy_", add_noise)):
        actual = function(schedule, latents, noise, timesteps).flatten(1)
        wanted = torch.tensor(expected[f"{name}{kind}"])
        torch.testing.assert_close(actual[:, : wanted.shape[1]], wanted, rtol=1e-5, atol=1e-6)


@given(st.integers(0, TIMESTEPS - 1), st.booleans(), st.integers(0, 2**32))
def test_noisy_latents_and_velocity_give_the_latents_back(timestep, zero_terminal_snr, seed) -> None:
    """alpha x_t - sigma v = x_0, for every timestep."""
    generator = torch.Generator().manual_seed(seed)
    latents, noise = torch.randn(2, 1, 4, 3, 2, generator=generator)
    schedule = build_schedule(zero_terminal_snr=zero_terminal_snr)
    timesteps = torch.tensor([timestep])
    alpha = schedule.alphas_cumprod[timestep].sqrt()
    sigma = (1 - schedule.alphas_cumprod[timestep]).sqrt()
    noisy = add_noise(schedule, latents, noise, timesteps)
    restored = alpha * noisy - sigma * velocity(schedule, latents, noise, timesteps)
    torch.testing.assert_close(restored, latents, rtol=1e-5, atol=1e-5)


def test_terminal_timestep_is_pure_noise_with_zero_terminal_snr() -> None:
    latents, noise = torch.randn(2, 1, 4, 2, 2)
    schedule = build_schedule(zero_terminal_snr=True)
    last = torch.tensor([TIMESTEPS - 1])
    assert torch.equal(add_noise(schedule, latents, noise, last), noise)
    assert torch.equal(velocity(schedule, latents, noise, last), -latents)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(dtype) -> None:
    latents, noise = torch.randn(2, 2, 4, 3, 2).to(dtype)
    timesteps = torch.tensor([3, 998])
    schedule = build_schedule(zero_terminal_snr=False)
    for function in (add_noise, velocity):
        full = function(schedule, latents.float(), noise.float(), timesteps)
        assert torch.equal(function(schedule, latents, noise, timesteps), full)


def test_to_moves_every_tensor() -> None:
    moved = build_schedule(zero_terminal_snr=False).to(torch.device("meta"))
    assert moved.alphas_cumprod.is_meta
    assert moved.snr.is_meta
