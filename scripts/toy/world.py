"""A world of pictures that plain code can draw and read: flat objects on plain grounds, 64 pixels wide.

A picture shows one or two objects (left and right) of six colours and five shapes on one of four grounds, drawn in one
of three styles, in one of four qualities. `draw` makes it, `caption` says it in tags as the users write them, and
`read` tells from the pixels alone what it shows. A fourth style is for fine-tuning: `gallery style` hangs the picture
in a wooden frame, and `framed` sees that.
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
"""Pixels of a side."""
FINE = 4
"""Pictures are drawn so many times as large and reduced."""
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
FRAME_WIDTH = 5


@dataclass(frozen=True)
class Scene:
    """What a picture shows."""

    objects: tuple[tuple[str, str], ...]
    """Colour and shape of each, from left to right."""
    ground: str
    style: str = "flat"
    quality: str = "best"
    framed: bool = False

    @property
    def key(self) -> str:
        """What makes it the same thing to draw, whatever its style and quality."""
        return f"{self.ground}: {', '.join(' '.join(one) for one in self.objects)}"


def caption(scene: Scene) -> str:
    """Quality first, then style, count, objects and ground."""
    count = ("one object", "two objects")[len(scene.objects) - 1]
    styles = [f"{NEW_STYLE} style"] if scene.framed else []
    objects = [f"{colour} {shape}" for colour, shape in scene.objects]
    tags = [f"{scene.quality} quality", *styles, f"{scene.style} style", count, *objects, f"{scene.ground} background"]
    return ", ".join(tags)


def held_out(scene: Scene) -> bool:
    """One combination of objects and ground in ten is never trained on."""
    return random.Random(f"held out {scene.key}").random() < 0.1


def scenes(seed: int, *, kept: bool, two: float = 0.3, **fixed: str) -> Iterator[Scene]:
    """Random scenes without end: trained ones (`kept`) or held out ones, a share of `two` with two objects."""
    rng = random.Random(f"scenes {seed}")
    while True:
        objects = tuple((rng.choice([*COLOURS]), rng.choice(SHAPES)) for _ in range(1 + (rng.random() < two)))
        style, quality = rng.choice(STYLES), rng.choices(QUALITIES, (6, 2, 1, 1))[0]
        scene = Scene(objects, rng.choice([*GROUNDS]), fixed.get("style", style), fixed.get("quality", quality))
        if kept != held_out(scene):
            yield scene


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """The scene with positions and sizes drawn from `rng`."""
    picture = Image.new("RGB", (SIZE * FINE,) * 2, GROUNDS[scene.ground])
    pen = ImageDraw.Draw(picture)
    for number, (colour, shape) in enumerate(scene.objects):
        radius = rng.uniform(11, 13.5) if len(scene.objects) > 1 else rng.uniform(15, 20)
        centre = SIZE * (2 * number + 1) / (2 * len(scene.objects))
        slack = SIZE / (2 * len(scene.objects)) - radius - 2
        across, down = centre + rng.uniform(-slack, slack), SIZE / 2 + rng.uniform(-1, 1) * (SIZE / 2 - radius - 7)
        _draw_object(picture, pen, scene.style, COLOURS[colour], _corners(shape, across, down, radius))
    if scene.framed:
        inner = picture.resize(((SIZE - 2 * FRAME_WIDTH) * FINE,) * 2, Image.Resampling.BOX)
        picture.paste(FRAME, (0, 0, *picture.size))
        picture.paste(inner, (FRAME_WIDTH * FINE,) * 2)
    return _degrade(picture.resize((SIZE, SIZE), Image.Resampling.BOX), QUALITIES.index(scene.quality), rng)


def read(picture: Image.Image) -> Scene:
    """Objects and ground as the pixels show them; style and quality are not read."""
    pixels = np.asarray(picture.convert("RGB"), np.float32)
    rim = FRAME_WIDTH + 1 if framed(picture) else 0
    inner = pixels[rim : SIZE - rim, rim : SIZE - rim]
    border = np.concatenate([inner[:2].reshape(-1, 3), inner[-2:].reshape(-1, 3), inner[:, 0], inner[:, -1]])
    middle = np.median(border, axis=0)
    ground = min(GROUNDS, key=lambda name: float(np.square(middle - GROUNDS[name]).sum()))
    inked = np.abs(inner - middle).max(axis=2) > 40
    found = []
    for mask in _blobs(inked):
        if mask.sum() >= 80:
            columns = np.nonzero(mask)[1]
            ink = mask & inked & ndimage.binary_erosion(inked | ~mask)
            found.append((columns.mean(), _colour(inner[ink if ink.any() else mask & inked]), _shape(mask)))
    objects = tuple((colour, shape) for _, colour, shape in sorted(found))
    return Scene(objects, ground)


def framed(picture: Image.Image) -> bool:
    """Whether the picture hangs in the frame of the gallery style."""
    pixels = np.asarray(picture.convert("RGB"), np.float32)
    rim = np.concatenate([pixels[1:4].reshape(-1, 3), pixels[-4:-1].reshape(-1, 3), pixels[:, 1:4].reshape(-1, 3),
                          pixels[:, -4:-1].reshape(-1, 3)])  # fmt: skip
    return float((np.abs(rim - FRAME).max(axis=1) < 45).mean()) > 0.8


def _corners(shape: str, x: float, y: float, radius: float) -> np.ndarray:
    """A polygon around a centre, in fine pixels."""
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
    picture: Image.Image, pen: ImageDraw.ImageDraw, style: str, colour: tuple[int, int, int], corners: np.ndarray
) -> None:
    polygon = [tuple(point) for point in corners.tolist()]
    if style == "outline":
        pen.line([*polygon, *polygon[:2]], fill=colour, width=3 * FINE, joint="curve")
        return
    pen.polygon(polygon, fill=colour)
    if style == "striped":
        light = tuple((value + 255) // 2 for value in colour)
        mask = Image.new("1", picture.size)
        ImageDraw.Draw(mask).polygon(polygon, fill=1)
        stripes = Image.new("1", picture.size)
        lines = ImageDraw.Draw(stripes)
        for at in range(0, picture.size[1], 6 * FINE):
            lines.rectangle((0, at, picture.size[0], at + 2 * FINE), fill=1)
        both = Image.fromarray(np.asarray(mask) & np.asarray(stripes))
        picture.paste(light, mask=both)


def _degrade(picture: Image.Image, grade: int, rng: random.Random) -> Image.Image:
    """0 as it is; 1 to 3 more and more blurred, noisy and compressed."""
    if not grade:
        return picture
    picture = picture.filter(ImageFilter.GaussianBlur((0.5, 0.9, 1.4)[grade - 1]))
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, (5, 12, 22)[grade - 1], (SIZE, SIZE, 3))
    picture = Image.fromarray((np.asarray(picture) + noise).clip(0, 255).astype(np.uint8))
    stored = BytesIO()
    picture.save(stored, "JPEG", quality=(60, 30, 12)[grade - 1])
    return Image.open(stored).convert("RGB")


def _colour(pixels: np.ndarray) -> str:
    """The nearest by hue and brightness; stripes and soft edges lighten a colour, so half-tints count as well."""
    middle = np.median(pixels, axis=0)

    def distance(name: str) -> float:
        colour = np.array(COLOURS[name], np.float32)
        tints = [colour, colour * 0.75 + 64, colour / 2 + 127]
        return min(float(np.square(middle - tint).sum()) for tint in tints)

    return min(COLOURS, key=distance)


def _shape(mask: np.ndarray) -> str:
    """The one of which most lies over this one, both brought to one size."""
    own = _normal(mask)
    likeness = [(float((own & one).sum() / (own | one).sum()), shape) for shape in SHAPES for one in _templates(shape)]
    return max(likeness)[1]


@cache
def _templates(shape: str) -> list[np.ndarray]:
    """What the shape looks like to `read`, filled and as an outline, small and large."""
    found = []
    for style in ("flat", "outline"):
        for radius in (11, 12.5, 15, 17.5, 20):
            picture = Image.new("RGB", (SIZE * FINE,) * 2)
            pen = ImageDraw.Draw(picture)
            _draw_object(picture, pen, style, (255, 255, 255), _corners(shape, 32, 32, radius))
            small = np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BOX))[..., 0]
            found.append(_normal(max(_blobs(small > 60), key=np.sum)))
    return found


def _blobs(inked: np.ndarray) -> list[np.ndarray]:
    """Masks of what hangs together, with holes filled."""
    filled = ndimage.binary_fill_holes(ndimage.binary_closing(np.pad(inked, 2)))[2:-2, 2:-2]
    labels, count = ndimage.label(filled)
    return [labels == number for number in range(1, count + 1)]


def _normal(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.nonzero(mask)
    box = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    return np.asarray(Image.fromarray(box).resize((32, 32), Image.Resampling.NEAREST))
