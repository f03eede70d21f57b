"""Flows are followed by Euler's and Heun's method at the times that interfaces use, with the shift of the training."""

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from sdxl_finetune.config import FlowOptions, PreviewOptions
from sdxl_finetune.config.output_options import Sampler
from sdxl_finetune.data.tokens import build_tokenizer
from sdxl_finetune.diffusion.objective import build_objective
from sdxl_finetune.model.random_model import TINY, build_random_model
from sdxl_finetune.output.previews import PreviewModel, draw_latents, draw_previews
from sdxl_finetune.output.prompts import PreviewFiles, Prompt
from sdxl_finetune.output.samplers import build_sampler, denoise, sampler_remarks, used_sampler

# 2026-11: diffusers 0.42 turns torch 2.13 tensors into numpy arrays, and numpy 2.4 warns of how torch does it.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

FLOW = build_objective("flow")
NAMES = get_args(Sampler)
SECOND_ORDER = {"heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++", "dpmsingle", "k_dpm_2", "k_dpm_2_a"}
Field = Callable[[Tensor, Tensor], Tensor]


def follow(name: str, shift: float, steps: int, noise: Tensor, velocity: Field) -> Tensor:
    """The latents that a sampler draws in a field of velocities by latents and time in (0, 1]."""

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        assert timestep.dtype == torch.float32
        return velocity(latents, timestep / 1000)

    return denoise(predict, build_sampler(name, FLOW, shift), steps, noise, [])


def simple_times(steps: int, shift: float) -> np.ndarray:
    """The schedule "simple" of interfaces: every k-th of 1,000 shifted times, from the last on, and 0."""
    every = np.arange(1, 1001) / 1000
    shifted = shift * every / (1 + (shift - 1) * every)
    return np.array([*(shifted[-1 - int(number * 1000 / steps)] for number in range(steps)), 0.0])


def curved(latents: Tensor, time: Tensor) -> Tensor:
    return torch.sin(3 * latents) + torch.cos(5 * time)


@pytest.mark.parametrize("shift", [1.0, 2.5, 0.4])
@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize("name", ["euler", "heun"])
def test_flow_samplers_are_the_methods_of_the_textbook_at_the_times_of_interfaces(
    name: str, steps: int, shift: float
) -> None:
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    drawn = follow(name, shift, steps, noise, curved)
    latents, times = noise.double(), torch.from_numpy(simple_times(steps, shift))
    for now, later in pairwise(times):
        slope = curved(latents, now)
        if name == "heun" and later > 0:
            slope = (slope + curved(latents + (later - now) * slope, later)) / 2
        latents = latents + (later - now) * slope
    torch.testing.assert_close(drawn.double(), latents, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_equals_diffusers_own_loop(shift: float) -> None:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 12, 12))
    theirs = noise
    for timestep in scheduler.timesteps:
        theirs = scheduler.step(curved(theirs, timestep / 1000), timestep, theirs).prev_sample
    torch.testing.assert_close(follow("euler", shift, 12, noise, curved), theirs, rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=25)
@given(
    name=st.sampled_from(NAMES),
    shift=st.floats(0.1, 10),
    steps=st.integers(1, 40),
    known=st.lists(st.floats(-3, 3), min_size=4, max_size=4),
)
def test_the_flow_to_a_single_image_draws_it(name: str, shift: float, steps: int, known: list[float]) -> None:
    image = torch.tensor(known).reshape(1, 4, 1, 1)
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    drawn = follow(name, shift, steps, noise, lambda latents, time: (latents - image) / time)
    torch.testing.assert_close(drawn, image.expand_as(drawn), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2)])
def test_the_error_falls_with_the_order_of_the_method(name: str, order: int) -> None:
    """Data of deviation s have the exact solution x_0 = s x_1, because x_t has the deviation that a root gives."""
    deviation = 0.5

    def velocity(latents: Tensor, time: Tensor) -> Tensor:
        variance = (1 - time) ** 2 * deviation**2 + time**2
        return latents * (time - (1 - time) * deviation**2) / variance

    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    errors = [(follow(name, 1.0, steps, noise, velocity) - deviation * noise).abs().max() for steps in (20, 40)]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)


def test_every_sampler_names_the_one_that_draws_flows() -> None:
    for name in NAMES:
        used, remarks = used_sampler(name, FLOW), list(sampler_remarks([name, name], FLOW))
        assert used == ("heun" if name in SECOND_ORDER else "euler")
        remark = f"sampler {name}: flow models are drawn with {used.capitalize()} instead"
        assert [each.startswith(remark) for each in remarks] == [True] * (name.removeprefix("k_") != used)
        assert used_sampler(name, build_objective("noise")) == name.removeprefix("k_")
        assert not list(sampler_remarks([name], build_objective("velocity")))


@pytest.mark.parametrize(
    ("flow", "shift"),
    [
        (FlowOptions(), 1.0),
        (FlowOptions(flow_uniform_static_ratio=2.5, flow_uniform_shift=True), 2.5),
        (FlowOptions(flow_uniform_shift=True, flow_uniform_base_pixels=64 * 96 / 4), 2.0),
    ],
)
@torch.no_grad()
def test_pictures_of_flows_have_the_training_s_shift_and_say_how_they_were_drawn(
    tmp_path: Path, flow: FlowOptions, shift: float
) -> None:
    sdxl, vae = build_random_model(TINY, seed=0)
    model = PreviewModel(
        sdxl=sdxl, vae=vae, tokenizer=build_tokenizer(max_token_length=None), objective=FLOW, flow=flow
    )
    prompt = Prompt(prompt="a cat", width=64, height=96, steps=2, scale=1.0, seed=3, sampler="dpmsolver++")
    files = PreviewFiles(folder=tmp_path, output_name="m", epoch=None, step=1, time=datetime(2026, 1, 2))
    times: list[Tensor] = []
    hook = sdxl.unet.register_forward_pre_hook(lambda _, inputs: times.append(inputs[1][0] / 1000))
    (preview,) = draw_previews(model, [(0, prompt)], PreviewOptions(), files, seed=0)
    hook.remove()
    with Image.open(preview.path) as image:
        said = f"Sampler: Heun, Schedule type: Simple, CFG scale: 1.0, Seed: 3, Size: 64x96, Shift: {shift}, Model: m"
        assert said in image.text["parameters"]
    half = shift * 0.5 / (1 + (shift - 1) * 0.5)
    assert [time.item() for time in times] == pytest.approx([1.0, half, half])
    euler, other = (draw_latents(model, name, [replace(prompt, steps=4)], [3]) for name in ("ddim", "heun"))
    assert (euler - other).abs().max() > 1e-3
