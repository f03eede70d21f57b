"""Cache keys: 16-byte hashes that name a latent by all that it depends on besides the VAE.

A latent depends on the content of the image file, on resized size, crop, interpolation and alpha_mask, and on whether
the image is mirrored. Its key is hash(content) XOR hash(geometry), so that numpy makes millions of keys in a
moment. Name and place of the file are not part of the key: an image that was moved, renamed or touched is found again.
All hashes are blake2b.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, UInt8

from sdxl_finetune.data.index import Index

PIXELS_VERSION = "1"
"""Version of the way from a file's bytes to a bucket's pixels. Another version gives other keys."""


@dataclass(frozen=True)
class RowKeys:
    """The names under which shards know the rows of an index."""

    stat_hashes: UInt8[np.ndarray, "n 16"]
    """Hash of each image file's path, size and modification time (scan.hash_of_stat)."""
    geometry: Int64[np.ndarray, " n"]
    """The row of `geometry_hashes` for each image."""
    geometry_hashes: UInt8[np.ndarray, "g 2 16"]
    """Hash of each way to bring an image into a bucket: as it is, and mirrored."""

    def keys(
        self, rows: Int64[np.ndarray, " k"], contents: UInt8[np.ndarray, "k 16"], mirrored: bool
    ) -> UInt8[np.ndarray, "k 16"]:
        """The cache keys of `rows`, whose files have these content hashes."""
        return contents ^ self.geometry_hashes[self.geometry[rows], int(mirrored)]


def row_keys(index: Index) -> RowKeys:
    """The RowKeys of an index, from what the scan found. No file is opened."""
    width, height = (index.numbers(f"resized_{side}").astype(np.int64) for side in ("width", "height"))
    sizes, size = np.unique(width << 32 | height, return_inverse=True)
    readings, reading = index.readings
    count = len(index.buckets)
    geometries, geometry = np.unique((size * len(readings) + reading) * count + index.bucket, return_inverse=True)
    hashes = bytearray()
    for number in geometries.tolist():
        resized, bucket = int(sizes[number // count // len(readings)]), index.buckets[number % count]
        text = f"{PIXELS_VERSION} {resized >> 32} {resized & 0xFFFFFFFF} {bucket.width} {bucket.height}"
        for mirrored in (0, 1):
            hashes += hash16(f"{text} {readings[number // count % len(readings)]} {mirrored}".encode())
    return RowKeys(
        stat_hashes=index.stat_hashes,
        geometry=geometry.astype(np.int64),
        geometry_hashes=np.frombuffer(bytes(hashes), np.uint8).reshape(-1, 2, 16),
    )


def hash16(data: bytes) -> bytes:
    """The blake2b hash of `data`, 16 bytes."""
    return hashlib.blake2b(data, digest_size=16).digest()
