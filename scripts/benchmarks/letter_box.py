"""sdxl-train with the crop conditioning of sd-scripts. scripts/benchmarks/proof.py compares it with the right one.

sd-scripts tells the model the letter-box offset of the whole image in its bucket, whichever crop was taken.
"""

from dataclasses import replace

from sdxl_finetune.batch import Position
from sdxl_finetune.cli import train
from sdxl_finetune.data.loader import TrainingDataset, View
from sdxl_finetune.latents.npz import noted_crop

right_view = TrainingDataset._view


def letter_box(view: View) -> tuple[int, int]:
    """Returns top and left of the crop in pixels, as sd-scripts computes them."""
    bucket = view.entry.bucket
    left, top, _, _ = noted_crop(view.entry.size, (bucket.width, bucket.height))
    return int(top), int(left)


def letter_box_view(dataset: TrainingDataset, position: Position, slot: int, row: int) -> View:
    view = right_view(dataset, position, slot, row)
    return replace(view, crop_top_left=letter_box(view))


if __name__ == "__main__":
    setattr(TrainingDataset, "_view", letter_box_view)  # noqa: B010 (this process does nothing else)
    train()
