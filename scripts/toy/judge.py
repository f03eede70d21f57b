"""Measures how well a model of the toy world follows captions: python -m scripts.toy.judge MODEL [--captions 200]

The script draws captions that were held out of training, with guidance scale 5, and reads the images (world.py). It
prints the share of captions for which each of these is right:

    colour    the image shows objects of exactly the caption's colours
    shape     the image shows objects of exactly the caption's shapes
    pair      the image shows objects of exactly the caption's pairs of colour and shape
    placed    the pairs also stand from left to right in the order of the caption
    ground    the background has the caption's colour
    count     the number of objects is right
    framed    the image hangs in the wooden frame of the new style, asked for or not

By chance, one of six colours is right, one of five shapes and one of four backgrounds.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from PIL import Image

from scripts.toy.world import NEW_STYLE, SIZE, Scene, caption, is_framed, read, scenes
from sdxl_finetune.data.tokens import Tokenizer
from sdxl_finetune.diffusion.objective import Objective, build_objective
from sdxl_finetune.model.load import load_checkpoint
from sdxl_finetune.output.previews import PreviewModel, draw_latents, to_image
from sdxl_finetune.output.prompts import Prompt

BATCH = 50
"""Images that are drawn at once."""


@dataclass(frozen=True)
class Score:
    """Shares of captions, from 0 to 1. The docstring of the module defines them."""

    colour: float
    shape: float
    pair: float
    placed: float
    ground: float
    count: float
    framed: float

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.1%}" for name, value in vars(self).items())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--captions", type=int, default=200, help="number of captions to draw (200)")
    parser.add_argument("--styled", action="store_true", help=f"add the tag {NEW_STYLE} style to the captions")
    parser.add_argument("--sheet", type=Path, help="PNG file to write, with all images in a grid")
    arguments = parser.parse_args()
    test_scenes = held_out_scenes(arguments.captions)
    images = draw_captions(arguments.model, test_scenes, styled=arguments.styled)
    print(judge(test_scenes, images))
    if arguments.sheet:
        sheet(images).save(arguments.sheet)


def held_out_scenes(count: int, pair_share: float = 0.3) -> list[Scene]:
    """Returns the first `count` scenes that are never trained on. A share `pair_share` of them has two objects."""
    return list(islice(scenes(1, for_training=False, quality="best", pair_share=pair_share), count))


def judge_checkpoint(model: Path, count: int = 200, *, styled: bool = False) -> Score:
    """Returns the score of a checkpoint on held-out captions."""
    test_scenes = held_out_scenes(count)
    return judge(test_scenes, draw_captions(model, test_scenes, styled=styled))


def judge(expected: Sequence[Scene], images: Sequence[Image.Image]) -> Score:
    """Compares each image with the scene that it should show."""
    right: Counter[str] = Counter()
    for scene, image in zip(expected, images, strict=True):
        shown = read(image)
        for index, name in enumerate(("colour", "shape")):
            right[name] += sorted(pair[index] for pair in shown.objects) == sorted(
                pair[index] for pair in scene.objects
            )
        right["pair"] += sorted(shown.objects) == sorted(scene.objects)
        right["placed"] += shown.objects == scene.objects
        right["ground"] += shown.ground == scene.ground
        right["count"] += len(shown.objects) == len(scene.objects)
        right["framed"] += is_framed(image)
    return Score(*(right[name] / len(expected) for name in Score.__dataclass_fields__))


def draw_captions(
    model: Path, scenes_to_draw: Sequence[Scene], *, styled: bool = False, scale: float = 5.0
) -> list[Image.Image]:
    """Draws the caption of each scene, with seeds 0, 1, 2, ... If `styled`, the captions ask for the new style."""
    return draw_texts(model, [caption(replace(scene, framed=styled)) for scene in scenes_to_draw], scale=scale)


@torch.no_grad()
def draw_texts(
    model: Path,
    texts: Sequence[str],
    *,
    scale: float = 5.0,
    objective: Objective | None = None,
    sampler: str = "euler_a",
) -> list[Image.Image]:
    """Draws each prompt, with seeds 0, 1, 2, ... `scale` is the guidance scale.

    The model is drawn as one of this objective. By default it predicts noise.
    """
    loaded = load_checkpoint(model, dtype=torch.float32)
    preview_model = PreviewModel(
        sdxl=loaded.model.eval(),
        vae=loaded.vae,
        tokenizer=Tokenizer(max_token_length=None),
        objective=objective or build_objective("noise"),
    )
    prompts = [Prompt(prompt=text, width=SIZE, height=SIZE, steps=20, scale=scale) for text in texts]
    images = []
    for start in range(0, len(prompts), BATCH):
        seeds = range(start, min(start + BATCH, len(prompts)))
        latents = draw_latents(preview_model, sampler, prompts[start : start + BATCH], seeds)
        images += [to_image(loaded.vae, image_latents[None]) for image_latents in latents]
    return images


def sheet(images: Sequence[Image.Image], columns: int = 20) -> Image.Image:
    """Pastes all images into a grid."""
    page = Image.new("RGB", (SIZE * columns, SIZE * -(-len(images) // columns)), "white")
    for number, image in enumerate(images):
        page.paste(image, (SIZE * (number % columns), SIZE * (number // columns)))
    return page


if __name__ == "__main__":
    main()
