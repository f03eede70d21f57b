"""What scripts/benchmarks/proof.py compares with: sdxl-train, but told crops as the reference tells them.

That is the letter-box offset of the whole image in its bucket, whatever part of it was cut out.
"""

from sdxl_finetune.cli import train
from sdxl_finetune.data.loader import View
from sdxl_finetune.latents.npz import noted_crop


def letter_box(view: View) -> tuple[int, int]:
    bucket = view.entry.bucket
    left, top, _, _ = noted_crop(view.entry.size, (bucket.width, bucket.height))
    return int(top), int(left)


if __name__ == "__main__":
    setattr(View, "crop_top_left", property(letter_box))  # noqa: B010 (a class of ours, in a process of its own)
    train()
