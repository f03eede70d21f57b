"""Measures how long it takes to list images from tar files and Parquet metadata, and how the time grows.

    python -m scripts.benchmarks.sources [--members 10000 100000] [--rows 100000 1000000] [--folder FOLDER]

`--members` are small JPEGs with captions in local tar files of PER_TAR images. They are listed twice: the first time
the headers of all members are read, the second time the list that was kept. `--rows` are rows of a Parquet file with
captions, scores and sizes, and lines of a JSON Lines file. The last column is the growth from the smallest to the
largest size.
"""

import argparse
import io
import json
import tarfile
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet

from sdxl_finetune.config import Subset
from sdxl_finetune.data.listing import list_all

PER_TAR = 5000
"""Images of one tar file."""
PICTURES = 100
"""Different images."""
CAPTION = "best quality, style %d, one object, number %d, " + ", ".join(f"a tag of the image {n}" for n in range(8))
"""Caption of an image, about 200 characters."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--members", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--rows", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--folder", type=Path, help="where to make files; default: a temporary folder")
    arguments = parser.parse_args()
    figures: dict[str, dict[int, float]] = {}
    for size in arguments.members:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            subset = make_tars(Path(folder), size)
            for name in ("tar files, first listing", "tar files, again"):
                figures.setdefault(name, {})[size] = seconds(subset, Path(folder), size)
    for size in arguments.rows:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            for name, make in {"Parquet": make_parquet, "JSON Lines": make_lines}.items():
                subset = make(Path(folder), size)
                figures.setdefault(name, {})[size] = seconds(subset, Path(folder), size)
    print("| source | images | seconds | images/s | growth |")
    print("|---|---|---|---|---|")
    for name, by_size in figures.items():
        for size, took in by_size.items():
            growth = took / by_size[min(by_size)]
            print(f"| {name} | {size:,} | {took:.2f} | {size / took:,.0f} | {growth:.1f} |")


def seconds(subset: Subset, folder: Path, size: int) -> float:
    """Seconds that a listing of this number of images takes."""
    began = time.monotonic()
    (found,) = list_all([subset], folder / "cache")
    took = time.monotonic() - began
    assert found.table.num_rows == size and not found.problems
    return took


def make_tars(folder: Path, size: int) -> Subset:
    rng = np.random.default_rng(0)
    pictures = [cv2.imencode(".jpg", rng.integers(0, 256, (64, 80, 3), np.uint8))[1].tobytes() for _ in range(PICTURES)]
    for start in range(0, size, PER_TAR):
        with tarfile.open(folder / f"data-{start // PER_TAR:04}.tar", "w") as tar:
            for number in range(start, min(start + PER_TAR, size)):
                caption = (CAPTION % (number % 2000, number)).encode()
                for ending, data in (("jpg", pictures[number % PICTURES]), ("txt", caption)):
                    member = tarfile.TarInfo(f"{number:08}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return Subset(image_dir=folder, num_repeats=1, class_tokens=None)


def make_parquet(folder: Path, size: int) -> Subset:
    numbers = np.arange(size)
    columns = {
        "file_name": [f"{number % 1000:03}/{number:08}.jpg" for number in range(size)],
        "caption": [CAPTION % (number % 2000, number) for number in range(size)],
        "score": numbers / size,
        "width": 896 + 64 * (numbers % 8),
        "height": 1152 - 64 * (numbers % 8),
    }
    pa.parquet.write_table(pa.table(columns), folder / "meta.parquet", row_group_size=100_000)
    return Subset(image_dir=folder, metadata_file=folder / "meta.parquet", num_repeats=1, class_tokens=None)


def make_lines(folder: Path, size: int) -> Subset:
    with (folder / "meta.jsonl").open("w") as file:
        for number in range(size):
            name, caption = f"{number % 1000:03}/{number:08}.jpg", CAPTION % (number % 2000, number)
            file.write(json.dumps({"image_path": name, "caption": caption, "image_size": [896, 1152]}) + "\n")
    return Subset(image_dir=folder, metadata_file=folder / "meta.jsonl", num_repeats=1, class_tokens=None)


if __name__ == "__main__":
    main()
