"""Measures how the start of a run grows with the number of images.

    python -m scripts.benchmarks.scale [--rows 100000 5000000] [--files 100000 1000000] [--no_rates] [--folder FOLDER]

`--rows` are synthetic: an index of images that do not exist, and shards of sparse files with real tables. They measure
a start with skip_cache_check up to the first batch, which two data-loader workers make. `--files` are real: hard links
to small JPEGs, with caption files. They measure the first scan, a start that checks every file, and sdxl-check with
configs/style.toml and the header of a full-size checkpoint.

Each measurement is a new process. Imports are not counted: the figures of a start with FEW images are taken off, in
which the workers import the same modules. The last column is the growth from the smallest to the largest size. The
last table has the rates of reading latents, of the caching pipeline and of making tokens, from the other scripts.
"""

import argparse
import contextlib
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import psutil
import pyarrow as pa
import torch

from scripts.benchmarks import captions, data, latent_reading
from scripts.benchmarks.checkpoint_memory import full_size_sources
from sdxl_finetune.batch import Position
from sdxl_finetune.config import Dataset, Subset
from sdxl_finetune.data import scan as scan_module
from sdxl_finetune.data.batch_plan import build_plan
from sdxl_finetune.data.index import Index, build_index
from sdxl_finetune.data.loader import TrainingDataset, load_batches
from sdxl_finetune.data.tables import write_table
from sdxl_finetune.data.tokens import Tokenizer
from sdxl_finetune.latents.catalogue import local_shelf
from sdxl_finetune.latents.keys import row_keys
from sdxl_finetune.latents.library import Library
from sdxl_finetune.latents.shards import TABLES, Kind
from sdxl_finetune.latents.store import build_store, find_places, missing_rows

FEW = 100
"""Images of a start that consists of imports alone."""
PICTURES = 100
"""Different images, each of which has many hard links. ext4 allows 65,000 links to a file."""
KIND = Kind("latents", "benchmark")
SIDES = (1152, 896)
"""Sides of the synthetic images in pixels, half of them upright."""
LATENT = (4, 112, 144)
"""Shape of their latents. Those of upright images take as many bytes."""
PER_SHARD = 1040
"""Latents in a shard of 128 MiB."""
CAPTION = "best quality, style %d, one object, number %d, " + ", ".join(f"a tag of the image {n}" for n in range(8))
"""Caption of a synthetic image, about 200 characters."""
LINES = {
    "unchecked": ("rows", "start to first batch, nothing checked, seconds", "seconds"),
    "main": ("rows", "memory of the main process beyond imports, MB", "main"),
    "worker": ("rows", "memory of a data-loader worker beyond imports, MB", "worker"),
    "first": ("files", "first scan, images/s", "rate"),
    "checked": ("files", "start with every file checked, images/s", "rate"),
    "check": ("files", "sdxl-check with every file checked, seconds", "seconds"),
    "check_unchecked": ("files", "sdxl-check with skip_cache_check, seconds", "seconds"),
}
"""Lines of the table: which sizes it has, its title and the figure."""
RATES = {
    "reading": {
        "from the disk": "batches of 5 latents of 128x128 a second, two workers, page cache warm, checksums verified",
        "from a store, with warm local copies": "the same from an object store on the loopback with warm local copies",
    },
    "pipeline": {"ratio": "caching pipeline, as a share of the slower of reading and encoding alone"},
    "tokens": {"milliseconds": "milliseconds from the texts of an image to its tokens, all options on"},
}
"""Lines of the last table, by step and figure."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="*", default=[100_000, 1_000_000, 5_000_000])
    parser.add_argument("--files", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--folder", type=Path, help="where to make files; default: a temporary folder")
    parser.add_argument("--no_rates", action="store_true", help="leave out the last table")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(STEPS[arguments.step](arguments.folder)))
        return
    figures: dict[str, dict[int, dict[str, float]]] = {}
    if arguments.rows:
        imports = measure(arguments.folder, FEW, make_rows, ["unchecked"])["unchecked"]
    for size in arguments.rows:
        found = measure(arguments.folder, size, make_rows, ["unchecked"])["unchecked"]
        net = {name: found[name] - imports[name] for name in ("seconds", "main", "worker")}
        figures.setdefault("rows", {})[size] = {"unchecked": net}
    for size in arguments.files:
        steps = ["first", "checked", "check_first", "check", "check_unchecked"]
        figures.setdefault("files", {})[size] = measure(arguments.folder, size, make_files, steps)
    print_table(figures)
    if not arguments.no_rates:
        rates = measure(arguments.folder, 0, lambda _folder, _size: None, list(RATES))
        lines = [(title, f"{rates[step][figure]:,.4g}") for step, own in RATES.items() for figure, title in own.items()]
        print("\n".join(f"| {title} | {value} |" for title, value in [("", "measured"), ("---", "--:"), *lines]))


def measure(
    parent: Path | None, size: int, make: Callable[[Path, int], None], steps: Sequence[str]
) -> dict[str, dict[str, float]]:
    """The figures of some steps for a dataset of this size, which is removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="scale-", dir=parent))
    try:
        make(folder, size)
        return {step: run(folder, step) for step in steps}
    finally:
        shutil.rmtree(folder)


def run(folder: Path, step: str) -> dict[str, float]:
    """Runs a step in a new process and returns its figures."""
    command = [sys.executable, "-m", "scripts.benchmarks.scale", "--folder", str(folder), "--step", step]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    print(f"{folder.name}: {step}: {output.strip()}", file=sys.stderr, flush=True)
    return json.loads(output.splitlines()[-1])


def make_rows(folder: Path, size: int) -> None:
    """Writes the scan of images that do not exist, and shards that hold a latent of each."""
    numbers = np.arange(size)
    texts = pa.array([CAPTION % (number % 2000, number) for number in range(size)], pa.large_string())
    sides = np.where(numbers[:, None] % 2 == np.arange(2), *SIDES)
    hashes = np.random.default_rng(0).integers(0, 256, (size, 16), np.uint8)
    columns = {
        "subset": np.zeros(size, np.int32),
        "name": pa.array([b"%08d.jpg" % number for number in range(size)], pa.large_binary()),
        "captions": pa.LargeListArray.from_arrays(np.arange(size + 1), texts),
        "width": sides[:, 0],
        "height": sides[:, 1],
        "bytes": numbers % 1000 + 100_000,
        "mtime": numbers,
        "caption_stat": numbers,
        "stat_hash": pa.Array.from_buffers(pa.binary(16), size, [None, pa.py_buffer(hashes.tobytes())]),
        "train_width": np.zeros(size, np.int32),
        "train_height": np.zeros(size, np.int32),
        "score": np.full(size, np.nan, np.float32),
        "offset": np.full(size, -1),
    }
    schema = scan_module.SCANNED
    table = pa.table([pa.array(columns[name]).cast(schema.field(name).type) for name in schema.names], schema=schema)
    table = table.replace_schema_metadata({"digest": scan_module.digest_of(table)})
    write_table(folder / "cache" / "scans" / f"{scan_module._key([subset(folder)])}.scan", table)
    make_shards(folder, hashes)


def make_shards(folder: Path, stat_hashes: np.ndarray) -> None:
    """Writes a shard for each PER_SHARD images. The latents are zeros, which sparse files hold without space."""
    index = open_index(folder, skip_check=True)
    contents = np.random.default_rng(1).integers(0, 256, (len(index), 16), np.uint8)
    keys = row_keys(index).keys(np.arange(len(index)), contents, False)
    latents = KIND.folder(folder / "cache")
    latents.mkdir(parents=True)
    size = 2 * int(np.prod(LATENT))
    for number, start in enumerate(range(0, len(index), PER_SHARD)):
        part = slice(start, start + PER_SHARD)
        count = len(keys[part])
        crcs = np.full(count, zlib.crc32(bytes(size)), np.uint32)
        tables = dict(zip(TABLES, (keys[part], crcs, stat_hashes[part], contents[part]), strict=True))
        content = b"".join(table.tobytes() for table in tables.values())
        about = {"format": KIND.format, "encoder": KIND.encoder, "tables": f"{zlib.crc32(content):08x}"}
        header, end = {"__metadata__": about}, 0
        for name, table in tables.items():
            dtype = {"uint8": "U8", "uint32": "U32"}[str(table.dtype)]
            header[name] = {"dtype": dtype, "shape": table.shape, "data_offsets": [end, end := end + table.nbytes]}
        header["latents"] = {"dtype": "F16", "shape": (count, *LATENT), "data_offsets": [end, end + count * size]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (latents / f"{number:020d}-00000-{number:08x}.latents").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text + content)
            file.truncate(8 + len(text) + end + count * size)
    shelf = local_shelf(latents, KIND)
    shelf.remember(shelf.open(check=False))


def make_files(folder: Path, size: int) -> None:
    """Makes hard links to PICTURES small JPEGs and caption files."""
    originals, images = folder / "originals", folder / "images"
    originals.mkdir()
    images.mkdir()
    for number in range(PICTURES):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
        cv2.imwrite(str(originals / f"{number}.jpg"), cv2.resize(pixels, (1024, 1024 + number % 4 * 64)))
        (originals / f"{number}.txt").write_text(CAPTION % (number, number))
    for number in range(size):
        for ending in (".jpg", ".txt"):
            os.link(originals / f"{number % PICTURES}{ending}", images / f"{number:08d}{ending}")


def subset(folder: Path) -> Subset:
    return Subset(image_dir=folder / "images", num_repeats=1, class_tokens=None, caption_extension=".txt")


def open_index(folder: Path, *, skip_check: bool) -> Index:
    buckets = {"enable_bucket": True, "min_bucket_reso": 512, "max_bucket_reso": 2048, "bucket_reso_steps": 64}
    dataset = Dataset(resolution=(1024, 1024), batch_size=5, subsets=(subset(folder),), **buckets)
    return build_index([dataset], folder / "cache", "stop", skip_check=skip_check)


def scan_all(folder: Path) -> dict[str, float]:
    """Builds the index and the order of the first epoch, and checks every file."""
    began = time.perf_counter()
    index = open_index(folder, skip_check=False)
    build_plan(index, ranks=1, accumulation=1, seed=0).epoch(0)
    seconds = time.perf_counter() - began
    return {"seconds": round(seconds, 2), "rate": round(len(index) / seconds)}


def check(folder: Path, more: Sequence[str] = ()) -> dict[str, float]:
    """Runs sdxl-check with the users' config. Its index exists from the second time on."""
    model = folder / "base.safetensors"
    if not model.exists():
        write_header(model)
    prompts = folder / "prompts.txt"
    prompts.write_text("a picture\n")
    options = {
        "train_data_dir": folder / "images",
        "pretrained_model_name_or_path": model,
        "cache_dir": folder / "cache",
        "output_dir": folder / "output",
        "sample_prompts": prompts,
    }
    command = [sys.executable, "-c", "from sdxl_finetune.cli import check; check()", "--config", "configs/style.toml"]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    began = time.perf_counter()
    output = subprocess.run([*command, *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    seconds = round(time.perf_counter() - began, 1)
    print(output, file=sys.stderr)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = round(used.ru_utime + used.ru_stime, 1)
    return {"seconds": seconds, "cpu": cpu, "gigabytes": round(used.ru_maxrss / 1e6, 2)}


def write_header(path: Path) -> None:
    """Writes the header of a full-size checkpoint, and a hole of the size of its tensors."""
    header, end = {}, 0
    for key, source in full_size_sources().items():
        begin, end = end, end + math.prod(source.shape) * source.dtype.itemsize
        header[key] = {"dtype": "F16", "shape": list(source.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def start(folder: Path) -> dict[str, float]:
    """Does what a run with cached latents does before its first batch, except for the model."""
    before, began, cpu = private_bytes(), time.perf_counter(), time.process_time()
    laps = {}

    def lap(name: str) -> None:
        laps[name] = round(time.perf_counter() - began - sum(laps.values()), 2)

    index = open_index(folder, skip_check=True)
    lap("index")
    shards = local_shelf(KIND.folder(folder / "cache"), KIND).open(check=True)
    lap("shards")
    library, keys = Library(shards), row_keys(index)
    lap("keys")
    places = find_places(index, keys, library)
    assert not len(missing_rows(index, places))
    store = build_store(index, places, library.files, pixels_per_latent=8, scratch=folder)
    del library, keys, places, shards
    lap("places")
    plan = build_plan(index, ranks=1, accumulation=1, seed=0)
    index.facts(), index.describe()
    dataset = TrainingDataset(
        index=index,
        read_latents=store.read,
        tokenize=Tokenizer(max_token_length=225),
        draw_noise=plain_noise,
        draw_timesteps=no_timesteps,
        seed=0,
        max_steps=1000,
    )
    batches = load_batches(dataset, plan.micro_batches(0, 1000), workers=2, pin_memory=False, on_bad_image="stop")
    next(batches)
    lap("batch")
    seconds, used = time.perf_counter() - began, private_bytes() - before
    workers = [private_bytes(child.pid) for child in psutil.Process().children() if "spawn_main" in child.cmdline()[-2]]
    batches.close()
    return {
        "seconds": round(seconds, 2),
        "main": round(used / 1e6),
        "worker": round(max(workers, default=0) / 1e6),
        "cpu": round(time.process_time() - cpu, 2),
        **laps,
    }


def read_latents(folder: Path) -> dict[str, float]:
    """Batches a second, from the disk and from a store on the loopback."""
    rates = latent_reading.reading_rates(folder)
    return {name: rates[name][0] for name in ("from the disk", "from a store, with warm local copies")}


def cache_latents(folder: Path) -> dict[str, float]:
    """The rate of the caching pipeline, as a share of the slower of reading and encoding alone."""
    with contextlib.redirect_stdout(sys.stderr):
        arguments = data.build_parser().parse_args(["pipeline", "--rounds", "5"])
        return {"ratio": data.pipeline(folder, arguments)}


def make_tokens(_folder: Path) -> dict[str, float]:
    """Milliseconds from the texts of an image to its tokens."""
    return {"milliseconds": captions.caption_to_tokens(10_000)[0]}


def plain_noise(
    _position: Position, shape: tuple[int, int, int, int], _latents: torch.Tensor | None
) -> tuple[torch.Tensor, None]:
    return torch.zeros(shape), None


def no_timesteps(_position: Position, count: int, _pixels: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int64)


def private_bytes(process: int | str = "self") -> int:
    """Memory that a process shares with no other and that no file backs."""
    with Path(f"/proc/{process}/smaps_rollup").open() as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("Anonymous:"))


def print_table(figures: dict[str, dict[int, dict[str, float]]]) -> None:
    """Prints each line of LINES with its figure at each size, and the growth."""
    for kind, of_size in figures.items():
        sizes = sorted(of_size)
        rows = [["", *(f"{size:,}" for size in sizes), f"growth for {sizes[-1] / sizes[0]:g} times the images"]]
        for step, (own, title, figure) in LINES.items():
            if own == kind:
                values = [of_size[size].get(step, of_size[size].get("unchecked", {})).get(figure, 0) for size in sizes]
                # A start that takes no longer than its imports has no growth that could be told.
                growth = f"{values[-1] / values[0]:.1f}" if values[0] > 0 else "–"
                rows.append([title, *(f"{value:,.5g}" for value in values), growth])
        rows.insert(1, ["---", *["--:"] * (len(rows[0]) - 1)])
        print("\n".join("| " + " | ".join(row) + " |" for row in rows), end="\n\n")


STEPS: dict[str, Callable[[Path], dict[str, float]]] = {
    "unchecked": start,
    "first": scan_all,
    "checked": scan_all,
    "check_first": check,
    "check": check,
    "check_unchecked": partial(check, more=("--skip_cache_check",)),
    "reading": read_latents,
    "pipeline": cache_latents,
    "tokens": make_tokens,
}

if __name__ == "__main__":
    main()
