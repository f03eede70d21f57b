"""Folders of generated images, and the datasets over them."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from sdxl_finetune.config import Dataset, Subset


@pytest.fixture
def subset() -> Callable[..., Subset]:
    def build(folder: Path, **options: object) -> Subset:
        return Subset(image_dir=folder, **{"num_repeats": 1, "class_tokens": None, **options})

    return build


@pytest.fixture
def dataset() -> Callable[..., Dataset]:
    def build(*subsets: Subset, **options: object) -> Dataset:
        defaults = {
            "resolution": (64, 64),
            "batch_size": 4,
            "enable_bucket": True,
            "min_bucket_reso": 32,
            "max_bucket_reso": 128,
            "bucket_reso_steps": 32,
            "resize_interpolation": None,
        }
        return Dataset(**{**defaults, **options}, subsets=subsets)

    return build


@pytest.fixture
def write_images() -> Callable[[Path, dict[str, tuple[int, int]]], None]:
    """write_images(folder, {name: (width, height)}): smooth colourful pictures, each its own."""

    def write(folder: Path, sizes: dict[str, tuple[int, int]]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for number, (name, size) in enumerate(sizes.items()):
            small = np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8)
            Image.fromarray(cv2.resize(small, size, interpolation=cv2.INTER_CUBIC)).save(folder / name)

    return write
