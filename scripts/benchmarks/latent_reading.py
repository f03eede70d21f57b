"""Measures how many batches of cached latents a machine reads, and how long it takes to open thousands of shards.

    python scripts/benchmarks/latent_reading.py --folder /somewhere/with/space

Batches hold 5 latents of 128x128 in random order, checksums are verified, and the page cache is warm. Two processes
read at once, as data-loader workers do. The same is measured with the shards in an object store on the loopback
(moto[server]) and warm local copies. At last the start with 5,000 shards is measured, with and without the catalogue,
and the requests of a start from the store are counted.
"""

import argparse
import os
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from sdxl_finetune.latents.catalogue import Shelf, local_shelf
from sdxl_finetune.latents.library import Library
from sdxl_finetune.latents.records import Records
from sdxl_finetune.latents.shards import Kind, ShardWriter
from sdxl_finetune.storage import Address, LocalCopies, Location, objects, write
from tests.s3_server import environment, running_server

KIND = Kind("latents", "benchmark")
LATENT, BATCH = (4, 128, 128), 5
SECONDS = 4.0
"""Seconds of each measurement."""


def main() -> None:
    """Prints all figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="folder for the shards; default: a temporary one")
    parser.add_argument("--latents", type=int, default=8000, help="latents to read from")
    parser.add_argument("--shards", type=int, default=5000, help="shards of the measured start")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for name, (wall, cores) in reading_rates(Path(folder), latents=arguments.latents).items():
            print(f"{name:40} {wall:8.0f} batches/s, {cores:8.0f} in each second of processor time of two cores")
        for name, text in start_times(Path(folder), shards=arguments.shards).items():
            print(f"{name:40} {text}")


def reading_rates(folder: Path, *, latents: int = 8000, processes: int = 2) -> dict[str, tuple[float, float]]:
    """Batches a second from the disk, and from a store on the loopback with warm local copies.

    The second number is what two idle cores would read: it counts the processor time of the readers alone.
    """
    shelf = local_shelf(KIND.folder(folder / "cache"), KIND)
    _make_latents(shelf.folder, latents)
    shards = shelf.open(check=True)
    rates = {"from the disk": _rate([shard.path for shard in shards], shards, None, processes)}
    with running_server() as server:
        os.environ.update(environment(server.port))
        objects.forget_stores()
        files: list[Location] = []
        for shard in shards:
            files.append(Address("s3://bucket/latents") / shard.path.name)
            assert isinstance(shard.path, Path)
            write(files[-1], shard.path)
        copies = LocalCopies(folder / "copies", 1 << 40)
        for file in files:
            assert isinstance(file, Address) and copies.find(file)
        rates["from a store, with warm local copies"] = _rate(files, shards, copies, processes)
    return rates


def start_times(folder: Path, *, shards: int = 5000) -> dict[str, str]:
    """Seconds to open many shards, on the disk and in a store, and the requests that the store receives."""
    shelf = local_shelf(KIND.folder(folder / "many"), KIND)
    assert isinstance(shelf.folder, Path)
    latent, rng = np.zeros((4, 8, 8), np.float16), np.random.default_rng(0)
    with ShardWriter(shelf.folder, KIND, 0, folder) as writer:
        for _ in range(50):
            writer.add(rng.bytes(16), latent)
            writer.add_file(rng.bytes(16), rng.bytes(16))
    assert isinstance(writer.shards[0].path, Path)
    for number in range(1, shards):
        shutil.copy(writer.shards[0].path, shelf.folder / f"{number:020d}-00000-00000000{KIND.ending}")
    times = {"start, disk, no catalogue": _seconds(shelf), "start, disk, with catalogue": _seconds(shelf)}
    with running_server() as server:
        os.environ.update(environment(server.port))
        objects.forget_stores()
        for path in shelf.folder.glob(f"*{KIND.ending}"):
            write(Address("s3://bucket/many") / path.name, path)
        remote = Shelf(Address("s3://bucket/many"), KIND, folder / "remote.catalogue")
        for name in ("no catalogue", "with catalogue"):
            server.clear()
            times[f"start, store, {name}"] = f"{_seconds(remote)}, {server.requests.total()} requests"
    return times


def _seconds(shelf: Shelf) -> str:
    began = time.perf_counter()
    shelf.open(check=True)
    return f"{time.perf_counter() - began:.2f} s"


def _make_latents(folder: Location, count: int) -> None:
    rng = np.random.default_rng(0)
    latent = rng.standard_normal(LATENT, np.float32).astype(np.float16)
    with ShardWriter(folder, KIND, 0, Path()) as writer:
        for _ in range(count):
            writer.add(rng.bytes(16), latent)


def _rate(files: list, shards: list, copies: LocalCopies | None, processes: int) -> tuple[float, float]:
    """Batches a second that all processes read together, and 2 x batches in a second of their processor time."""
    library = Library(shards)
    keys = np.concatenate([shard.keys for shard in shards])
    places = library.places(keys)
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        list(pool.map(_read, [(files, places, copies, seed, 1.0) for seed in range(processes)]))
        work = [(files, places, copies, seed, SECONDS) for seed in range(processes)]
        rates = list(pool.map(_read, work))
        return sum(wall for wall, _ in rates), 2 * sum(cpu for _, cpu in rates) / len(rates)


def _read(work: tuple) -> tuple[float, float]:
    """Reads random batches for some seconds. Returns batches in a second, and in a second of processor time."""
    files, places, copies, seed, seconds = work
    records, rng = Records(tuple(files), copies), np.random.default_rng(seed)
    began, busy, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() < began + seconds:
        batch = np.empty((BATCH, *LATENT), np.float16)
        for latent, row in zip(batch, rng.integers(0, len(places), BATCH), strict=True):
            number, crc, start = places[row].tolist()
            records.read(number, start, crc, latent, lambda: "a latent")
        count += 1
    return count / (time.perf_counter() - began), count / (time.process_time() - busy)


if __name__ == "__main__":
    main()
