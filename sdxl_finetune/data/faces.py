"""Crops around faces (face_crop_aug_range), for images whose file name gives the place of a face.

    name_X_Y_W_H.png     centre (X, Y), width W and height H of the face, in pixels of the image

The size of the crop and its place around the face are drawn at random as in the reference (`crop_target` of
library/train_util.py). The reference does so only without aspect-ratio buckets. Here the crop has the size of the
image's bucket.
"""

import random
import re
from dataclasses import dataclass

FACE_NAME = re.compile(r"(.+)_(\d+)_(\d+)_(\d+)_(\d+)")
"""File name of a face cutout, without its ending: the name of the original image and four numbers."""
SMALLEST_MOVED = 40
"""Pixels: smaller faces always stand in the middle of the crop."""


@dataclass(frozen=True)
class Face:
    """A face in an image, in pixels."""

    center: tuple[int, int]
    """(x, y) from the left and top."""
    size: int
    """The longer side."""


def face_in_name(stem: str) -> Face | None:
    """The face that a file name without its ending gives. A centre or size of 0 means that there is none."""
    match = FACE_NAME.fullmatch(stem)
    if match is None:
        return None
    x, y, width, height = (int(number) for number in match.groups()[1:])
    return Face((x, y), max(width, height)) if x and max(width, height) else None


def draw_face_crop(
    size: tuple[int, int],
    face: Face,
    bucket: tuple[int, int],
    crop_range: tuple[float, float],
    rng: random.Random,
    *,
    anywhere: bool,
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Draws the resized size of an image of this `size`, and the left and top of a crop around the face.

    The short side of the crop is `crop_range` times the face, if the image is large enough. The image is enlarged only
    if it does not cover the bucket otherwise. Faces stand near the middle of the crop. With `anywhere` (random_crop)
    they may stand further from it.
    """
    covering = max(side / own for side, own in zip(bucket, size, strict=True))
    short = min(bucket)
    lowest = max(covering, min(1.0, short / (face.size * crop_range[1])))
    highest = max(lowest, min(1.0, short / (face.size * crop_range[0])))
    scale = lowest if lowest == highest else rng.uniform(lowest, highest)
    width, height = (max(side, int(own * scale + 0.5)) for side, own in zip(bucket, size, strict=True))
    moves = crop_range[0] != crop_range[1] and face.size > short // 10 and face.size >= SMALLEST_MOVED
    offsets = []
    for length, side, center in ((height, bucket[1], face.center[1]), (width, bucket[0], face.center[0])):
        middle = int(center * scale + 0.5)
        start = middle - side // 2
        if anywhere:
            reach = max(length - middle, middle)
            start += rng.randint(0, reach) + rng.randint(0, reach) - reach
        elif moves:
            start += rng.randint(-face.size // 20, face.size // 20)
        offsets.append(max(0, min(start, length - side)))
    return (width, height), (offsets[1], offsets[0])
