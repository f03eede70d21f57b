"""The library: many shards as one, in which records are found by key, many at once."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64, Shaped, UInt8, UInt64

from sdxl_finetune.latents.shards import Shard

PLACE = np.dtype([("file", "<i4"), ("crc", "<u4"), ("start", "<i8")])
"""Place of a record: number of the file (-1 for none), CRC-32 of its bytes, position of the first byte."""


class Lookup:
    """Finds rows of a table of hashes, many at once."""

    def __init__(self, hashes: UInt8[np.ndarray, "n 16"]) -> None:
        first_halves = _first_halves(hashes)
        self._hashes = hashes
        self._order = np.argsort(first_halves, kind="stable")
        self._sorted = first_halves[self._order]

    def find(self, hashes: UInt8[np.ndarray, "k 16"]) -> Int64[np.ndarray, " k"]:
        """The first row that equals each hash, or -1."""
        if not len(self._sorted):
            return np.full(len(hashes), -1)
        first_halves, last = _first_halves(hashes), len(self._sorted) - 1
        # Sorted hashes are found several times as fast, because neighbours are then close in memory.
        order, at = np.argsort(first_halves), np.empty(len(hashes), np.int64)
        at[order] = np.searchsorted(self._sorted, first_halves[order]).clip(max=last)
        while True:
            rows = self._order[at]
            is_equal = (self._hashes[rows] == hashes).all(axis=1)
            # Another hash may have the same first half, and then the wanted one may follow it.
            goes_on = ~is_equal & (at < last) & (self._sorted[(at + 1).clip(max=last)] == first_halves)
            if not goes_on.any():
                return np.where(is_equal, rows, -1)
            at = at + goes_on


class Library:
    """Many shards as one: records by key, and content hashes by `stat` hash. Of equal keys the first shard counts."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.files = tuple(shard.path for shard in shards)
        nothing = np.zeros((0, 16), np.uint8)
        places = [np.zeros(0, PLACE)]
        for number, shard in enumerate(shards):
            own = np.zeros(len(shard.keys), PLACE)
            own["file"], own["crc"] = number, shard.crcs
            own["start"] = shard.start + np.arange(len(own)) * shard.size
            places.append(own)
        self._places = np.concatenate(places)
        self._keys = Lookup(np.concatenate([nothing, *(shard.keys for shard in shards)]))
        self._stat_hashes = Lookup(np.concatenate([nothing, *(shard.stat_hashes for shard in shards)]))
        self._contents = np.concatenate([nothing, *(shard.contents for shard in shards)])

    def places(self, keys: UInt8[np.ndarray, "k 16"]) -> Shaped[np.ndarray, " k"]:
        """The PLACE of the record of each key."""
        rows = self._keys.find(keys)
        found = np.full(len(keys), np.array((-1, 0, 0), PLACE))
        found[rows >= 0] = self._places[rows[rows >= 0]]
        return found

    def contents(
        self, stat_hashes: UInt8[np.ndarray, "k 16"]
    ) -> tuple[Int64[np.ndarray, " j"], UInt8[np.ndarray, "j 16"]]:
        """The positions of the known `stat_hashes`, and the content hashes of these."""
        rows = self._stat_hashes.find(stat_hashes)
        known = np.flatnonzero(rows >= 0)
        return known, self._contents[rows[known]]


def _first_halves(hashes: UInt8[np.ndarray, "n 16"]) -> UInt64[np.ndarray, " n"]:
    """The first eight bytes of each hash as a number, which numpy sorts many times faster than 16 bytes of text."""
    return np.ascontiguousarray(hashes[:, :8]).view(np.uint64).ravel()
