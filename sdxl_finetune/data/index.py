"""The dataset index: one row for each image, in columns, memory-mapped from an Arrow file by every process.

Five million images are numbers in a few arrays and text in two more, never Python objects. The main process, the other
ranks and the data-loader workers share one copy through the page cache; a process receives the file's name alone. The
file's name is a hash of its content, so that runs can share a `cache_dir`. Rows are ordered by subset and file name,
whatever order the file system lists them in.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, Int, Int32, Shaped, UInt8

from sdxl_finetune.config.dataset import Dataset, Subset
from sdxl_finetune.data.entry import Bucket, Entry
from sdxl_finetune.data.kept_files import remove_unused
from sdxl_finetune.data.marks import find_marks
from sdxl_finetune.data.mask_files import MASKED, add_masks
from sdxl_finetune.data.placement import MARKED, PLACED, place
from sdxl_finetune.data.quality import NO_TAG
from sdxl_finetune.data.remarks import (
    count_captions,
    remark_on_captions,
    remark_on_faces,
    remark_on_sources,
    report_bad_images,
)
from sdxl_finetune.data.scan import digest_of, scan
from sdxl_finetune.data.tables import fixed_binary, is_sound, map_table, one_chunk, write_table
from sdxl_finetune.errors import Problem, Tally, UserError, counted
from sdxl_finetune.parsing import parse_json

logger = logging.getLogger(__name__)

FORMAT = b"index 2"
"""Version of the file of an index. A file of another version has another name."""
MARK_FACTS = {"quality tags": "quality", "loss weights": "loss_weight"}
"""Facts of an index that only a run with such options has, and their columns."""
MOST_VALUES = 8
"""Different repeats or loss weights that a description lists."""


@dataclass(frozen=True)
class Index:
    """The images of a run. A small value: copies of it in other processes map the same file."""

    path: Path
    datasets: tuple[Dataset, ...]
    """The datasets that `build_index` received."""
    excluded: tuple[int, ...] = ()
    """Rows of images that could not be read after the scan."""
    bad_files: int = 0
    """Number of files that the scan left out."""

    def __reduce__(self) -> tuple:
        return Index, (self.path, self.datasets, self.excluded, self.bad_files)

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, row: int) -> Entry:
        subset, bucket = self.subsets[self.subset[row]], self.buckets[self.bucket[row]]
        return Entry(
            path=subset.image_dir / os.fsdecode(self._table["name"][row].as_py()),
            captions=tuple(self._table["captions"][row].as_py()),
            subset=subset,
            size=(int(self.numbers("width")[row]), int(self.numbers("height")[row])),
            resized=(int(self.numbers("resized_width")[row]), int(self.numbers("resized_height")[row])),
            bucket=bucket,
            interpolation=subset.resize_interpolation,
            stat=(int(self.numbers("bytes")[row]), int(self.numbers("mtime")[row])),
            quality=self.quality_tag(row),
            offset=int(self.numbers("offset")[row]),
            **self._mask_of(row),
        )

    def _mask_of(self, row: int) -> dict[str, Any]:
        folder = self.subsets[self.subset[row]].conditioning_data_dir
        if folder is None:
            return {}
        stat = (int(self.numbers("mask_bytes")[row]), int(self.numbers("mask_version")[row]))
        return {"mask": folder / os.fsdecode(self.masks[row].as_py()), "mask_stat": stat}

    @property
    def masks(self) -> pa.Array:
        """Names of the mask files below the folders of masks, large_binary. Only if subsets have such folders."""
        return one_chunk(self._table["mask"])

    @property
    def names(self) -> pa.Array:
        """Names of the image files below the folders of their subsets, large_binary."""
        return one_chunk(self._table["name"])

    @property
    def subset(self) -> Int32[np.ndarray, " n"]:
        """Number of each image's subset, counted over all datasets."""
        return self.numbers("subset")

    @property
    def bucket(self) -> Int32[np.ndarray, " n"]:
        """Position of each image's bucket in `buckets`."""
        return self.numbers("bucket")

    @cached_property
    def repeats(self) -> Int32[np.ndarray, " n"]:
        """Number of times that each image is used in an epoch."""
        return self._without_excluded(self.numbers("repeats"))

    @cached_property
    def held_out(self) -> Bool[np.ndarray, " n"]:
        """True for images that are for validation and not trained on."""
        return self._without_excluded(self.numbers("held_out") > 0)

    def _without_excluded(self, column: np.ndarray) -> np.ndarray:
        """The column with 0 or False for the excluded images."""
        if self.excluded:
            column = column.copy()
            column[list(self.excluded)] = 0
        return column

    @property
    def used(self) -> Bool[np.ndarray, " n"]:
        """True for images that are trained on or validated."""
        return (self.repeats > 0) | self.held_out

    def quality_tag(self, row: int) -> str | None:
        """The quality tag of an image; None if it has none."""
        tags, place = self.subsets[self.subset[row]].quality_tags, self._mark("quality", NO_TAG)[row]
        return None if tags is None or place == NO_TAG else tags[place].tag

    def loss_weights(self, rows: Sequence[int]) -> Float32[np.ndarray, " k"]:
        """Factors of the losses of these images."""
        return self._mark("loss_weight", 1)[rows].astype(np.float32)

    def _mark(self, name: str, default: int) -> Shaped[np.ndarray, " n"]:
        """A column of MARKED. Without one, all images share the default, in the memory of one number."""
        if name in self._table.column_names:
            return self.numbers(name)
        return np.broadcast_to(np.float32(default), len(self))

    @cached_property
    def flips(self) -> Bool[np.ndarray, " n"]:
        """True for images that are also used mirrored."""
        return np.array([subset.flip_aug for subset in self.subsets])[self.subset]

    @cached_property
    def has_mask_file(self) -> Bool[np.ndarray, " n"]:
        """True for images whose mask is a file of its own."""
        return np.array([subset.conditioning_data_dir is not None for subset in self.subsets])[self.subset]

    @cached_property
    def has_mask(self) -> Bool[np.ndarray, " n"]:
        """True for images with a mask."""
        return np.array([subset.alpha_mask for subset in self.subsets])[self.subset] | self.has_mask_file

    @property
    def readings(self) -> tuple[list[str], Int[np.ndarray, " n"]]:
        """The ways in which files are read, and the position of each image's way among them.

        A way is the value of resize_interpolation, and whether colours under transparent parts are kept.
        """
        own = [f"{one.resize_interpolation}{' alpha' if one.alpha_mask else ''}" for one in self.subsets]
        ways = sorted(set(own))
        return ways, np.array([ways.index(way) for way in own])[self.subset]

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        return tuple(Bucket(*bucket) for bucket in parse_json(self._table.schema.metadata[b"buckets"]))

    @property
    def resolution(self) -> tuple[int, int]:
        """Training resolution in pixels: of the first dataset, or the largest bucket if a metadata file gives sizes."""
        if resolution := self.datasets[0].resolution:
            return resolution
        largest = max(self.buckets, key=lambda bucket: bucket.width * bucket.height)
        return largest.width, largest.height

    def facts(self) -> dict[str, str | int]:
        """Numbers and digests that are equal if the same images come in the same order, wherever their files are.

        Training states save them, and a resumed run compares them.
        """
        return {
            "images": int((self.repeats > 0).sum()),
            "images with repeats": int(self.repeats.sum()),
            **self.saved["digests"],
            "repeats": hashlib.blake2b(self.repeats.tobytes(), digest_size=4).hexdigest(),
        }

    def without(self, rows: Iterable[int]) -> "Index":
        """A copy that no longer uses these rows. Row numbers stay. Raises UserError if no image is left."""
        index = replace(self, excluded=tuple(sorted({*self.excluded, *rows})))
        _check_some_left(index.repeats, index.held_out)
        return index

    def describe(self) -> str:
        """A description for the log: a line on all images, one for each bucket, then those of `describe_marks`."""
        used = self.used
        enlarged = (self.numbers("resized_width") > self.numbers("width")) | (
            self.numbers("resized_height") > self.numbers("height")
        )
        images = np.bincount(self.bucket[used], minlength=len(self.buckets))
        occurrences = np.bincount(self.bucket, self.repeats, len(self.buckets)).astype(np.int64)
        lines = [
            f"{counted(used.sum(), 'image')}, {occurrences.sum()} with repeats,"
            f" in {counted(len(self.buckets), 'bucket')};"
            f" {(enlarged & used).sum()} enlarged, {self.bad_files + len(self.excluded)} skipped"
            + (f", {self.held_out.sum()} held out for validation" if self.held_out.any() else "")
        ]
        lines += [
            f"bucket {bucket.width}x{bucket.height}: {counted(image, 'image')}, {occurrence} with repeats"
            for bucket, image, occurrence in zip(self.buckets, images, occurrences, strict=True)
        ]
        return "\n".join([*lines, *self.describe_marks()])

    def describe_marks(self) -> list[str]:
        """Lines on the quality tags and weights of the images in use; none without such options."""
        if MARKED[0] not in self._table.column_names:
            return []
        lines, used, subset = [], self.used, self.subset
        tags = [tuple(tag.tag for tag in one.quality_tags or ()) for one in self.subsets]
        for names in dict.fromkeys(filter(None, tags)):
            own = used & np.array([one == names for one in tags])[subset]
            counts = np.bincount(self.numbers("quality")[own] + 1, minlength=len(names) + 1).tolist()
            parts = [
                f"{name} {count:,}" for name, count in zip((*names, "none"), (*counts[1:], counts[0]), strict=True)
            ]
            lines.append(f"quality tags: {', '.join(parts)}")
        for name, values in (
            ("repeats", self.repeats[self.repeats > 0]),
            ("loss weights", self.numbers("loss_weight")[used]),
        ):
            found, counts = np.unique(values, return_counts=True)
            if any(one.image_weights for one in self.subsets):
                lines.append(f"{name}: {_histogram(found, counts)}")
        return lines

    @cached_property
    def saved(self) -> dict[str, dict]:
        """Digests of columns, and counts of captions by subset, which take long to compute for millions of images."""
        saved: dict[str, dict] = parse_json(self._table.schema.metadata[b"saved"])
        return saved

    @cached_property
    def _table(self) -> pa.Table:
        return map_table(self.path, checked=False)

    def captions(self, start: int, end: int) -> list[list[str | None]]:
        """The whole texts of the caption sources of the rows from `start` to `end`."""
        texts: list[list[str | None]] = self._table["captions"].slice(start, end - start).to_pylist()
        return texts

    @cached_property
    def subsets(self) -> tuple[Subset, ...]:
        """The subsets of all datasets."""
        return tuple(chain.from_iterable(dataset.subsets for dataset in self.datasets))

    @property
    def stat_hashes(self) -> UInt8[np.ndarray, "n 16"]:
        """The hash of each image file's path, size and modification time, as in `scan.hash_of_stat`."""
        return fixed_binary(one_chunk(self._table["stat_hash"]))

    def numbers(self, name: str) -> Shaped[np.ndarray, " n"]:
        """A numeric column of the file. `bytes` and `mtime` (nanoseconds) are size and modification time of images."""
        return one_chunk(self._table[name]).to_numpy()


def build_index(
    datasets: Sequence[Dataset],
    cache_dir: Path,
    on_bad_image: str,
    *,
    skip_check: bool = False,
    bad_files: Tally | None = None,
) -> Index:
    """Scans all images and captions, places the images in buckets, and writes the index.

    With `skip_check` the results of the last scan are used unchecked. Raises UserError for a folder without images.
    Files that cannot be used raise one UserError with all their names if `on_bad_image` is "stop". If it is "skip", a
    warning names them, and they are left out. `bad_files` then receives their problems. Only the first rank calls this;
    the other ranks receive the Index.
    """
    subsets = [subset for dataset in datasets for subset in dataset.subsets]
    found, problems = scan(subsets, cache_dir, skip_check=skip_check)
    marks = find_marks(found, subsets, cache_dir, skip_check=skip_check)
    table = place(found, datasets, problems, cache_dir, marks)
    table = add_masks(table, subsets, cache_dir, skip_check=skip_check)
    report_bad_images(problems, on_bad_image)
    if bad_files is not None:
        bad_files.add_all(problems)
    _check_some_left(table["repeats"].to_numpy(), table["held_out"].to_numpy())
    remark_on_sources(table, subsets)
    remark_on_faces(table, subsets)
    index = Index(_write(table, subsets, cache_dir), tuple(datasets), bad_files=len(problems))
    remark_on_captions(index.saved["captions"], subsets, lambda row: index[row].path)
    remove_unused(cache_dir)
    return index


def _write(table: pa.Table, subsets: Sequence[Subset], cache_dir: Path) -> Path:
    """Writes the file of an index, with what `Index.saved` returns. A file of the same content is left as it is."""
    metadata, added = (
        table.schema.metadata,
        [name for name in (*PLACED, *MARKED, *MASKED) if name in table.column_names],
    )
    parts = (FORMAT, metadata[b"digest"], metadata[b"buckets"], digest_of(table, added).encode())
    path = cache_dir / f"{hashlib.blake2b(b' '.join(parts), digest_size=12).hexdigest()}.index"
    if not _is_complete(path, metadata, len(subsets)):
        saved = {"digests": _digests(table), "captions": count_captions(table, subsets)}
        write_table(path, table.replace_schema_metadata(metadata | {b"saved": json.dumps(saved).encode()}))
    return path


def _is_complete(path: Path, metadata: Mapping[bytes, bytes], subsets: int) -> bool:
    """True if a file is that of an index with this metadata, and `Index.saved` can be read."""
    if not is_sound(path):
        return False
    table = map_table(path, checked=False)
    found = table.schema.metadata or {}
    try:
        saved = parse_json(found[b"saved"])
        examples = saved["captions"].get("first without", [])
        counts = [saved["captions"][name] for name in ("images", "without caption", "of several lines")]
        return (
            metadata.items() <= found.items()
            and all(isinstance(digest, str) for digest in saved["digests"].values())
            and all(len(each) == subsets and set(map(type, each)) == {int} for each in counts)
            and all(type(row) is int and 0 <= row < table.num_rows for row in examples)
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return False


def _digests(table: pa.Table) -> dict[str, str]:
    """Digests of what is trained on. Each group of columns has one, so that a resumed run can say what has changed."""
    captions = one_chunk(table["captions"])
    if len(captions.flatten()) == len(captions):  # one text each, as without caption sources
        captions = captions.flatten()
    marked = {fact: digest_of(table, [name], 4) for fact, name in MARK_FACTS.items() if name in table.column_names}
    return {
        "names of images": digest_of(table, ["subset", "name"], 4),
        "captions": digest_of(pa.table({"caption": captions}), size=4),
        "sizes and buckets": digest_of(table, ["width", "height", "resized_width", "resized_height", "bucket"], 4),
        "files": digest_of(table, ["bytes"], 4),
        **marked,
    }


def _histogram(values: Shaped[np.ndarray, " k"], counts: Int[np.ndarray, " k"]) -> str:
    """Values with the number of images of each; the range alone if there are many."""
    if len(values) > MOST_VALUES:
        return f"{values.min():g} to {values.max():g}, mean {np.average(values, weights=counts):.4g}"
    return ", ".join(f"{value:g} for {count:,} images" for value, count in zip(values, counts, strict=True))


def _check_some_left(repeats: np.ndarray, held_out: np.ndarray) -> None:
    if repeats.any():
        return
    if held_out.any():
        message = f"no image is left to train on, because {held_out.sum()} are held out: lower validation_split"
        raise UserError(Problem(message, key="validation_split"))
    raise UserError("no image is left to train on: see the warnings above, and add images or repeats")
