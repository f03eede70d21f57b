"""`debug_dataset`: draws the first batches of a run as they will be trained, on one picture, without loading the model.

The picture shows each image in its bucket, cropped and mirrored, with its caption. What a mask hides is striped. The
squares of a mask are those of the latents. Images are drawn from their files, also if the run caches latents.
"""

import itertools
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image

from sdxl_finetune.batch import Position
from sdxl_finetune.config import Config
from sdxl_finetune.data.batch_plan import MicroBatch, Plan, build_plan
from sdxl_finetune.data.images import ImageError
from sdxl_finetune.data.index import Index
from sdxl_finetune.data.loader import TrainingDataset
from sdxl_finetune.data.tokens import tokenizer_of
from sdxl_finetune.data.views import View, draw_view
from sdxl_finetune.diffusion.noise import draw_noise
from sdxl_finetune.diffusion.timesteps import draw_timesteps
from sdxl_finetune.errors import Problem, UserError, counted
from sdxl_finetune.latents.captions import Captions
from sdxl_finetune.output.console import console
from sdxl_finetune.output.contact_sheet import contact_sheet, stack
from sdxl_finetune.runtime.processes import build_accelerator, shared_seed
from sdxl_finetune.training.every import total_steps
from sdxl_finetune.training.setup import shared_index

logger = logging.getLogger(__name__)

BATCHES, IMAGES = 8, 64
"""Most batches on the picture, and images after which no further batch is drawn: the picture stays readable."""
LEGEND = """Each dark bar begins a batch: its step, its epoch, and its aspect-ratio bucket, width x height in pixels.
Each picture is an image as it is trained: resized to fill the bucket, cropped to it, and perhaps mirrored.
Below it stand the name of the file, its size, and the size to which it is resized.
"Cut off" counts the pixels that the crop removes at each side of the resized image.
Last comes the caption as it is trained in this step. A caption that ends in ... is longer: the log has all of it."""
MASK_LEGEND = """
Stripes cover what the mask hides from the loss. Masks have the squares of the latents."""
COLUMNS, LINES = 4, 12
"""Images beside each other, and lines of text below each."""
PIXELS_PER_LATENT = 8
"""Pixels for one latent of SDXL's VAE, along one side."""
STRIPES = np.array(((10, 0, 20), (100, 0, 90)), np.float32)
"""Colours of the stripes over what a mask hides."""
STRIPES_ACROSS = 24
"""Stripes along the longer side of an image."""


def draw_dataset(config: Config) -> int:
    """Draws the first batches and says where the picture is; returns the exit status 0.

    Raises UserError for the user's mistakes.
    """
    accelerator = build_accelerator(config)
    with console(config, accelerator.process_index):
        seed = shared_seed(config)
        index = shared_index(config, accelerator)
        if accelerator.is_main_process:
            logger.info("%s", index.describe())
            path = _draw(config, index, seed, accelerator)
            logger.info("debug_dataset: the first batches are drawn in %s; nothing was trained", path)
    accelerator.end_training()
    return 0


def _draw(config: Config, index: Index, seed: int, accelerator: Accelerator) -> Path:
    """Writes the picture of the first steps from the beginning of training; returns its path."""
    plan = build_plan(
        index, ranks=accelerator.num_processes, accumulation=config.gradient_accumulation_steps, seed=seed
    )
    steps = total_steps(config, plan)
    dataset = TrainingDataset(
        index=index,
        read_latents=None,
        tokenize=tokenizer_of(config),
        draw_noise=partial(draw_noise, config, seed),
        draw_timesteps=partial(draw_timesteps, config, seed),
        seed=seed,
        max_steps=steps,
    )
    captions = Captions(index, config.text_encoder_outputs_variants, "")
    caption = partial(_cached_caption, dataset, captions) if config.cache_text_encoder_outputs else dataset.caption_at
    pages, images = [], 0
    for micro_batch in itertools.islice(plan.micro_batches(0, steps), BATCHES):
        if images < IMAGES:
            pages.append(_page(micro_batch, index, seed, plan, caption))
            images += len(micro_batch.rows)
    path = config.output_folder / "debug_dataset.png"
    try:
        config.output_folder.mkdir(parents=True, exist_ok=True)
        stack(pages, LEGEND + MASK_LEGEND * bool(index.has_mask.any())).save(path)
    except OSError as error:
        raise UserError(Problem(f"cannot be written: {error.strerror}", file=str(path))) from None
    return path


def _page(
    micro_batch: MicroBatch, index: Index, seed: int, plan: Plan, caption: Callable[[Position, int, int], str]
) -> tuple[str, Image.Image]:
    """Heading and picture of one batch. The log names each image and its whole caption."""
    position, rows = micro_batch.position, micro_batch.rows.tolist()
    bucket = index[rows[0]].bucket
    heading = f"step {position.step + 1}"
    if plan.accumulation > 1:
        heading += f", micro-batch {position.micro_batch + 1} of {position.micro_batches_in_step}"
    heading += f"      epoch {position.epoch + 1}      bucket {bucket.width} x {bucket.height}"
    heading += f"      {counted(len(rows), 'image')}"
    logger.info("%s", " ".join(heading.split()))
    pictures, texts = [], []
    for slot, row in enumerate(rows):
        view = draw_view(index[row], seed, position, slot)
        text = caption(position, slot, row)
        pictures.append(_picture(view))
        about = _describe(view)
        logger.info("    %s, %s: %s", view.entry.path, ", ".join(about), text or "(empty caption)")
        texts.append("\n".join([view.entry.path.name, *about, text or "(empty caption)"]))
    return heading, contact_sheet(pictures, texts, columns=COLUMNS, lines=LINES)


def _cached_caption(dataset: TrainingDataset, captions: Captions, position: Position, slot: int, row: int) -> str:
    """The caption whose cached text encoder output is used at this place."""
    draw = dataset.draw_variant(position, slot, row)
    return "" if draw is None else captions.text(row, int(draw * captions.variants))


def _describe(view: View) -> list[str]:
    """Size, resized size, crop and flip."""
    (width, height), (wide, high) = view.entry.size, view.resized
    (left, top), bucket = view.left_top, view.entry.bucket
    size = f"{width} x {height}" + (f" resized to {wide} x {high}" if (width, height) != (wide, high) else "")
    sides = {"left": left, "top": top, "right": wide - bucket.width - left, "bottom": high - bucket.height - top}
    cut = [f"{side} {number}" for side, number in sides.items() if number]
    return [size, f"cut off: {', '.join(cut)}" if cut else "nothing cut off", *(["mirrored"] if view.mirrored else [])]


def _picture(view: View) -> Image.Image:
    """The image as it is trained, with its mask. An unreadable image is grey."""
    try:
        pixels, mask = view.load_pixels(), view.load_mask(PIXELS_PER_LATENT)
    except ImageError as error:
        logger.warning("%s", Problem(error.reason, file=error.path))
        return Image.new("RGB", (view.entry.bucket.width, view.entry.bucket.height), "grey")
    if mask is not None:
        weight = np.repeat(np.repeat(mask, PIXELS_PER_LATENT, 0), PIXELS_PER_LATENT, 1)[..., None]
        hidden = 0.5 * pixels.mean(axis=2, keepdims=True) + _stripes(*pixels.shape[:2])
        pixels = (weight * pixels + (1 - weight) * hidden).clip(0, 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels))


def _stripes(height: int, width: int) -> np.ndarray:
    """Diagonal stripes, height x width x 3."""
    diagonal = np.add.outer(np.arange(height), np.arange(width))
    return STRIPES[diagonal * 2 * STRIPES_ACROSS // max(height, width) % 2]
