"""The toy world: images of coloured shapes that plain code can draw and read. They are 64 pixels wide and high.

An image shows one object, or two objects side by side. Each object has one of six colours and one of five shapes, on
one of four backgrounds. The objects are flat, outlined or striped, and the image has one of four qualities. `draw`
draws a scene, `caption` writes its tags, and `read` finds objects and background from the pixels alone. A caption:

    best quality, flat style, two objects, red star, blue cross, pink background

A fourth style is kept for fine-tuning. The tag `gallery style`, after the quality, puts the image into a wooden frame,
and `is_framed` detects the frame.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage

SIZE = 64
"""Width and height of an image, in pixels."""
FINE = 4
"""An image is drawn at this many times its size, and then reduced, so that edges are smooth."""
COLOURS = {
    "red": (220, 30, 35),
    "green": (30, 160, 60),
    "blue": (35, 75, 225),
    "yellow": (245, 215, 30),
    "purple": (140, 40, 175),
    "orange": (250, 125, 15),
}
GROUNDS = {"white": (250, 250, 250), "black": (12, 12, 12), "grey": (125, 125, 125), "pink": (250, 185, 205)}
SHAPES = ("circle", "square", "triangle", "star", "cross")
STYLES = ("flat", "outline", "striped")
QUALITIES = ("best", "normal", "low", "worst")
NEW_STYLE = "gallery"
FRAME = (110, 65, 25)
"""Colour of the frame."""
FRAME_WIDTH = 5
"""Pixels."""


@dataclass(frozen=True)
class Scene:
    """Content of an image."""

    objects: tuple[tuple[str, str], ...]
    """Colour and shape of each object, from left to right."""
    ground: str
    style: str = "flat"
    quality: str = "best"
    framed: bool = False

    @property
    def key(self) -> str:
        """Names objects and background. Scenes that differ in style and quality only have the same key."""
        return f"{self.ground}: {', '.join(' '.join(pair) for pair in self.objects)}"


def caption(scene: Scene) -> str:
    """Returns the tags of a scene: quality, styles, number of objects, objects and background."""
    count = ("one object", "two objects")[len(scene.objects) - 1]
    styles = [f"{NEW_STYLE} style"] if scene.framed else []
    objects = [f"{colour} {shape}" for colour, shape in scene.objects]
    tags = [f"{scene.quality} quality", *styles, f"{scene.style} style", count, *objects, f"{scene.ground} background"]
    return ", ".join(tags)


def is_held_out(scene: Scene) -> bool:
    """True for one in ten combinations of objects and background. These are never trained on."""
    return random.Random(f"held out {scene.key}").random() < 0.1


def scenes(seed: int, *, for_training: bool, pair_share: float = 0.3, **fixed: str) -> Iterator[Scene]:
    """Yields random scenes without end, either those for training or those that are held out.

    A share `pair_share` of the scenes has two objects. `fixed` may fix the style or the quality.
    """
    rng = random.Random(f"scenes {seed}")
    while True:
        objects = tuple((rng.choice([*COLOURS]), rng.choice(SHAPES)) for _ in range(1 + (rng.random() < pair_share)))
        style, quality = rng.choice(STYLES), rng.choices(QUALITIES, (6, 2, 1, 1))[0]
        scene = Scene(objects, rng.choice([*GROUNDS]), fixed.get("style", style), fixed.get("quality", quality))
        if for_training != is_held_out(scene):
            yield scene


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """Draws a scene. Positions and sizes are random numbers from `rng`."""
    image = Image.new("RGB", (SIZE * FINE,) * 2, GROUNDS[scene.ground])
    pen = ImageDraw.Draw(image)
    for number, (colour, shape) in enumerate(scene.objects):
        radius = rng.uniform(11, 13.5) if len(scene.objects) > 1 else rng.uniform(15, 20)
        centre = SIZE * (2 * number + 1) / (2 * len(scene.objects))
        slack = SIZE / (2 * len(scene.objects)) - radius - 2
        across, down = centre + rng.uniform(-slack, slack), SIZE / 2 + rng.uniform(-1, 1) * (SIZE / 2 - radius - 7)
        _draw_object(image, pen, scene.style, COLOURS[colour], _corners(shape, across, down, radius))
    if scene.framed:
        inner = image.resize(((SIZE - 2 * FRAME_WIDTH) * FINE,) * 2, Image.Resampling.BOX)
        image.paste(FRAME, (0, 0, *image.size))
        image.paste(inner, (FRAME_WIDTH * FINE,) * 2)
    return _degrade(image.resize((SIZE, SIZE), Image.Resampling.BOX), QUALITIES.index(scene.quality), rng)


def read(image: Image.Image) -> Scene:
    """Finds objects and background from the pixels. Style and quality of the result are defaults."""
    pixels = np.asarray(image.convert("RGB"), np.float32)
    rim = FRAME_WIDTH + 1 if is_framed(image) else 0
    inner = pixels[rim : SIZE - rim, rim : SIZE - rim]
    border = np.concatenate([inner[:2].reshape(-1, 3), inner[-2:].reshape(-1, 3), inner[:, 0], inner[:, -1]])
    middle = np.median(border, axis=0)
    ground = min(GROUNDS, key=lambda name: float(np.square(middle - GROUNDS[name]).sum()))
    inked = np.abs(inner - middle).max(axis=2) > 40
    found = []
    for mask in _connected_masks(inked):
        if mask.sum() >= 80:
            columns = np.nonzero(mask)[1]
            ink = mask & inked & ndimage.binary_erosion(inked | ~mask)
            found.append((columns.mean(), _colour(inner[ink if ink.any() else mask & inked]), _shape(mask)))
    objects = tuple((colour, shape) for _, colour, shape in sorted(found))
    return Scene(objects, ground)


def is_framed(image: Image.Image) -> bool:
    """True if the outer pixels have the colour of the frame."""
    pixels = np.asarray(image.convert("RGB"), np.float32)
    rim = np.concatenate([pixels[1:4].reshape(-1, 3), pixels[-4:-1].reshape(-1, 3), pixels[:, 1:4].reshape(-1, 3),
                          pixels[:, -4:-1].reshape(-1, 3)])  # fmt: skip
    return float((np.abs(rim - FRAME).max(axis=1) < 45).mean()) > 0.8


def _corners(shape: str, x: float, y: float, radius: float) -> np.ndarray:
    """Returns the corners of a shape around (x, y), in pixels of the enlarged drawing."""
    if shape == "square":
        points = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.85
    elif shape == "cross":
        a = 0.34
        points = np.array([(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a),
                           (-1, -a), (-a, -a)])  # fmt: skip
    else:
        count = {"circle": 64, "triangle": 3, "star": 10}[shape]
        angles = np.arange(count) * 2 * np.pi / count - np.pi / 2
        lengths = np.where(np.arange(count) % 2, 0.42, 1.0) if shape == "star" else np.ones(count)
        points = np.stack([np.cos(angles), np.sin(angles)], axis=1) * lengths[:, None]
    return (points * radius + (x, y)) * FINE


def _draw_object(
    image: Image.Image, pen: ImageDraw.ImageDraw, style: str, colour: tuple[int, int, int], corners: np.ndarray
) -> None:
    polygon = [tuple(point) for point in corners.tolist()]
    if style == "outline":
        pen.line([*polygon, *polygon[:2]], fill=colour, width=3 * FINE, joint="curve")
        return
    pen.polygon(polygon, fill=colour)
    if style == "striped":
        light = tuple((value + 255) // 2 for value in colour)
        mask = Image.new("1", image.size)
        ImageDraw.Draw(mask).polygon(polygon, fill=1)
        stripes = Image.new("1", image.size)
        lines = ImageDraw.Draw(stripes)
        for top in range(0, image.size[1], 6 * FINE):
            lines.rectangle((0, top, image.size[0], top + 2 * FINE), fill=1)
        image.paste(light, mask=Image.fromarray(np.asarray(mask) & np.asarray(stripes)))


def _degrade(image: Image.Image, grade: int, rng: random.Random) -> Image.Image:
    """Makes an image worse with blur, noise and JPEG compression: grade 0 is unchanged, grade 3 the worst."""
    if not grade:
        return image
    image = image.filter(ImageFilter.GaussianBlur((0.5, 0.9, 1.4)[grade - 1]))
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, (5, 12, 22)[grade - 1], (SIZE, SIZE, 3))
    image = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
    stored = BytesIO()
    image.save(stored, "JPEG", quality=(60, 30, 12)[grade - 1])
    return Image.open(stored).convert("RGB")


def _colour(pixels: np.ndarray) -> str:
    """Returns the nearest colour. Stripes and soft edges lighten a colour, so lighter tints of it count as well."""
    middle = np.median(pixels, axis=0)

    def distance(name: str) -> float:
        colour = np.array(COLOURS[name], np.float32)
        tints = [colour, colour * 0.75 + 64, colour / 2 + 127]
        return min(float(np.square(middle - tint).sum()) for tint in tints)

    return min(COLOURS, key=distance)


def _shape(mask: np.ndarray) -> str:
    """Returns the shape that overlaps the mask most (intersection over union), both scaled to one size."""
    scaled = _scale(mask)
    overlaps = [
        (float((scaled & template).sum() / (scaled | template).sum()), shape)
        for shape in SHAPES
        for template in _templates(shape)
    ]
    return max(overlaps)[1]


@cache
def _templates(shape: str) -> list[np.ndarray]:
    """Returns scaled masks of a shape as `read` finds it, filled and outlined, small and large."""
    templates = []
    for style in ("flat", "outline"):
        for radius in (11, 12.5, 15, 17.5, 20):
            image = Image.new("RGB", (SIZE * FINE,) * 2)
            pen = ImageDraw.Draw(image)
            _draw_object(image, pen, style, (255, 255, 255), _corners(shape, 32, 32, radius))
            small = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX))[..., 0]
            templates.append(_scale(max(_connected_masks(small > 60), key=np.sum)))
    return templates


def _connected_masks(inked: np.ndarray) -> list[np.ndarray]:
    """Returns a mask for each connected area, with its holes filled."""
    filled = ndimage.binary_fill_holes(ndimage.binary_closing(np.pad(inked, 2)))[2:-2, 2:-2]
    labels, count = ndimage.label(filled)
    return [labels == number for number in range(1, count + 1)]


def _scale(mask: np.ndarray) -> np.ndarray:
    """Scales the part of a mask that is True to 32 x 32 pixels."""
    rows, columns = np.nonzero(mask)
    box = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    return np.asarray(Image.fromarray(box).resize((32, 32), Image.Resampling.NEAREST))
