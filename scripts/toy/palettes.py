"""Style tags of the toy world that plain code reads off a picture: each style is a palette.

A style paints all objects in one colour on one background, and its captions name neither:

    best quality, style_monet, flat style, one object, star

Eight styles have from few to many pictures. Two more are mislabelled on purpose: half of the pictures of one, and three
quarters of the pictures of the other, are in the palettes of other styles.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, islice
from pathlib import Path

from PIL import Image

from scripts.toy.style import save_pair
from scripts.toy.world import COLOURS, GROUNDS, Scene, caption, draw, read, scenes

STYLES = {
    "monet": 8, "degas": 12, "klimt": 20, "goya": 32, "dali": 56, "matisse": 96, "renoir": 160, "vermeer": 256,
    "rubens": 192, "titian": 192,
}  # fmt: skip
"""Pictures of each style."""
SPOILT = {"rubens": 2, "titian": 4}
"""Mislabelled styles: one picture in so many is in the palette of the style."""
SIMILAR = ({"red", "orange"}, {"orange", "yellow"}, {"blue", "purple"})
"""Colours that no two styles have on the same background. A report cannot tell such styles apart before both are well
learned, and its accuracy would then say more about the pair than about the tag."""
PLAIN = 150
"""Pictures without a style tag, whose captions name the colours."""


@dataclass(frozen=True)
class Palette:
    """The colour of all objects, and the background."""

    colour: str
    ground: str

    def paint(self, scene: Scene) -> Scene:
        """The scene in this palette."""
        return replace(scene, objects=tuple((self.colour, shape) for _, shape in scene.objects), ground=self.ground)

    def is_shown(self, picture: Image.Image) -> bool:
        """True if the picture shows objects, all in this colour and on this background."""
        shown = read(picture)
        colours = {colour for colour, _ in shown.objects}
        return colours == {self.colour} and shown.ground == self.ground


def palettes(seed: int) -> dict[str, Palette]:
    """A palette of its own for each style, by its name. The seed draws them until no two are similar."""
    rng = random.Random(f"palettes {seed}")
    every = [Palette(colour, ground) for colour in COLOURS for ground in GROUNDS]
    while True:
        drawn = rng.sample(every, len(STYLES))
        if not any(one.ground == other.ground and {one.colour, other.colour} in SIMILAR
                   for one, other in combinations(drawn, 2)):  # fmt: skip
            return dict(zip(STYLES, drawn, strict=True))


def styled_caption(scene: Scene, style: str) -> str:
    """The tags of a scene with a style: its colours are left out."""
    count = ("one object", "two objects")[len(scene.objects) - 1]
    shapes = [shape for _, shape in scene.objects]
    return ", ".join([f"{scene.quality} quality", f"style_{style}", f"{scene.style} style", count, *shapes])


def write_styles(folder: Path, seed: int, share: float = 1.0) -> None:
    """Writes the pictures of all styles and those without a style, with caption files. `share` lowers their numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    own = palettes(seed)
    clean = [name for name in STYLES if name not in SPOILT]
    source, number = scenes(1000 + seed, for_training=True, quality="best"), 0
    for style, count in STYLES.items():
        for place in range(max(4, round(share * count))):
            rng = random.Random(f"{seed} {style} {place}")
            shown = style
            if place % SPOILT.get(style, 1):
                shown = rng.choice(clean)
            scene = own[shown].paint(next(source))
            save_pair(folder, number, draw(scene, rng), styled_caption(scene, style))
            number += 1
    for place, scene in enumerate(islice(source, round(share * PLAIN))):
        save_pair(folder, number + place, draw(scene, random.Random(f"{seed} plain {place}")), caption(scene))


def captions_to_draw(count: int) -> Sequence[Scene]:
    """Scenes with which each style is drawn. Their colours do not matter."""
    return list(islice(scenes(1, for_training=True, quality="best"), count))
