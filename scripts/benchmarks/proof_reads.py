"""Measurements of scripts/benchmarks/proof.py: data that its models are trained on, and what their images show.

Most measurements are shares of images with standard errors.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from scripts.toy.judge import draw_captions, draw_texts, held_out_scenes, judge
from scripts.toy.style import PICTURES, save_pair
from scripts.toy.world import NEW_STYLE, SIZE, Scene, caption, draw, is_framed, read, scenes

CAPTIONS = 200
"""Images for a share."""
TWIN = "museum"
"""Second new word beside the name of the new style."""
MIN_STANDARD_ERRORS = 3.0
"""A difference is significant if it is larger than this many standard errors."""


def is_significant(difference: float, *errors: float) -> bool:
    """True if a difference of values with these standard errors is significant."""
    return difference > MIN_STANDARD_ERRORS * math.hypot(*errors)


@dataclass(frozen=True)
class Share:
    """Share of images with a property, and its standard error."""

    found: int
    """Images with the property."""
    of: int
    """All images."""

    @property
    def value(self) -> float:
        return self.found / max(self.of, 1)

    @property
    def error(self) -> float:
        """Standard error after Laplace's rule of succession, which adds one to both counts: 0 of 10 is not certain."""
        return math.sqrt((self.found + 1) * (self.of - self.found + 1) / (self.of + 2) ** 3)

    def __str__(self) -> str:
        return f"{self.value:.0%} ± {100 * self.error:.0f}"

    def above(self, other: "Share") -> bool:
        return is_significant(self.value - other.value, self.error, other.error)


@dataclass(frozen=True)
class Mean:
    """Mean of shares from runs with different seeds, and its standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, shares: Sequence[float]) -> "Mean":
        return cls(float(np.mean(shares)), float(np.std(shares, ddof=1)) / math.sqrt(len(shares)))

    def __str__(self) -> str:
        return f"{self.value:.1%} ± {100 * self.error:.1f}"

    @property
    def is_significant(self) -> bool:
        return is_significant(self.value, self.error)

    def above(self, other: "Mean") -> bool:
        return is_significant(self.value - other.value, self.error, other.error)


def colours_and_shapes(model: Path, scale: float = 5.0, count: int = CAPTIONS) -> Share:
    """Measures how often the colours are right, and the shapes, for held-out captions of two objects."""
    pairs = held_out_scenes(count, pair_share=1.0)
    score = judge(pairs, draw_captions(model, pairs, scale=scale))
    return Share(round(count * (score.colour + score.shape)), 2 * count)


def in_style(model: Path, scale: float = 5.0, word: str = NEW_STYLE) -> Share:
    """Measures how many images hang in a frame if the captions ask for the style `word`."""
    texts = [styled_caption(scene, word) for scene in held_out_scenes(CAPTIONS)]
    return Share(sum(map(is_framed, draw_texts(model, texts, scale=scale))), CAPTIONS)


def styled_caption(scene: Scene, word: str = NEW_STYLE) -> str:
    return caption(replace(scene, framed=True)).replace(f"{NEW_STYLE} style", f"{word} style")


def without_caption(model: Path) -> Share:
    """Measures how many images of an empty prompt hang in a frame. They are drawn without guidance."""
    return Share(sum(map(is_framed, draw_texts(model, [""] * CAPTIONS, scale=1.0))), CAPTIONS)


def write_twins(folder: Path, count: int = PICTURES) -> None:
    """Writes images for two styles that the captions name: half of the images have a frame, the others do not."""
    folder.mkdir(exist_ok=True)
    for number, scene in enumerate(islice(scenes(2, for_training=True, quality="best"), count)):
        word = (NEW_STYLE, TWIN)[number % 2]
        picture = draw(replace(scene, framed=word == NEW_STYLE), random.Random(f"style {number}"))
        save_pair(folder, number, picture, styled_caption(scene, word))


def write_pairs(folder: Path, count: int = 480) -> None:
    """Writes images of two objects with captions."""
    folder.mkdir(exist_ok=True)
    for number, scene in enumerate(islice(scenes(6, for_training=True, quality="best", pair_share=1.0), count)):
        save_pair(folder, number, draw(scene, random.Random(f"pair {number}")), caption(scene))


def write_wide(whole: Path, parts: Path, count: int = 480) -> Share:
    """Writes images twice as wide as high, with an object in the left half, and a random square crop of each.

    Returns the share of crops that cut off an object.
    """
    whole.mkdir(exist_ok=True)
    parts.mkdir(exist_ok=True)
    cut = 0
    for number, scene in enumerate(islice(scenes(4, for_training=True, quality="best", pair_share=0.0), count)):
        rng = random.Random(f"wide {number}")
        picture = np.asarray(draw(scene, rng))
        wide = np.broadcast_to(picture[:1, :1], (SIZE, 2 * SIZE, 3)).copy()
        wide[:, :SIZE] = picture
        left = rng.randrange(SIZE)
        part = Image.fromarray(wide[:, left : left + SIZE])
        cut += touches(part)
        for folder, image in ((whole, Image.fromarray(wide)), (parts, part)):
            save_pair(folder, number, image, caption(scene))
    return Share(cut, count)


def touches(picture: Image.Image) -> bool:
    """True if an object touches the left or right edge."""
    pixels = np.asarray(picture, np.float32)
    ground = np.median(pixels.reshape(-1, 3), axis=0)
    edges = np.abs(pixels[:, [0, 1, -2, -1]] - ground).max(axis=2) > 60
    return bool(edges.mean(axis=0).max() > 0.08)


def cut_off(model: Path, count: int = 600) -> Share:
    """Measures how often the edge cuts off an object, with captions of one object.

    The captions are the 114 that trainings use, because only 6 are held out.
    """
    singles = islice(scenes(1, for_training=True, quality="best", pair_share=0.0), count)
    images = draw_captions(model, [replace(scene, style="flat") for scene in singles])
    return Share(sum(map(touches, images)), count)


def in_order(model: Path, count: int = 400) -> Share:
    """Measures how often two shapes stand in the order of the caption, among images that show both shapes.

    Shapes are measured, because the base model puts colours in the right order only half of the time.
    """
    pairs = held_out_scenes(count, pair_share=1.0)
    expected = [scene for scene in pairs if len({shape for _, shape in scene.objects}) == 2]
    shown = [read(image) for image in draw_captions(model, expected, scale=2.0)]
    shapes = [
        ([shape for _, shape in scene.objects], [shape for _, shape in image.objects])
        for scene, image in zip(expected, shown, strict=True)
    ]
    both_shown = [caption_shapes == image_shapes for caption_shapes, image_shapes in shapes
                  if sorted(caption_shapes) == sorted(image_shapes)]  # fmt: skip
    return Share(sum(both_shown), len(both_shown))
