"""Says how well a model of the toy world follows captions: python -m scripts.toy.judge MODEL [--captions 200]

Draws held-out captions with guidance 5 and reads the pictures. A caption's colours are right if they are those of the
objects in the picture, no more and no less; so with shapes, and with pairs of both; placed is every pair from left to
right, in the order of the tags. By chance a colour is right once in six times, a shape once in five, a ground once in
four.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from PIL import Image

from scripts.toy.world import NEW_STYLE, SIZE, Scene, caption, framed, read, scenes
from sdxl_finetune.data.tokens import Tokenizer
from sdxl_finetune.diffusion.schedule import build_schedule
from sdxl_finetune.model.load import load_checkpoint
from sdxl_finetune.output.previews import build_sampler, draw_latents, to_image
from sdxl_finetune.output.prompts import Prompt

BATCH = 50


@dataclass(frozen=True)
class Score:
    """Shares of captions, 0 to 1."""

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
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--styled", action="store_true", help=f"with the tag {NEW_STYLE} style")
    parser.add_argument("--sheet", type=Path, help="PNG file of the pictures to write")
    arguments = parser.parse_args()
    wanted = list(islice(scenes(1, kept=False, quality="best"), arguments.captions))
    pictures = draw_captions(arguments.model, wanted, styled=arguments.styled)
    print(judge(wanted, pictures))
    if arguments.sheet:
        sheet(pictures).save(arguments.sheet)


def follows(model: Path, count: int = 200, *, styled: bool = False) -> Score:
    """The score of a checkpoint on held-out captions."""
    wanted = list(islice(scenes(1, kept=False, quality="best"), count))
    return judge(wanted, draw_captions(model, wanted, styled=styled))


def judge(wanted: Sequence[Scene], pictures: Sequence[Image.Image]) -> Score:
    right: Counter[str] = Counter()
    for scene, picture in zip(wanted, pictures, strict=True):
        found = read(picture)
        for at, name in enumerate(("colour", "shape")):
            right[name] += sorted(one[at] for one in found.objects) == sorted(one[at] for one in scene.objects)
        right["pair"] += sorted(found.objects) == sorted(scene.objects)
        right["placed"] += found.objects == scene.objects
        right["ground"] += found.ground == scene.ground
        right["count"] += len(found.objects) == len(scene.objects)
        right["framed"] += framed(picture)
    return Score(*(right[name] / len(wanted) for name in Score.__dataclass_fields__))


def draw_captions(
    model: Path, wanted: Sequence[Scene], *, styled: bool = False, scale: float = 5.0
) -> list[Image.Image]:
    """A picture for each caption, from seeds 0, 1, 2, ...; with `styled`, in the gallery style."""
    return draw_texts(model, [caption(replace(scene, framed=styled)) for scene in wanted], scale=scale)


@torch.no_grad()
def draw_texts(model: Path, texts: Sequence[str], *, scale: float = 5.0) -> list[Image.Image]:
    """A picture for each prompt, from seeds 0, 1, 2, ..."""
    loaded = load_checkpoint(model, dtype=torch.float32)
    loaded.model.eval()
    schedule, tokenizer = build_schedule(zero_terminal_snr=False), Tokenizer(max_token_length=None)
    prompts = [Prompt(prompt=text, width=SIZE, height=SIZE, steps=20, scale=scale) for text in texts]
    pictures = []
    for start in range(0, len(prompts), BATCH):
        seeds = range(start, min(start + BATCH, len(prompts)))
        sampler = build_sampler("euler_a", schedule, v_parameterization=False)
        latents = draw_latents(loaded.model, tokenizer, sampler, prompts[start : start + BATCH], seeds)
        pictures += [to_image(loaded.vae, one[None]) for one in latents]
    return pictures


def sheet(pictures: Sequence[Image.Image], across: int = 20) -> Image.Image:
    page = Image.new("RGB", (SIZE * across, SIZE * -(-len(pictures) // across)), "white")
    for number, picture in enumerate(pictures):
        page.paste(picture, (SIZE * (number % across), SIZE * (number // across)))
    return page


if __name__ == "__main__":
    main()
