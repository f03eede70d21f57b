"""Looks at image and caption files, many in one task: their `stat`, and the content of those that have changed.

The scan (scan.py) gives these tasks to other processes. A task holds no Arrow data, because pyarrow pickles the whole
table with a slice.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8

from sdxl_finetune.config.dataset import Subset
from sdxl_finetune.data.caption_sources import caption_paths, read_texts
from sdxl_finetune.data.contents import absolute
from sdxl_finetune.data.images import ImageError, image_size
from sdxl_finetune.data.sources.names import MISSING_REMEDY
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.files import modified

NOTHING = b"-"
"""Stands for the `stat` of a caption file that does not exist."""


@dataclass(frozen=True)
class Files:
    """Images of one subset, by name, and what to look at for each of them."""

    subset: Subset
    names: Sequence[bytes]
    images: Bool[np.ndarray, " n"]
    """True for images: the `stat` is asked for, or the header is read for the size."""
    captions: Bool[np.ndarray, " n"]
    """True for captions: the `stat` of their files is asked for, or they are read."""

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Stats:
    """Results of `stat` for image files and caption files."""

    bytes: Int64[np.ndarray, " n"]
    mtime: Int64[np.ndarray, " n"]
    """Modification time in nanoseconds."""
    caption_stat: Int64[np.ndarray, " n"]
    """Hash of the `stat` of all files that may hold the caption."""
    failed: dict[int, Problem] = field(default_factory=dict)
    """Problems of images without a readable `stat`, by place."""


@dataclass(frozen=True)
class Contents:
    """Sizes in pixels from the headers of image files, the texts of captions, and hashes of image files."""

    stat_hashes: UInt8[np.ndarray, "n 16"]
    """The result of hash_of_stat for each image."""
    width: Int32[np.ndarray, " n"]
    height: Int32[np.ndarray, " n"]
    captions: list[list[str | None] | None]
    """One text for each caption source; None for captions that were not asked for."""
    failed: dict[int, Sequence[Problem]] = field(default_factory=dict)
    """Problems of images that cannot be used, by place."""
    lasting: set[int] = field(default_factory=set)
    """Places of images of which the content of the file, or of the caption file, is the problem."""


def look_at(files: Files) -> Stats:
    """Asks for the `stat` of image files and caption files."""
    count = len(files.names)
    stats = Stats(np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros(count, np.int64))
    folder = os.fsencode(str(files.subset.image_dir))
    for place in np.flatnonzero(files.images | files.captions).tolist():
        path = os.path.join(folder, files.names[place])  # noqa: PTH118 (Path is slower, and there may be millions)
        if files.images[place]:
            try:
                stat = os.stat(path)  # noqa: PTH116
            except OSError as error:
                is_link = os.path.islink(path)  # noqa: PTH114
                reason = "a link to a missing file" if is_link else f"not readable ({error.strerror})"
                if isinstance(error, FileNotFoundError) and files.subset.metadata_file and not is_link:
                    reason = f"no such image, though the metadata file names it: {MISSING_REMEDY}"
                stats.failed[place] = Problem(reason, file=os.fsdecode(path))
                continue
            stats.bytes[place], stats.mtime[place] = stat.st_size, modified(stat)
        if files.captions[place]:
            stats.caption_stat[place] = _caption_stat(os.fsdecode(path), files.subset)
    return stats


def read(files: Files, stats: Int64[np.ndarray, "n 2"]) -> Contents:
    """Reads sizes from image headers, and captions. `stats` are bytes and mtime of each image file."""
    folder = os.fsencode(str(absolute(files.subset.image_dir)))
    hashes = (
        hash_of_stat(os.path.join(folder, name), *stat)  # noqa: PTH118
        for name, stat in zip(files.names, stats.tolist(), strict=True)
    )
    stat_hashes = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 16)
    count = len(files.names)
    contents = Contents(stat_hashes, np.zeros(count, np.int32), np.zeros(count, np.int32), [None] * count)
    for place in np.flatnonzero(files.images | files.captions).tolist():
        path = Path(files.subset.image_dir) / os.fsdecode(files.names[place])
        try:
            if files.images[place]:
                contents.width[place], contents.height[place] = image_size(path)
            if files.captions[place]:
                contents.captions[place] = list(read_texts(path, files.subset))
        except ImageError as error:
            contents.failed[place] = (Problem(error.reason, file=error.path),)
            if error.is_lasting:
                contents.lasting.add(place)
        except UserError as error:
            contents.failed[place] = error.problems
            if not isinstance(error.__cause__, OSError):
                contents.lasting.add(place)
    return contents


def hash_of_stat(path: bytes, size: int, mtime: int) -> bytes:
    """The 16-byte hash by which shards know an image file.

    It is made of the absolute path, the size in bytes and the modification time in nanoseconds.
    """
    return hashlib.blake2b(b"%s %d %d" % (path, size, mtime), digest_size=16).digest()


def stat_of_missing(places: int) -> int:
    """The `caption_stat` of an image without a caption file, which may be in so many places."""
    return _hash56(b" ".join([NOTHING] * places))


def _caption_stat(image: str, options: Subset) -> int:
    """A hash that changes when a file that may hold the caption changes, appears or disappears."""
    stats = []
    for path in caption_paths(image, options):
        try:
            stat = os.stat(path)  # noqa: PTH116
            stats.append(b"%d %d" % (stat.st_size, stat.st_mtime_ns))
        except OSError:  # noqa: PERF203 (a caption file is missing now and then)
            stats.append(NOTHING)
    return _hash56(b" ".join(stats))


def _hash56(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=7).digest(), "little")
