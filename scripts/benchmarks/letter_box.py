"""sdxl-train with the crop conditioning of sd-scripts. scripts/benchmarks/proof.py compares it with the right one.

sd-scripts tells the model the letter-box offset of the whole image in its bucket, whichever crop was taken.
"""

from sdxl_finetune.cli import train
from sdxl_finetune.data.loader import View
from sdxl_finetune.latents.npz import noted_crop


def letter_box(view: View) -> tuple[int, int]:
    """Returns top and left of the crop in pixels, as sd-scripts computes them."""
    bucket = view.entry.bucket
    left, top, _, _ = noted_crop(view.entry.size, (bucket.width, bucket.height))
    return int(top), int(left)


if __name__ == "__main__":
    setattr(View, "crop_top_left", property(letter_box))  # noqa: B010 (this process does nothing else)
    train()
