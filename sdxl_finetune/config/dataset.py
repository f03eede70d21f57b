"""What a dataset is, and which folders of images make one.

A folder `N_words` in `train_data_dir` is used N times an epoch, and images in it that have no caption file
get the words (the reference's DreamBooth folders). Without such a folder the images directly in it are the
dataset, once an epoch (ours; the reference needs a metadata file for that). Folders are looked into only until
the first image is found: listing five million names is the index's work.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import Field

from sdxl_finetune.config.data_options import (
    AugmentationOptions,
    BucketOptions,
    CaptionOptions,
    HoldOutOptions,
    Interpolation,
)
from sdxl_finetune.config.fields import Resolution

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif")
"""Endings of image files, in any case of letters; .avif where Pillow reads it."""


class Subset(CaptionOptions, AugmentationOptions, HoldOutOptions):
    """A folder of images with the options that may differ from folder to folder."""

    image_dir: Path = Path()
    metadata_file: Path | None = None
    """Names, captions and tags of the images, in place of what lies in the folder."""
    num_repeats: int
    """Times that each image is used in an epoch."""
    class_tokens: str | None
    """Caption of images that have no caption file."""
    is_reg: bool = False
    """Regularisation images."""
    resize_interpolation: Interpolation | None = None


class Dataset(BucketOptions):
    """Subsets that are trained at one resolution and share batches."""

    resolution: Resolution
    """Pixels, (width, height)."""
    batch_size: int = Field(ge=1)
    """Images per process in one micro-batch."""
    subsets: tuple[Subset, ...]


@dataclass
class Folders:
    """What lies in a `train_data_dir`."""

    used: list[tuple[Path, int | None, str | None]] = field(default_factory=list)
    """Folder, repeats if its name says them, class tokens; ordered by name."""
    remarks: list[str] = field(default_factory=list)
    """What the user may not expect."""
    problem: str | None = None


def find_folders(root: Path) -> Folders:
    """Which folders of `root` are trained on."""
    if not root.is_dir():
        return Folders(problem="no such folder")
    found = Folders()
    with os.scandir(root) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir())
    other: list[str] = []
    empty: list[str] = []
    for name in names:
        number, _, words = name.partition("_")
        repeats = int(number) if number.strip().lstrip("+-").isdecimal() else 0
        if not holds_images(root / name):
            empty += [name] if repeats > 0 else []
        elif repeats > 0:
            found.used.append((root / name, repeats, words))
        else:
            other.append(name)
    loose = holds_images(root)
    if loose and not found.used:
        found.used.append((root, None, None))
    elif loose:
        found.remarks.append(f"images directly in {root} are not used, because it has folders N_words")
    if other:
        found.remarks.append(f"folders not used, because they are not named N_words (5_cat): {_listed(other)}")
    if empty:
        found.remarks.append(f"folders not used, because they hold no images: {_listed(empty)}")
    if not found.used:
        seen = f"folders {_listed(names)}" if names else "no folders"
        found.problem = (
            f"no images to train on: found {seen}, and no images beside them; expected images"
            f" ({' '.join(IMAGE_SUFFIXES)}), or folders of images named N_words for N repeats, as 5_cat"
        )
    return found


def holds_images(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.is_file() for entry in entries)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more
