"""Previews: what the model in training draws for a few fixed prompts.

They are sampled on the schedule that is trained on, so that they show the model and not a mismatch: v-prediction where
it is trained, and with zero terminal SNR (Lin et al., arXiv 2305.08891, section 3.3) every sampler starts at
timestep 999. Otherwise samplers, defaults and sizes are the reference's (golden sample_prompts.json). All randomness
comes from generators of their own, so that training does not notice; a prompt that fails costs one line of log.
"""

import dataclasses
import inspect
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL
from jaxtyping import Float, Int64
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from sdxl_finetune.batch import TIMESTEPS
from sdxl_finetune.config import Config
from sdxl_finetune.data.tokens import Tokenizer
from sdxl_finetune.diffusion.schedule import FIRST_BETA, LAST_BETA, Schedule
from sdxl_finetune.files import atomic_path
from sdxl_finetune.model.sdxl import SDXL, evaluating
from sdxl_finetune.model.vae import decode
from sdxl_finetune.output.prompts import Prompt, preview_name
from sdxl_finetune.seeding import position_sequence

logger = logging.getLogger(__name__)

SAMPLERS: Mapping[str, str] = {
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "lms": "LMSDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm_2": "KDPM2DiscreteScheduler",
    "dpm_2_a": "KDPM2AncestralDiscreteScheduler",
    "dpmsolver": "DPMSolverMultistepScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "dpmsingle": "DPMSolverSinglestepScheduler",
}
"""The reference's names and diffusers' classes; k_x is x."""
UI_NAMES = {
    "ddim": "DDIM",
    "pndm": "PLMS",
    "lms": "LMS",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "dpm_2": "DPM2",
    "dpm_2_a": "DPM2 a",
    "dpmsolver++": "DPM++ 2M",
}
"""What AUTOMATIC1111 calls those of them that it has."""
TERMINAL = 2.0**-24
"""Stands for a terminal alpha-bar of 0, where the samplers that work on sigma would divide by it (as in diffusers)."""


@dataclass(frozen=True, kw_only=True)
class Preview:
    """One picture and how it came about."""

    index: int
    """The prompt's place in the prompt file, from 0."""
    prompt: Prompt
    seed: int
    image: Image.Image
    path: Path


def build_sampler(name: str, schedule: Schedule, *, v_parameterization: bool) -> Any:
    """diffusers' sampler of that name (one of the config's) on the schedule that is trained on."""
    name = name.removeprefix("k_")
    kind = getattr(diffusers, SAMPLERS[name])
    settings: dict[str, Any] = {
        "num_train_timesteps": TIMESTEPS,
        "beta_start": FIRST_BETA,
        "beta_end": LAST_BETA,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction" if v_parameterization else "epsilon",
        "clip_sample": False,  # made for pixels: of latents it cuts off a third, and the extremes of light
    }
    if name.startswith("dpmsolver"):
        settings["algorithm_type"] = name
    if name == "dpmsolver":
        settings["final_sigmas_type"] = "sigma_min"  # the only one that it takes; the reference fails here
    if name == "dpmsingle":
        settings["lower_order_final"] = True  # diffusers sets it anyway, and says so each time
    if schedule.alphas_cumprod[-1] == 0:
        alphas_cumprod = schedule.alphas_cumprod.double().cpu().numpy().clip(TERMINAL)
        settings["trained_betas"] = (1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])).tolist()
        settings["timestep_spacing"] = "trailing"
    accepted = inspect.signature(kind).parameters
    with warnings.catch_warnings():
        # diffusers will one day drop the first dpmsolver; it is offered because the reference's configs name it.
        warnings.filterwarnings("ignore", ".*algorithm_type", FutureWarning)
        return kind(**{name: value for name, value in settings.items() if name in accepted})


def denoise(
    predict: Callable[[Float[Tensor, "n 4 h w"], Int64[Tensor, ""]], Float[Tensor, "n 4 h w"]],
    sampler: Any,
    steps: int,
    noise: Float[Tensor, "n 4 h w"],
    generators: list[torch.Generator],
) -> Float[Tensor, "n 4 h w"]:
    """Latents out of `noise` of unit variance, in `steps` steps of `sampler`, which draws from an image's generator."""
    sampler.set_timesteps(steps, device=noise.device)
    draws = {"generator": generators} if "generator" in inspect.signature(sampler.step).parameters else {}
    latents = noise * sampler.init_noise_sigma
    for timestep in sampler.timesteps:
        # The U-Net was trained at whole timesteps; some samplers stop between two.
        prediction = predict(sampler.scale_model_input(latents, timestep), timestep.round().long())
        latents = sampler.step(prediction, timestep, latents, **draws).prev_sample
    return latents


def draw_latents(
    model: SDXL, tokenizer: Tokenizer, sampler: Any, prompts: Sequence[Prompt], seeds: Sequence[int]
) -> Float[Tensor, "n 4 h w"]:
    """The latents of prompts that differ in text only, scaled as the U-Net sees them. The texts are encoded once.

    Guidance (Ho and Salimans, arXiv 2207.12598) moves away from the negative prompt, empty if there is none, and is
    off at a scale of 1 and less. (words:1.3) are weighted, as the reference's previews do.
    """
    device = next(model.parameters()).device
    prompt, guided = prompts[0], prompts[0].scale > 1
    texts = [one.negative_prompt or "" for one in prompts] * guided + [one.prompt for one in prompts]
    tokens = dataclasses.replace(tokenizer, weighted=True)(texts)
    hidden, pooled = model.encode_text(*(part.to(device) for part in tokens if part is not None))
    size = [prompt.height, prompt.width]
    sizes = torch.tensor([[*size, 0, 0, *size]], device=device).expand(len(texts), -1)

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        both = torch.cat([latents, latents]) if guided else latents
        predicted = model.predict(both, timestep.to(device).expand(len(texts)), hidden, pooled, sizes)
        if not guided:
            return predicted
        away, towards = predicted.chunk(2)
        return away + prompt.scale * (towards - away)

    # Drawn on the CPU, so that a seed gives the same picture on every device.
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    shape = 4, prompt.height // 8, prompt.width // 8
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    return denoise(predict, sampler, prompt.steps, noise.to(device), generators)


def draw_previews(
    model: SDXL,
    vae: AutoencoderKL,
    prompts: Sequence[Prompt],
    *,
    config: Config,
    tokenizer: Tokenizer,
    schedule: Schedule,
    autocast: Callable[[], AbstractContextManager[Any]],
    seed: int,
    epoch: int | None,
    step: int,
    now: datetime,
    rank: int = 0,
    ranks: int = 1,
) -> list[Preview]:
    """Draws every `ranks`-th prompt, from `rank` on, and saves it in {output_dir}/sample; returns what came about.

    `autocast` is the training's; `seed` is the run's, of which prompts without one get theirs by position; `epoch` is
    the epoch that has ended, None within one. The modes of the model's modules, the VAE's place and the global random
    generators are afterwards as they were.
    """
    assert config.output_dir is not None
    folder, device = config.output_dir / "sample", next(model.parameters()).device
    drawn: list[tuple[int, int, Tensor]] = []
    with torch.no_grad(), evaluating(model):
        for index in range(rank, len(prompts), ranks):
            prompt = prompts[index]
            with _one_line_if_it_fails(index, prompt), autocast():
                chosen = _position_seed(seed, step, index) if prompt.seed is None else prompt.seed
                name = prompt.sampler or config.sample_sampler
                sampler = build_sampler(name, schedule, v_parameterization=config.v_parameterization)
                drawn.append((index, chosen, draw_latents(model, tokenizer, sampler, [prompt], [chosen])))
    previews = []
    with torch.no_grad(), _on(vae, device):
        for index, chosen, latents in drawn:
            prompt = prompts[index]
            with _one_line_if_it_fails(index, prompt):
                name = preview_name(config.output_name, epoch=epoch, step=step, index=index, time=now, seed=prompt.seed)
                image = to_image(vae, latents)
                preview = Preview(index=index, prompt=prompt, seed=chosen, image=image, path=folder / name)
                text = parameters(prompt, chosen, prompt.sampler or config.sample_sampler, config.output_name)
                save_picture(preview.path, image, text)
                previews.append(preview)
    return previews


def to_image(vae: AutoencoderKL, latents: Float[Tensor, "1 4 h w"]) -> Image.Image:
    """The picture of scaled latents, decoded in float32. Raises ValueError if they hold infinities or NaN."""
    if not latents.isfinite().all():
        raise ValueError("the model gave values that are infinite or not a number")
    pixels = decode(vae, latents.float() / vae.config.scaling_factor)[0]
    levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def save_picture(path: Path, image: Image.Image, text: str) -> None:
    """Writes the picture whole or not at all, with its `parameters` in the text that web UIs read back."""
    information = PngInfo()
    information.add_text("parameters", text)
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=information)


def parameters(prompt: Prompt, seed: int, sampler: str, model: str | None, model_hash: str | None = None) -> str:
    """How a picture is drawn, in AUTOMATIC1111's form; the hash is the first ten digits of the file's SHA-256."""
    lines = [prompt.prompt]
    if prompt.negative_prompt:
        lines.append(f"Negative prompt: {prompt.negative_prompt}")
    settings = {
        "Steps": prompt.steps,
        "Sampler": UI_NAMES.get(sampler.removeprefix("k_"), sampler),
        "CFG scale": prompt.scale,
        "Seed": seed,
        "Size": f"{prompt.width}x{prompt.height}",
        "Model hash": model_hash,
        "Model": model,
    }
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items() if value is not None))
    return "\n".join(lines)


def _quoted(value: object) -> str:
    """As that form has it: what would end a value stands in quotes."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text


def _position_seed(seed: int, step: int, index: int) -> int:
    return int(position_sequence(seed, "preview", step, index).generate_state(1)[0])


@contextmanager
def _one_line_if_it_fails(index: int, prompt: Prompt) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        logger.error("no preview of prompt %d (%s): %s: %s", index, prompt.prompt, type(error).__name__, reason)


@contextmanager
def _on(vae: AutoencoderKL, device: torch.device) -> Iterator[None]:
    """The VAE on `device` as long as it is needed there."""
    home = vae.device
    vae.to(device)
    try:
        yield
    finally:
        vae.to(home)
