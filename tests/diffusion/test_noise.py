"""Every golden noise case: our functions mix the reference's random numbers, drawn in its order, to the same noise."""

import random
from collections.abc import Mapping
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from sdxl_finetune.diffusion.noise import adaptive_offset, multires_noise, multires_sizes, offset_noise
from sdxl_finetune.diffusion.objective import build_objective

CASES, PARTS = 108, 40
IMPOSSIBLE = range(80, 84)
"""Cases with min_timestep = max_timestep = 1000. The reference raises after it has drawn the noise."""
TOLERANCE = {"float32": 2e-6, "float16": 0.01, "bfloat16": 0.06}
"""The reference computes in the latents' precision and we in float32; results differ by at most this."""


@pytest.fixture(scope="session")
def tensors(golden) -> dict[str, torch.Tensor]:
    golden("noise.json")
    return load_file(golden.path / "noise.safetensors")


def multires_draws(shape, iterations: int, generator: random.Random) -> tuple[list[torch.Tensor], int]:
    """Draws the layers of the pyramid as the reference does, and counts the calls of Python's generator."""
    divisors = [generator.random() * 2 + 2 for _ in range(iterations)]
    sizes = multires_sizes(*shape[2:], divisors)
    return [torch.randn(*shape[:2], *size) for size in sizes], len(sizes)


def replayed(case: Mapping, arguments: Mapping, latents: torch.Tensor) -> SimpleNamespace:
    """Our noise, noisy latents and timesteps from the reference's random numbers, drawn in its order."""
    options = SimpleNamespace(**arguments)
    torch.manual_seed(case["torch_seed"])
    noise, python_draws = torch.randn_like(latents).float(), 0
    if options.noise_offset:
        strength = options.noise_offset
        if options.noise_offset_random_strength:
            strength = (torch.rand(1) * strength).item()
        if options.adaptive_noise_scale is not None:
            strength = adaptive_offset(latents, strength, options.adaptive_noise_scale)
        noise = offset_noise(noise, torch.randn(*latents.shape[:2], 1, 1), strength)
    if options.multires_noise_iterations:
        generator = random.Random(case["python_seed"])
        layers, python_draws = multires_draws(latents.shape, options.multires_noise_iterations, generator)
        noise = multires_noise(noise, layers, options.multires_noise_discount)
    low, high = options.min_timestep or 0, options.max_timestep
    high = 1000 if high is None else high
    images = len(latents)
    timesteps = torch.randint(low, high, (images,)) if low < high else torch.full((images,), high)
    input_noise = noise
    if options.ip_noise_gamma:
        gamma = options.ip_noise_gamma
        if options.ip_noise_gamma_random_strength:
            gamma *= torch.rand(1).item()
        input_noise = noise + gamma * torch.randn_like(latents).float()
    noisy = None
    if high < 1000 or low < high:
        noisy = build_objective("noise").noisy(latents, input_noise, timesteps)
    generator = random.Random(case["python_seed"])
    for _ in range(python_draws):
        generator.random()
    return SimpleNamespace(
        noise=noise, noisy=noisy, timesteps=timesteps, torch=torch.rand(1).item(), python=generator.random()
    )


def assert_matches(actual: torch.Tensor, expected: Mapping, tolerance: float) -> None:
    actual = actual.double()
    torch.testing.assert_close(
        actual.flatten()[:8], torch.tensor(expected["first8"]).double(), rtol=tolerance, atol=tolerance
    )
    # Rounding errors of the elements are independent: those of the sums grow with the root of their number.
    slack = 5 * tolerance * actual.numel() ** 0.5
    assert actual.sum().item() == pytest.approx(expected["sum"], abs=slack)
    assert actual.square().sum().item() == pytest.approx(expected["sum_sq"], abs=slack, rel=tolerance)


@pytest.mark.parametrize("number", range(CASES))
def test_noise_and_noisy_latents_are_the_reference_s(golden, tensors, number: int) -> None:
    """docs/differences.md: noise and noisy latents stay in float32 (cases 88 to 107)."""
    assert len(golden("noise.json")["cases"]) == CASES
    case = golden("noise.json")["cases"][number]
    latents = tensors[f"latents.{case['latents']}"].to(getattr(torch, case["dtype"]))
    ours = replayed(case, golden("noise.json")["arg_defaults"] | case["args"], latents)
    if number in IMPOSSIBLE:
        # The config refuses such a range; test_timesteps.py shows that no timestep can be drawn from it.
        assert case["raised"][0] == "IndexError"
        return
    assert ours.timesteps.tolist() == case["timesteps"]
    assert ours.torch == case["next_torch_rand"]
    assert ours.python == case["next_python_random"]
    for name in ("noise", "noisy"):
        value = getattr(ours, name)
        assert value.dtype == torch.float32
        assert_matches(value, case[name], TOLERANCE[case["dtype"]])
        if f"case{number}.{name}" in tensors:
            torch.testing.assert_close(value, tensors[f"case{number}.{name}"], rtol=2e-6, atol=2e-6)


def part_noise(tensors, name: str) -> torch.Tensor:
    if name in ("A", "B"):
        return torch.randn_like(tensors[f"latents.{name}"])
    shape = [int(side) for side in name.partition("[")[2].rstrip("]").split(",")]
    return torch.empty(shape).normal_(generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("number", range(PARTS))
def test_mixing_functions_are_the_reference_s(golden, tensors, number: int) -> None:
    assert len(golden("noise.json")["parts"]) == PARTS
    part = golden("noise.json")["parts"][number]
    torch.manual_seed(part["torch_seed"])
    match part["function"]:
        case "pyramid_noise_like":
            noise = tensors.get(f"latents.{part['noise']}")
            if noise is None:
                noise = part_noise(tensors, part["noise"])
            before = noise.clone()
            generator = random.Random(part["python_seed"])
            layers, _ = multires_draws(noise.shape, part["iterations"], generator)
            shapes = [f"torch.randn{list(layer.shape)}" for layer in layers]
            assert shapes == [draw for draw in part["rng"] if draw.startswith("torch")]
            actual = multires_noise(noise, layers, part["discount"])
            assert_matches(actual, part["out"], TOLERANCE["float32"])
            assert actual.double().std().item() == pytest.approx(part["out_std"], abs=1e-6)
            assert torch.equal(noise, before), "ours does not change its input"
        case "apply_noise_offset":
            latents = tensors["latents.B"]
            strength = part["noise_offset"] or 0.0
            if part["adaptive_noise_scale"] is not None:
                strength = adaptive_offset(latents, strength, part["adaptive_noise_scale"])
            actual = offset_noise(torch.zeros_like(latents), torch.randn(1, 4, 1, 1), strength)
            channels = torch.tensor(part["out_per_channel"]).view(1, 4, 1, 1).expand_as(actual)
            torch.testing.assert_close(actual, channels)
        case "get_timesteps":
            # The reference's generator, so only the meaning of the range can be compared: see test_timesteps.py.
            low, high, images = part["args"]
            allowed = range(low, high) if low < high else [high]
            assert len(part["out"]) == images
            assert set(part["out"]) <= set(allowed)


def test_a_noise_pyramid_ends_with_a_side_of_one() -> None:
    assert multires_sizes(128, 96, [2.0] * 10) == [
        (128, 96), (64, 48), (32, 24), (16, 12), (8, 6), (4, 3), (2, 1),
    ]  # fmt: skip
    assert multires_sizes(1, 8, [3.0, 3.0]) == [(1, 8)]
    assert multires_sizes(128, 128, []) == []


def test_sides_of_a_noise_pyramid_are_at_least_one() -> None:
    assert multires_sizes(2, 1000, [2.0, 3.9]) == [(2, 1000), (1, 256)]
