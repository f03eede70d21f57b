"""sdxl-train with the crop conditioning of sd-scripts. scripts/benchmarks/proof.py compares it with the right one.

sd-scripts tells the model the letter-box offset of the whole image in its bucket, whichever crop was taken.
"""

from dataclasses import replace

from sdxl_finetune.batch import Position
from sdxl_finetune.cli import train
from sdxl_finetune.data import loader
from sdxl_finetune.data.index import Entry
from sdxl_finetune.data.views import View, draw_view
from sdxl_finetune.latents.npz import noted_crop


def letter_box(entry: Entry) -> tuple[int, int]:
    """Returns top and left of the whole image in its bucket in pixels, as sd-scripts computes them."""
    left, top, _, _ = noted_crop(entry.size, (entry.bucket.width, entry.bucket.height))
    return int(top), int(left)


def letter_box_view(entry: Entry, seed: int, position: Position, slot: int) -> View:
    view = draw_view(entry, seed, position, slot)
    return replace(view, crop_top_left=letter_box(view.entry))


if __name__ == "__main__":
    loader.draw_view = letter_box_view  # this process does nothing else
    train()
