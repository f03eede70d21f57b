"""Measures how long the statistics of `sdxl-data report` take, and how that grows with the number of images.

    python -m scripts.benchmarks.report [--folder FOLDER] [--sizes 100000 1000000]

For each size the script writes an index of synthetic rows without image files: sizes, and captions of about 20 tags of
a vocabulary with a long tail. Then it collects the report and writes the page, in a new process. Imports are not
counted. Pictures and duplicates, whose files would have to be read, are left out.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scripts.benchmarks.scale import private_bytes
from sdxl_finetune.config import Config, Dataset, Subset
from sdxl_finetune.data.index import Index
from sdxl_finetune.data.tables import write_table
from sdxl_finetune.report.collect import describe
from sdxl_finetune.report.page import render

VOCABULARY = 100_000
TAGS = 20
"""Tags of a caption on average."""
CHUNK = 1 << 17
"""Rows that are made at once."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to write the rows; default: a temporary folder")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(report_on(arguments.folder, arguments.one)))
        return
    print_table({size: measure(size, arguments.folder) for size in arguments.sizes})


def measure(size: int, parent: Path | None = None) -> dict[str, float]:
    """Seconds of each part for so many images, and the private memory beyond imports in MB, from a new process."""
    with tempfile.TemporaryDirectory(prefix="report-", dir=parent) as folder:
        make_index(Path(folder), size)
        command = [sys.executable, "-m", "scripts.benchmarks.report", "--folder", folder, "--one", str(size)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    print(f"{size:,} images: {output.strip()}", file=sys.stderr, flush=True)
    return json.loads(output.splitlines()[-1])


def datasets(folder: Path) -> tuple[Dataset, ...]:
    subset = Subset(image_dir=folder / "images", num_repeats=1, class_tokens=None, caption_extension=".txt")
    buckets = {"enable_bucket": True, "min_bucket_reso": 512, "max_bucket_reso": 2048}
    return (Dataset(resolution=(1024, 1024), batch_size=5, subsets=(subset,), **buckets),)


def make_index(folder: Path, size: int) -> None:
    """Writes the index of so many synthetic images."""
    rng = np.random.default_rng(0)
    chunks = [make_rows(rng, start, min(CHUNK, size - start)) for start in range(0, size, CHUNK)]
    buckets = [(0, 512 + 64 * number, 1536 - 64 * number) for number in range(17)]
    table = pa.concat_tables(chunks).combine_chunks().replace_schema_metadata({"buckets": json.dumps(buckets)})
    write_table(folder / "rows.index", table)


def make_rows(rng: np.random.Generator, start: int, count: int) -> pa.Table:
    """Rows of an index, numbered from `start`."""
    lengths = rng.poisson(TAGS, count)
    places = (rng.pareto(0.8, lengths.sum()) * 20).clip(max=VOCABULARY - 1).astype(np.int64)
    words = pa.array([f"word {number}" for number in range(VOCABULARY)])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    captions = pc.binary_join(pa.ListArray.from_arrays(offsets, words.take(pa.array(places))), ", ")
    listed = pa.LargeListArray.from_arrays(np.arange(count + 1), captions.cast(pa.large_string()))
    bucket = rng.integers(0, 17, count)
    sides = np.stack([512 + 64 * bucket, 1536 - 64 * bucket], axis=1)
    sizes = (sides * rng.uniform(0.6, 4, (count, 1)) * rng.uniform(1, 1.1, (count, 2))).astype(np.int32)
    resized = (sides * rng.uniform(1, 1.1, (count, 2))).astype(np.int32)
    numbers = {
        "subset": np.zeros(count),
        "width": sizes[:, 0],
        "height": sizes[:, 1],
        "resized_width": resized[:, 0],
        "resized_height": resized[:, 1],
        "bucket": bucket,
        "repeats": np.ones(count),
        "held_out": np.zeros(count),
    }
    columns = {name: pa.array(values.astype(np.int32)) for name, values in numbers.items()}
    columns |= {name: pa.array(np.arange(start, start + count) * 1000) for name in ("bytes", "mtime")}
    columns["name"] = pa.array([b"%09d.jpg" % number for number in range(start, start + count)], pa.large_binary())
    columns["stat_hash"] = pa.array([b"%016d" % number for number in range(start, start + count)], pa.binary(16))
    columns |= {"score": pa.array(rng.beta(4, 3, count), pa.float32()), "offset": pa.array(np.full(count, -1))}
    return pa.table({**columns, "captions": listed})


def report_on(folder: Path, size: int) -> dict[str, float]:
    """Collects the report of the rows in `folder`."""
    index = Index(folder / "rows.index", datasets(folder))
    assert len(index) == size
    before, began, worked, memory = private_bytes(), time.perf_counter(), time.process_time(), [0]
    threading.Thread(target=watch, args=(memory,), daemon=True).start()
    report = describe(index, Config(output_dir=folder), rare=10)
    collected = time.perf_counter()
    render(report)
    done = time.perf_counter()
    parts = {name: round(seconds, 2) for name, seconds in report.seconds.items()}
    total = {"page": round(done - collected, 2), "all": round(done - began, 2)}
    total["all, of which a core worked"] = round(time.process_time() - worked, 2)
    return {**parts, **total, "peak memory, MB": (max(memory) - before) / 1e6}


def watch(memory: list[int]) -> None:
    """Notes the private memory of this process ten times a second."""
    while True:
        memory.append(private_bytes())
        time.sleep(0.1)


def print_table(figures: dict[int, dict[str, float]]) -> None:
    sizes = sorted(figures)
    growth = f"growth ({sizes[-1] / sizes[0]:.0f} times the images)"
    print("| " + " | ".join(["seconds", *(f"{size:,} images" for size in sizes), growth]) + " |")
    print("| --- |" + " --: |" * (len(sizes) + 1))
    for part in figures[sizes[0]]:
        values = [figures[size][part] for size in sizes]
        cells = [part, *(f"{value:.1f}" for value in values), f"{values[-1] / max(values[0], 1e-2):.1f}"]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
