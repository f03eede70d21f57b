"""Measures what caching costs: python -m scripts.benchmarks.data pipeline | stub | restart

pipeline: images/s of reading alone, of the VAE alone and of both as encode_images runs them, in turn, in one process
(target: the pipeline at 0.95 of the slower). On a CPU both would compete for the cores, so the VAE there is a clock: a
device that takes `--vae_ms` for an image, as a GPU does. stub: photographs of 6 megapixels with a VAE that does
nothing (target: 7.5 images/s; the reference 2.5 on the same two cores). restart: seconds to the first step with
10,000 cached images, beyond the imports (target: 2).
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from scripts.toy.photos import write_photos
from sdxl_finetune.batch import LatentSize
from sdxl_finetune.commands.model import main as model_tool
from sdxl_finetune.config import Dataset, Subset
from sdxl_finetune.data.index import Index, build_index
from sdxl_finetune.latents.encoding import Encoding, _read_ahead, encode_images
from sdxl_finetune.latents.keys import row_keys
from sdxl_finetune.latents.library import Library
from sdxl_finetune.latents.shards import Kind, ShardWriter
from sdxl_finetune.latents.store import find_places, missing_rows

SIZE = (3000, 2000)


def main() -> None:
    arguments = build_parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        {"pipeline": pipeline, "stub": stub, "restart": restart}[arguments.what](Path(folder), arguments)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("pipeline", "stub", "restart"))
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--vae_ms", type=float, help="of the clock; unset: as long as reading takes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    return parser


def photographs(folder: Path, count: int) -> None:
    """The photographs, enlarged to 6 megapixels with grain, each several times with another content."""
    sources = write_photos(folder / "sources")
    for number in range(count):
        pixels = cv2.resize(cv2.imread(str(sources[number % len(sources)])), SIZE, interpolation=cv2.INTER_CUBIC)
        grain = np.random.default_rng(number).integers(-9, 10, (*SIZE[::-1], 1))
        cv2.imwrite(str(folder / f"{number:04d}.jpg"), (pixels + grain).clip(0, 255).astype(np.uint8))


def build(folder: Path, arguments: argparse.Namespace) -> Index:
    photographs(folder, arguments.images)
    subset = Subset(image_dir=folder, num_repeats=1, class_tokens=None)
    dataset = Dataset(
        resolution=(arguments.resolution, arguments.resolution),
        batch_size=1,
        enable_bucket=True,
        min_bucket_reso=256,
        max_bucket_reso=2 * arguments.resolution,
        bucket_reso_steps=64,
        subsets=(subset,),
    )
    return build_index([dataset], folder / "cache", on_bad_image="stop")


class Clock:
    """A device that takes `seconds` for an image and lets the host go on meanwhile, as a GPU."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.busy_until = seconds, 0.0

    def __call__(self, pixels: torch.Tensor, noise: torch.Tensor) -> Callable[[], torch.Tensor]:
        done = self.busy_until = max(time.monotonic(), self.busy_until) + self.seconds * len(pixels)
        latents = torch.from_numpy(noise.numpy().astype(np.float16))  # the host's part is none, nor its threads

        def wait() -> torch.Tensor:
            time.sleep(max(0.0, done - time.monotonic()))
            return latents

        return wait


def job(index: Index, encode, arguments: argparse.Namespace) -> tuple[Encoding, np.ndarray]:
    keys, library = row_keys(index), Library([])
    rows = missing_rows(index, find_places(index, keys, library))
    settings = {"latent_size": LatentSize(), "batch_size": arguments.batch_size, "threads": arguments.threads}
    return Encoding(index=index, keys=keys, known=library, encode=encode, **settings), rows


def rate(images: Iterator, count: int) -> float:
    started = time.perf_counter()
    for _ in images:
        pass
    return count / (time.perf_counter() - started)


def encoded(index: Index, encode, folder: Path, arguments: argparse.Namespace) -> float:
    """Images/s of the whole way, from the files to shards on the disk."""
    work, rows = job(index, encode, arguments)
    started = time.perf_counter()
    with ShardWriter(folder / f"shards{time.monotonic_ns()}", Kind("latents", "vae"), 0, folder) as writer:
        rate(encode_images(work, rows, writer), len(rows))
    return len(rows) / (time.perf_counter() - started)


def vae_alone(encode, arguments: argparse.Namespace) -> float:
    pixels = torch.zeros((arguments.batch_size, 64, 64, 3), dtype=torch.uint8)
    noise = torch.zeros((arguments.batch_size, 4, 8, 8))
    batches = -(-arguments.images // arguments.batch_size)
    return rate((encode(pixels, noise)() for _ in range(batches)), batches * arguments.batch_size)


def pipeline(folder: Path, arguments: argparse.Namespace) -> float:
    """Prints the rates of each round, and returns the median ratio."""
    index = build(folder, arguments)
    rows_of_table: list[tuple[float, float, float, float]] = []
    print(f"{'decode alone':>14}{'VAE alone':>11}{'pipeline':>10}{'ratio':>8}   images/s")
    for _ in range(arguments.rounds):
        work, rows = job(index, Clock(0), arguments)
        reading = rate(_read_ahead(work, rows), len(rows))
        clock = Clock(arguments.vae_ms / 1000 if arguments.vae_ms else 1 / reading)
        vae, both = vae_alone(clock, arguments), encoded(index, clock, folder, arguments)
        work, rows = job(index, Clock(0), arguments)  # once more, because other programs may have slowed the first
        reading = (reading + rate(_read_ahead(work, rows), len(rows))) / 2
        rows_of_table.append((reading, vae, both, both / min(reading, vae)))
        print("{:14.2f}{:11.2f}{:10.2f}{:8.3f}".format(*rows_of_table[-1]), flush=True)
    medians = [statistics.median(column) for column in zip(*rows_of_table, strict=True)]
    print("{:14.2f}{:11.2f}{:10.2f}{:8.3f}   medians (target 0.95)".format(*medians))
    return medians[-1]


def stub(folder: Path, arguments: argparse.Namespace) -> None:
    index = build(folder, arguments)
    rates = [encoded(index, Clock(0), folder, arguments) for _ in range(arguments.rounds)]
    print(f"VAE stubbed out: median {statistics.median(rates):.1f} images/s of 6 megapixels (target 7.5): {rates}")


RESTART = """
import sys, time
from sdxl_finetune.config import load_config
from sdxl_finetune.training.loop import training_steps
from sdxl_finetune.training.setup import build_run
from sdxl_finetune.runtime.signals import StopRequest
started = time.perf_counter()
config = load_config(sys.argv[1:], program="sdxl-train")
with build_run(config) as run:
    built = time.perf_counter()
    next(training_steps(run.learner, run.batches(), StopRequest()))
    print(f"{built - started:.2f} s to build the run, {time.perf_counter() - started:.2f} s to the first step's end")
"""


def restart(folder: Path, arguments: argparse.Namespace) -> None:
    (folder / "images").mkdir()
    for number in range(10_000):
        color = tuple(int(value) for value in np.random.default_rng(number).integers(0, 256, 3))
        Image.new("RGB", (64, 64), color).save(folder / "images" / f"{number:05d}.png")
    model_tool(["init", str(folder / "model.safetensors")])
    options = [
        "--pretrained_model_name_or_path",
        str(folder / "model.safetensors"),
        "--output_dir",
        str(folder / "out"),
    ]
    options += ["--train_data_dir", str(folder / "images"), "--resolution", "64", "--cache_latents_to_disk"]
    options += ["--vae_batch_size", "16", "--max_train_steps", "3", "--max_data_loader_n_workers", "0"]
    for _ in range(1 + arguments.rounds):
        subprocess.run([sys.executable, "-c", RESTART, *options], check=True)


if __name__ == "__main__":
    main()
