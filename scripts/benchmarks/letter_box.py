"""What scripts/benchmarks/proof.py compares with: sdxl-train, but told crops as the reference tells them.

That is the letter-box offset of the whole image in its bucket, whatever part of it was cut out.
"""

from dataclasses import replace

from sdxl_finetune.batch import Position
from sdxl_finetune.cli import train
from sdxl_finetune.data.loader import TrainingDataset, View
from sdxl_finetune.latents.npz import noted_crop

real_view = TrainingDataset._view


def letter_box_view(dataset: TrainingDataset, position: Position, slot: int, row: int) -> View:
    view = real_view(dataset, position, slot, row)
    bucket = view.entry.bucket
    left, top, _, _ = noted_crop(view.entry.size, (bucket.width, bucket.height))
    return replace(view, crop_top_left=(int(top), int(left)))


if __name__ == "__main__":
    setattr(TrainingDataset, "_view", letter_box_view)  # noqa: B010 (a class of ours, in a process of its own)
    train()
