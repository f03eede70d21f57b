"""Measures how starting a run grows with the number of images.

    python -m scripts.benchmarks.scan [--folder FOLDER] [--sizes 100000 1000000]

For each size the script makes a folder of images: hard links to 64 small JPEGs, each with a caption file. It also makes
shards that hold a latent of each image. Then it measures how long the start of a run takes, up to its first batch plan.
It measures the first scan, a warm restart that checks every file, and one with skip_cache_check. Each is a new process,
and imports are not counted. The last column is the growth from the smallest to the largest size.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from sdxl_finetune.config import Dataset, Subset
from sdxl_finetune.data.batch_plan import build_plan
from sdxl_finetune.data.index import Index, build_index
from sdxl_finetune.latents.keys import row_keys
from sdxl_finetune.latents.shards import Library, ShardWriter, open_shards
from sdxl_finetune.latents.store import find_places, missing_rows

VAE = "benchmark"
PICTURES = 64
LATENT_SHAPE = (4, 4, 4)
"""Latents are small, because the benchmark measures finding them and not reading them."""
ROWS = {
    "first scan": "seconds of the first scan, index and plan",
    "checked": "seconds of a warm restart that checks every file",
    "unchecked": "seconds of a warm restart with skip_cache_check",
    "memory": "private memory of the main process beyond imports, warm restart, MB",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to make the images; default: a temporary folder")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--start", choices=("first scan", "checked", "unchecked"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start:
        print(json.dumps(start(arguments.folder, skip_check=arguments.start == "unchecked")))
        return
    figures = {size: measure(arguments.folder, size) for size in arguments.sizes}
    print_table(figures)


def measure(parent: Path | None, size: int) -> dict[str, float]:
    """The figures of ROWS for a folder of so many images, which is removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="scan-", dir=parent))
    try:
        make_images(folder, size)
        first = started(folder, "first scan")
        make_shards(folder)
        checked, unchecked = started(folder, "checked"), started(folder, "unchecked")
    finally:
        shutil.rmtree(folder)
    figures = {"first scan": first["seconds"], "checked": checked["seconds"], "unchecked": unchecked["seconds"]}
    return figures | {"memory": checked["bytes"] / 1e6}


def make_images(folder: Path, size: int) -> None:
    """Hard links to PICTURES small JPEGs, each with a caption file of its own."""
    (folder / "originals").mkdir(parents=True)
    (folder / "images").mkdir()
    for number in range(PICTURES):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
        cv2.imwrite(str(folder / "originals" / f"{number}.jpg"), cv2.resize(pixels, (96, 64 + number % 4 * 32)))
    for number in range(size):
        os.link(folder / "originals" / f"{number % PICTURES}.jpg", folder / "images" / f"{number:07d}.jpg")
        text = f"best quality, style {number % 2000}, one object, number {number}"
        (folder / "images" / f"{number:07d}.txt").write_text(text)


def make_shards(folder: Path) -> None:
    """Shards that hold a latent for each image of the index."""
    index = open_index(folder, skip_check=True)
    keys = row_keys(index)
    contents = np.random.default_rng(0).integers(0, 256, (len(index), 16), np.uint8)
    latent_keys = keys.keys(np.arange(len(index)), contents, False)
    latent = np.zeros(LATENT_SHAPE, np.float16)
    with ShardWriter(folder / "latents", VAE, 0, folder) as writer:
        for stat_hash, content, key in zip(keys.stat_hashes, contents, latent_keys, strict=True):
            writer.add(stat_hash.tobytes(), content.tobytes(), [(key.tobytes(), latent)])


def started(folder: Path, how: str) -> dict[str, float]:
    """Calls `start` in a new process and returns its figures."""
    command = [sys.executable, "-m", "scripts.benchmarks.scan", "--folder", str(folder), "--start", how]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    print(f"{folder.name}: {how}: {output.strip()}", file=sys.stderr, flush=True)
    return json.loads(output.splitlines()[-1])


def start(folder: Path, *, skip_check: bool) -> dict[str, float]:
    """Does what a run does before its first batch: index, places of all latents, and the order of the first epoch."""
    before, began = private_bytes(), time.perf_counter()
    index = open_index(folder, skip_check=skip_check)
    shards = open_shards(folder / "latents", VAE, check=True)
    missing = len(missing_rows(index, find_places(index, row_keys(index), Library(shards))))
    assert missing == (0 if shards else len(index))
    build_plan(index, ranks=1, accumulation=1, seed=0).epoch(0)
    return {"seconds": round(time.perf_counter() - began, 2), "bytes": private_bytes() - before}


def open_index(folder: Path, *, skip_check: bool) -> Index:
    subset = Subset(image_dir=folder / "images", num_repeats=1, class_tokens=None, caption_extension=".txt")
    buckets = {"enable_bucket": True, "min_bucket_reso": 64, "max_bucket_reso": 256, "bucket_reso_steps": 32}
    dataset = Dataset(resolution=(96, 96), batch_size=5, subsets=(subset,), **buckets)
    return build_index([dataset], folder / "cache", "stop", skip_check=skip_check)


def private_bytes() -> int:
    """Memory that this process shares with no other and that no file backs."""
    with Path("/proc/self/smaps_rollup").open() as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("Anonymous:"))


def print_table(figures: dict[int, dict[str, float]]) -> None:
    sizes = sorted(figures)
    lines = [["", *(f"{size:,} images" for size in sizes), f"growth ({sizes[-1] / sizes[0]:.0f} times the images)"]]
    for key, words in ROWS.items():
        values = [figures[size][key] for size in sizes]
        lines.append([words, *(f"{value:.1f}" for value in values), f"{values[-1] / max(values[0], 1e-9):.1f}"])
    for line in with_separator(lines):
        print("| " + " | ".join(line) + " |")


def with_separator(lines: Sequence[list[str]]) -> list[list[str]]:
    return [lines[0], ["---", *["--:"] * (len(lines[0]) - 1)], *lines[1:]]


if __name__ == "__main__":
    main()
