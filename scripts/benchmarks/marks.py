"""Measures what quality tags and weights cost at the start of a run, and how that grows with the number of images.

    python -m scripts.benchmarks.marks [--rows 100000 1000000] [--folder FOLDER]

The images are synthetic rows of a scan with captions of about 25 tags and 2,000 styles. A Parquet file holds a score
for each image. The rules are 2,000 tags and two patterns. "Again" is a start with unchanged files, which reads what the
first start has kept. The last column is the growth from the smallest to the largest number of images.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from sdxl_finetune.config import Subset
from sdxl_finetune.data.captions import caption
from sdxl_finetune.data.marks import find_marks
from sdxl_finetune.data.scan import digest_of

RELEASE = "masterpiece > 0.75, high quality > 0.6, normal quality > 0.5, low quality > 0.3, worst quality"
SHARES = "masterpiece top 10%, high quality top 30%, normal quality top 60%, low quality top 90%, worst quality"
STYLES, TAGS = 2_000, 10_000
"""Different style tags and other tags."""
CAPTIONS = 20_000
"""Captions whose time is measured."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--folder", type=Path, help="where to make files; default: a temporary folder")
    arguments = parser.parse_args()
    figures: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for rows in arguments.rows:
            for name, seconds in measure(Path(folder) / str(rows), rows).items():
                figures.setdefault(name, []).append(seconds)
    print(f"{'seconds':42}" + "".join(f"{rows:>12,}" for rows in arguments.rows) + f"{'growth':>10}")
    for name, seconds in figures.items():
        cells = "".join(f"{value:12.2f}" for value in seconds)
        print(f"{name:42}{cells}{seconds[-1] / max(seconds[0], 1e-3):10.1f}")
    plain, tagged = (caption_microseconds(quality) for quality in (None, "masterpiece"))
    print(f"a shuffled caption of 25 tags: {plain:.0f} microseconds, with a quality tag {tagged:.0f}")


def measure(folder: Path, rows: int) -> dict[str, float]:
    """Seconds of each way to mark this many images, the first time, and for the last one again."""
    table = make_table(folder, rows)
    scores, rules = folder / "scores.parquet", folder / "rules.toml"
    ways = {
        "scores of a Parquet file, by bounds": {"quality_tags": RELEASE, "quality_scores": str(scores)},
        "the same by shares in groups of a column": {
            "quality_tags": SHARES, "quality_scores": str(scores), "quality_groups": "column:rating",
        },
        "the same in groups of rating tags": {
            "quality_tags": SHARES, "quality_scores": str(scores), "quality_groups": "rating:safe, rating:explicit",
        },
        "2,002 rules of tags": {"image_weights": rules},
    }  # fmt: skip
    figures = {}
    for name, options in ways.items():
        subset = Subset(image_dir=folder / "images", num_repeats=1, class_tokens=None, **options)
        figures[name] = timed(lambda subset=subset: find_marks(table, [subset], folder))
    figures["again"] = timed(lambda: find_marks(table, [subset], folder))
    return figures


def timed(run: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def make_table(folder: Path, rows: int) -> pa.Table:
    """The table of a scan of this many images, and their files of scores and rules."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = [f"{number:08d}.png" for number in range(rows)]
    scores = pa.array(rng.random(rows, np.float32))
    ratings = pa.array(["safe", "explicit", None]).take(pa.array(rng.integers(0, 3, rows)))
    pa.parquet.write_table(pa.table({"path": names, "score": scores, "rating": ratings}), folder / "scores.parquet")
    lines = [f'"style_{number}" = {{ repeats = 2 }}' for number in range(STYLES)]
    lines += ['"tag 1*" = { loss_weight = 2 }', '"*_99" = { repeats = 3 }']
    (folder / "rules.toml").write_text("[tags]\n" + "\n".join(lines))
    columns = {
        "subset": pa.array(np.zeros(rows, np.int32)),
        "name": pa.array([name.encode() for name in names], pa.large_binary()),
        "captions": pa.array(([make_caption(rng, number)] for number in range(rows)), pa.large_list(pa.large_string())),
        "score": scores,
    }
    table = pa.table(columns)
    return table.replace_schema_metadata({"digest": digest_of(table)})


def make_caption(rng: np.random.Generator, number: int) -> str:
    """A caption of a style, a rating and 23 other tags, of which low numbers are frequent."""
    tags = (TAGS * rng.random(23) ** 3).astype(int).tolist()
    rating = "rating:safe" if number % 3 else "rating:explicit"
    return f"style {number * 7919 % STYLES}, {rating}, " + ", ".join(f"tag {tag}" for tag in tags)


def caption_microseconds(quality: str | None) -> float:
    """Time of one shuffled caption, with or without a quality tag."""
    subset = Subset(num_repeats=1, class_tokens=None, shuffle_caption=True, keep_tokens=4, quality_tags=RELEASE)
    text, rng = make_caption(np.random.default_rng(0), 1), random.Random(0)
    where = {"epoch": 0, "step": 0, "max_steps": 1}
    seconds = timed(lambda: [caption(subset, text, rng, **where, quality=quality) for _ in range(CAPTIONS)])
    return seconds / CAPTIONS * 1e6


if __name__ == "__main__":
    main()
