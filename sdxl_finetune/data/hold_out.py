"""Chooses the images that are held out for validation (validation_split)."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int, Int64

from sdxl_finetune.config.dataset import Subset
from sdxl_finetune.data.tables import kept_file, map_array, one_chunk
from sdxl_finetune.storage.copies import touch

CHUNK = 1 << 16
"""Names that are Python objects at once."""


def find_held_out(table: pa.Table, subsets: Sequence[Subset], cache_dir: Path) -> Bool[np.ndarray, " n"]:
    """True for each image of a scan's table that is held out. Regularisation images never are.

    Subsets of equal share and seed are divided as one. `cache_dir` keeps the result by the digest of the table, because
    it takes seconds for millions of images.
    """
    subset = one_chunk(table["subset"]).to_numpy()
    held_out = np.zeros(len(subset), bool)
    asked = [(one.validation_split, one.validation_seed) if not one.is_reg else (0.0, 0) for one in subsets]
    for share, seed in sorted(one for one in set(asked) if one[0]):
        is_asked = [one == (share, seed) for one in asked]
        rows = np.flatnonzero(np.array(is_asked)[subset])
        if len(rows):
            names = _names(table, subsets, rows)
            question = f"{table.schema.metadata[b'digest'].decode()} {is_asked} {share} {seed}"
            held_out[rows[_kept(cache_dir / "held_out", question, names, share, seed, len(rows))]] = True
    return held_out


def hold_out(names: Iterable[bytes], share: float, seed: int) -> Int[np.ndarray, " k"]:
    """Chooses the images to hold out: this share of all, rounded, and at least one. Returns their positions.

    The choice depends only on each image's file and folder name and on the seed, so that it stays when other images are
    added or removed.
    """
    key = str(seed).encode()
    ends = (b"/".join(name.split(b"/")[-2:]) for name in names)
    digests = b"".join(hashlib.blake2b(end, digest_size=8, key=key).digest() for end in ends)
    # Numbers of the other byte order sort as the bytes do, and several times as fast.
    order = np.argsort(np.frombuffer(digests, ">u8").astype(np.uint64), kind="stable")
    return np.sort(order[: max(1, round(share * len(order)))])


def _kept(
    folder: Path, question: str, names: Iterable[bytes], share: float, seed: int, count: int
) -> Int[np.ndarray, " k"]:
    """The result of `hold_out`, from a file of an earlier start if there is one."""
    path = folder / f"{hashlib.blake2b(question.encode(), digest_size=12).hexdigest()}.npy"
    found = map_array(path)
    if found is not None and found.dtype == np.int64 and found.shape == (max(1, round(share * count)),):
        touch(path)
        return np.array(found)
    chosen = hold_out(names, share, seed).astype(np.int64)
    with kept_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, chosen)
    return chosen


def _names(table: pa.Table, subsets: Sequence[Subset], rows: Int64[np.ndarray, " k"]) -> Iterable[bytes]:
    """Yields folder and file name of these rows."""
    folders = [os.fsencode(one.image_dir.name) for one in subsets]
    for start in range(0, len(rows), CHUNK):
        part = table.select(["subset", "name"]).take(pa.array(rows[start : start + CHUNK]))
        for number, name in zip(part["subset"].to_pylist(), part["name"].to_pylist(), strict=True):
            yield folders[number] + b"/" + name
