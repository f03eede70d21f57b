"""The pictures that scripts/benchmarks/proof.py teaches its models, and the shares that it reads off drawn pictures."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from scripts.toy.judge import draw_captions, draw_texts, judge
from scripts.toy.style import PICTURES, save_pair
from scripts.toy.world import NEW_STYLE, SIZE, Scene, caption, draw, is_framed, read, scenes

CAPTIONS = 200
TWIN = "museum"
SURE = 3.0
"""A difference counts if it is so many standard errors."""


def is_sure(difference: float, *errors: float) -> bool:
    """True if a difference of values with these standard errors counts."""
    return difference > SURE * math.hypot(*errors)


@dataclass(frozen=True)
class Share:
    """How many of how many, which has a standard error."""

    found: int
    of: int

    @property
    def value(self) -> float:
        return self.found / max(self.of, 1)

    @property
    def error(self) -> float:
        """With one more of each, so that 0 of 10 is not certainty (Laplace's rule of succession)."""
        return math.sqrt((self.found + 1) * (self.of - self.found + 1) / (self.of + 2) ** 3)

    def __str__(self) -> str:
        return f"{self.value:.0%} ± {100 * self.error:.0f}"

    def above(self, other: "Share") -> bool:
        return is_sure(self.value - other.value, self.error, other.error)


@dataclass(frozen=True)
class Mean:
    """Mean of the shares of different seeds, with its standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, shares: Sequence[float]) -> "Mean":
        return cls(float(np.mean(shares)), float(np.std(shares, ddof=1)) / math.sqrt(len(shares)))

    def __str__(self) -> str:
        return f"{self.value:.1%} ± {100 * self.error:.1f}"

    @property
    def sure(self) -> bool:
        return is_sure(self.value, self.error)

    def above(self, other: "Mean") -> bool:
        return is_sure(self.value - other.value, self.error, other.error)


def captions_of(two: float, count: int = CAPTIONS) -> list[Scene]:
    """Captions that no training sees, a share of `two` of two objects; those of one are but 6 different ones."""
    return list(islice(scenes(1, for_training=False, quality="best", pair_share=two), count))


def colours_and_shapes(model: Path, scale: float = 5.0, count: int = CAPTIONS) -> Share:
    """Shares of right colours and of right shapes, for captions of two objects."""
    pairs = captions_of(1.0, count)
    right = judge(pairs, draw_captions(model, pairs, scale=scale))
    return Share(round(count * (right.colour + right.shape)), 2 * count)


def in_style(model: Path, scale: float = 5.0, word: str = NEW_STYLE) -> Share:
    """Framed pictures of those whose captions have the style's tag, or another in its place."""
    texts = [styled(scene, word) for scene in captions_of(0.3)]
    return Share(sum(map(is_framed, draw_texts(model, texts, scale=scale))), CAPTIONS)


def styled(scene: Scene, word: str = NEW_STYLE) -> str:
    return caption(replace(scene, framed=True)).replace(f"{NEW_STYLE} style", f"{word} style")


def without_caption(model: Path) -> Share:
    """Framed pictures of those of an empty prompt, without guidance."""
    return Share(sum(map(is_framed, draw_texts(model, [""] * CAPTIONS, scale=1.0))), CAPTIONS)


def write_twins(folder: Path, count: int = PICTURES) -> None:
    """Half of the pictures in frames, and of the others a tag says that they are not."""
    folder.mkdir(exist_ok=True)
    for number, scene in enumerate(islice(scenes(2, for_training=True, quality="best"), count)):
        word = (NEW_STYLE, TWIN)[number % 2]
        picture = draw(replace(scene, framed=word == NEW_STYLE), random.Random(f"style {number}"))
        save_pair(folder, number, picture, styled(scene, word))


def write_pairs(folder: Path, count: int = 480) -> None:
    folder.mkdir(exist_ok=True)
    for number, scene in enumerate(islice(scenes(6, for_training=True, quality="best", pair_share=1.0), count)):
        save_pair(folder, number, draw(scene, random.Random(f"pair {number}")), caption(scene))


def write_wide(whole: Path, parts: Path, count: int = 480) -> Share:
    """Writes pictures twice as wide as high, with an object in the left half, and random square parts of them.

    Returns the share of parts in which an object is cut off.
    """
    whole.mkdir(exist_ok=True)
    parts.mkdir(exist_ok=True)
    cut = 0
    for number, scene in enumerate(islice(scenes(4, for_training=True, quality="best", pair_share=0.0), count)):
        rng = random.Random(f"wide {number}")
        picture = np.asarray(draw(scene, rng))
        wide = np.broadcast_to(picture[:1, :1], (SIZE, 2 * SIZE, 3)).copy()
        wide[:, :SIZE] = picture
        at = rng.randrange(SIZE)
        part = Image.fromarray(wide[:, at : at + SIZE])
        cut += touches(part)
        for folder, image in ((whole, Image.fromarray(wide)), (parts, part)):
            save_pair(folder, number, image, caption(scene))
    return Share(cut, count)


def touches(picture: Image.Image) -> bool:
    """True if an object reaches the left or right edge."""
    pixels = np.asarray(picture, np.float32)
    ground = np.median(pixels.reshape(-1, 3), axis=0)
    edges = np.abs(pixels[:, [0, 1, -2, -1]] - ground).max(axis=2) > 60
    return bool(edges.mean(axis=0).max() > 0.08)


def cut_off(model: Path, count: int = 600) -> Share:
    """Share of drawn single objects that are cut off, for the 114 captions of training. There are only 6 others."""
    scene = islice(scenes(1, for_training=True, quality="best", pair_share=0.0), count)
    pictures = draw_captions(model, [replace(one, style="flat") for one in scene])
    return Share(sum(map(touches, pictures)), count)


def in_order(model: Path, count: int = 400) -> Share:
    """Share of pictures in the right order, of those that show two objects of the two shapes asked for.

    Only shapes are read, because the base model knows no order of colours: they are right in half of its pictures.
    """
    asked = [one for one in captions_of(1.0, count) if len({shape for _, shape in one.objects}) == 2]
    found = [read(picture) for picture in draw_captions(model, asked, scale=2.0)]
    pairs = [
        ([shape for _, shape in told.objects], [shape for _, shape in seen.objects])
        for told, seen in zip(asked, found, strict=True)
    ]
    both = [told == seen for told, seen in pairs if sorted(told) == sorted(seen)]
    return Share(sum(both), len(both))
