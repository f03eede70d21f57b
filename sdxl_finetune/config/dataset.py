"""Datasets: which folders of images are trained on, how often, and with which options.

A folder `N_words` in `train_data_dir` is used N times an epoch, and images in it that have no caption file
get the words (the reference's DreamBooth folders). Without such a folder the images directly in it are the
dataset, once an epoch (ours; the reference needs a metadata file for that). Folders are looked into only until
the first image is found: listing five million names is the index's work.
"""

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

from sdxl_finetune.config.data_options import (
    AugmentationOptions,
    BucketOptions,
    CaptionOptions,
    Interpolation,
)
from sdxl_finetune.config.fields import Resolution
from sdxl_finetune.config.options import Config
from sdxl_finetune.problems import Problem, UserError

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""Endings of image files, in any case of letters."""


class Subset(CaptionOptions, AugmentationOptions):
    """A folder of images with the options that may differ from folder to folder."""

    image_dir: Path
    num_repeats: int
    """Times that each image is used in an epoch, at least 1."""
    class_tokens: str | None
    """Caption of images that have no caption file."""
    is_reg: bool = False
    """Regularisation images."""


class Dataset(BucketOptions):
    """Subsets that are trained at one resolution and share batches."""

    resolution: Resolution
    """Pixels, (width, height)."""
    batch_size: int
    """Images per process in one micro-batch."""
    resize_interpolation: Interpolation | None
    subsets: tuple[Subset, ...]


@dataclass
class Folders:
    """What lies in a `train_data_dir`."""

    used: list[tuple[Path, int, str | None]] = field(default_factory=list)
    """Folder, repeats, class tokens; ordered by name."""
    remarks: list[str] = field(default_factory=list)
    """What the user may not expect."""
    problem: str | None = None


def load_datasets(config: Config) -> tuple[Dataset, ...]:
    """The datasets of a config, as the folders on the disk are now.

    Raises UserError when there is nothing to train on; says which folders are not used.
    """
    assert config.train_data_dir is not None and config.resolution is not None
    folders = find_folders(config.train_data_dir)
    for remark in folders.remarks:
        logger.warning("%s", remark)
    if folders.problem:
        raise UserError(Problem(folders.problem, "train_data_dir", str(config.train_data_dir)))
    shared = {name: getattr(config, name) for name in Subset.model_fields if name in Config.model_fields}
    buckets = {name: getattr(config, name) for name in BucketOptions.model_fields}
    dataset = Dataset(
        **buckets,
        resolution=config.resolution,
        batch_size=config.train_batch_size,
        resize_interpolation=config.resize_interpolation,
        subsets=tuple(
            Subset(**shared, image_dir=path, num_repeats=repeats, class_tokens=words)
            for path, repeats, words in folders.used
        ),
    )
    return (dataset,)


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
        found.used.append((root, 1, None))
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
