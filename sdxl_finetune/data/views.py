"""A view: how one image is seen at one place of the run, drawn from seed, step, micro-batch and slot."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, UInt8

from sdxl_finetune.batch import Position
from sdxl_finetune.data.buckets import crop_left_top, mirrored_left
from sdxl_finetune.data.faces import draw_face_crop, face_in_name
from sdxl_finetune.data.images import jitter_color
from sdxl_finetune.data.index import Entry
from sdxl_finetune.data.masks import latent_mask, load_mask
from sdxl_finetune.seeding import position_random


@dataclass(frozen=True, kw_only=True)
class View:
    """How one image is seen this time. Sizes and offsets are in pixels."""

    entry: Entry
    mirrored: bool
    resized: tuple[int, int]
    """(width, height) before the crop."""
    left_top: tuple[int, int]
    """Pixels that are cut off at the left and top of the resized image, before it is mirrored."""
    crop_top_left: tuple[int, int]
    """Offset of the crop as the model is given it, in pixels of the resized image, mirrored if the image is."""
    place: tuple[int, int, int, int]
    """Seed, step, micro-batch and slot."""

    def load_pixels(self) -> UInt8[np.ndarray, "H W 3"]:
        """The pixels as they are trained. Raises ImageError."""
        pixels = self.entry.load(self.left_top, resized=self.resized)
        if self.entry.subset.color_aug:
            seed, *position = self.place
            pixels = jitter_color(pixels, position_random(seed, "color", *position))
        return pixels[:, ::-1] if self.mirrored else pixels

    def load_mask(self, pixels_per_latent: int) -> Float32[np.ndarray, "h w"] | None:
        """The mask of the latents, 0 to 1; None for an image without a mask. Raises ImageError."""
        if not self.entry.has_mask:
            return None
        mask = latent_mask(load_mask(self.entry, self.resized, self.left_top), pixels_per_latent)
        return mask[:, ::-1] if self.mirrored else mask


def draw_view(entry: Entry, seed: int, position: Position, slot: int) -> View:
    """Draws if an image is mirrored, and how it is resized and cropped."""
    place = seed, position.step, position.micro_batch, slot
    rng = position_random(seed, "view", *place[1:])
    subset = entry.subset
    mirrored = rng.random() < 0.5 and subset.flip_aug
    bucket = (entry.bucket.width, entry.bucket.height)
    face = face_in_name(entry.path.stem) if subset.face_crop_aug_range else None
    resized = entry.resized
    if subset.face_crop_aug_range and face:
        crop_range, anywhere = subset.face_crop_aug_range, subset.random_crop
        resized, (left, top) = draw_face_crop(entry.size, face, bucket, crop_range, rng, anywhere=anywhere)
    else:
        left, top = crop_left_top(resized, bucket, rng if subset.random_crop else None)
    seen_left = mirrored_left(left, resized[0], bucket[0]) if mirrored else left
    return View(
        entry=entry,
        mirrored=mirrored,
        resized=resized,
        left_top=(left, top),
        crop_top_left=(top, seen_left),
        place=place,
    )
