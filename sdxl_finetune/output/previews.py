"""Previews: images that the model in training draws for fixed prompts. `sdxl-model generate` draws in the same way.

Previews are drawn with the objective of the training (samplers.py). Defaults and image sizes are those of sd-scripts
(golden sample_prompts.json). Previews use random generators of their own, so that they do not change the training. A
prompt that fails is reported in one line, and the run continues.
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from sdxl_finetune.config import FlowOptions, PreviewOptions
from sdxl_finetune.config.flow_options import shift_ratio
from sdxl_finetune.data.tokens import Tokenizer
from sdxl_finetune.diffusion.objective import Objective
from sdxl_finetune.files import atomic_path
from sdxl_finetune.model.sdxl import SDXL, evaluating
from sdxl_finetune.model.vae import decode, latent_scale, latent_size
from sdxl_finetune.output.prompts import PreviewFiles, Prompt
from sdxl_finetune.output.samplers import SAMPLERS, build_sampler, denoise, used_sampler
from sdxl_finetune.printable import encodable
from sdxl_finetune.seeding import position_sequence

logger = logging.getLogger(__name__)


class NotFinite(ValueError):
    """The model, or its VAE, gave values that are infinite or not a number."""


@dataclass(frozen=True, kw_only=True)
class PreviewModel:
    """A model with everything that is needed to draw images with it."""

    sdxl: SDXL
    vae: AutoencoderKL
    tokenizer: Tokenizer
    """`draw_latents` reads (words:1.3) as weights, even if this tokenizer does not."""
    objective: Objective
    """The objective that the model was trained with."""
    flow: FlowOptions = field(default_factory=FlowOptions)
    """The shift that a flow was trained with."""
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Context of mixed precision for the model. The VAE decodes outside of it."""

    @property
    def device(self) -> torch.device:
        return next(self.sdxl.parameters()).device

    def shift(self, prompt: Prompt) -> float | None:
        """The shift of the times of a flow for an image of the prompt's size; None for other objectives."""
        if self.objective.kind != "flow":
            return None
        assert prompt.width and prompt.height, "the caller gives each prompt a size"
        return shift_ratio(self.flow, prompt.width * prompt.height)


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How an image is drawn, apart from the model."""

    prompt: Prompt
    seed: int
    sampler: str
    """The sampler that really draws the image (see `used_sampler`)."""
    shift: float | None = None
    """Shift of the times of a flow; None for other objectives."""


@dataclass(frozen=True, kw_only=True)
class Preview:
    """An image that was drawn, and how."""

    index: int
    """Position of the prompt in the prompt file, from 0."""
    prompt: Prompt
    seed: int
    image: Image.Image
    path: Path


def draw_latents(
    model: PreviewModel, sampler_name: str, prompts: Sequence[Prompt], seeds: Sequence[int]
) -> Float[Tensor, "n c h w"]:
    """Draws the latents of a batch of prompts, scaled as the U-Net sees them.

    The prompts may differ in their texts only: size, steps and guidance scale are those of the first. Guidance (Ho and
    Salimans, arXiv 2207.12598) moves away from the negative prompt, or from the empty text if there is none. For a
    model with `zero_cond` the empty text means zeros, as in training. A scale of 1 or less turns guidance off. As in
    the previews of sd-scripts, (words:1.3) are weighted.
    """
    device, shared = model.device, prompts[0]
    assert shared.width and shared.height, "the caller gives each prompt a size"
    guided = shared.scale > 1
    texts = [prompt.negative_prompt or "" for prompt in prompts] * guided + [prompt.prompt for prompt in prompts]
    tokens = dataclasses.replace(model.tokenizer, weighted=True)(texts)
    hidden, pooled = (part.to(device) for part in model.sdxl.encode_text(tokens))
    size = [shared.height, shared.width]
    sizes = torch.tensor([[*size, 0, 0, *size]], device=device).expand(len(texts), -1)

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        inputs = torch.cat([latents, latents]) if guided else latents
        predicted = model.sdxl.predict(inputs, timestep.to(device).expand(len(texts)), hidden, pooled, sizes)
        if not guided:
            return predicted
        negative, positive = predicted.chunk(2)
        return negative + shared.scale * (positive - negative)

    # The noise is drawn on the CPU, so that a seed gives the same image on every device.
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    latent = latent_size(model.vae)
    shape = latent.channels, shared.height // latent.pixels, shared.width // latent.pixels
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    sampler = build_sampler(sampler_name, model.objective, model.shift(shared) or 1.0)
    return denoise(predict, sampler, shared.steps, noise.to(device), generators)


def draw_previews(
    model: PreviewModel, prompts: Iterable[tuple[int, Prompt]], options: PreviewOptions, files: PreviewFiles, seed: int
) -> list[Preview]:
    """Draws a preview for each prompt, saves the images, and returns those that succeeded.

    Each prompt comes with its index in the prompt file. A prompt without a seed gets one that follows from the run's
    `seed`, the optimizer step and the index. Afterwards the modes of the model's modules, the device of the VAE and the
    global random generators are as before.
    """
    drawn: list[tuple[int, Prompt, int, Tensor]] = []
    with torch.no_grad(), evaluating(model.sdxl):
        for index, prompt in prompts:
            with _report_failure(index, prompt), model.autocast():
                own_seed = _preview_seed(seed, files.step, index) if prompt.seed is None else prompt.seed
                latents = draw_latents(model, prompt.sampler or options.sample_sampler, [prompt], [own_seed])
                drawn.append((index, prompt, own_seed, latents))
    previews = []
    with torch.no_grad(), moved_to(model.device, model.vae):
        for index, prompt, own_seed, latents in drawn:
            with _report_failure(index, prompt):
                image, path = to_image(model.vae, latents), files.path(index, prompt.seed)
                sampler = used_sampler(prompt.sampler or options.sample_sampler, model.objective)
                drawn_with = Drawing(prompt=prompt, seed=own_seed, sampler=sampler, shift=model.shift(prompt))
                save_image(path, image, generation_parameters(drawn_with, files.output_name))
                previews.append(Preview(index=index, prompt=prompt, seed=own_seed, image=image, path=path))
    return previews


def to_image(vae: AutoencoderKL, latents: Float[Tensor, "1 c h w"]) -> Image.Image:
    """Decodes scaled latents in float32. Raises NotFinite if latents or pixels are infinite or NaN."""
    if not latents.isfinite().all():
        raise NotFinite("the model gave values that are infinite or not a number")
    pixels = decode(vae, latent_scale(vae).unscaled(latents.float()))[0]
    if not pixels.isfinite().all():
        raise NotFinite("the VAE gave values that are infinite or not a number")
    levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def save_image(path: Path, image: Image.Image, text: str) -> None:
    """Writes a PNG file, complete or not at all. Web UIs read `text` back from its field `parameters`.

    A prompt of a JSON file may hold half of a surrogate pair, and a file name bytes that are not UTF-8. No PNG file can
    hold these, and they are written as \\u....
    """
    information = PngInfo()
    information.add_text("parameters", encodable(text))
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=information)


def generation_parameters(drawing: Drawing, model: str | None, model_hash: str | None = None) -> str:
    """Describes how an image is drawn, in the text format of AUTOMATIC1111.

    `model` is the name of the model. `model_hash` is the first ten digits of the SHA-256 hash of its file. For a
    flow the text also has schedule and shift.
    """
    prompt, shift = drawing.prompt, drawing.shift
    lines = [prompt.prompt]
    if prompt.negative_prompt:
        lines.append(f"Negative prompt: {prompt.negative_prompt}")
    settings = {
        "Steps": prompt.steps,
        "Sampler": SAMPLERS[drawing.sampler.removeprefix("k_")][1],
        "Schedule type": None if shift is None else "Simple",
        "CFG scale": prompt.scale,
        "Seed": drawing.seed,
        "Size": f"{prompt.width}x{prompt.height}",
        "Shift": None if shift is None else round(shift, 4),
        "Model hash": model_hash,
        "Model": model,
    }
    lines.append(", ".join(f"{name}: {_quote(value)}" for name, value in settings.items() if value is not None))
    return "\n".join(lines)


def _quote(value: object) -> str:
    """Puts a value in quotes if it contains a character that would end it in AUTOMATIC1111's format."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text


def _preview_seed(seed: int, step: int, index: int) -> int:
    return int(position_sequence(seed, "preview", step, index).generate_state(1)[0])


@contextmanager
def _report_failure(index: int, prompt: Prompt) -> Iterator[None]:
    """Reports an error in the block in one line of the log, and continues after the block."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        logger.error("no preview of prompt %d (%s): %s: %s", index, prompt.prompt, type(error).__name__, reason)


@contextmanager
def moved_to(device: torch.device, vae: AutoencoderKL) -> Iterator[None]:
    """Within the context the VAE is on `device`. Afterwards it is where it was before."""
    previous_device = vae.device
    vae.to(device)
    try:
        yield
    finally:
        vae.to(previous_device)
