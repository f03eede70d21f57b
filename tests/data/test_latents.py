"""Latents in memory: the same for every batch size and number of processes, bad images named."""

import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sdxl_finetune.data import latents as latents_module
from sdxl_finetune.data.index import Index, build_index
from sdxl_finetune.data.latents import LatentStore, build_store, cache_latents, to_tensor
from sdxl_finetune.problems import UserError

SIZES = {"a.png": (64, 64), "b.jpg": (80, 64), "c.png": (160, 64), "d.webp": (64, 160), "e.png": (70, 70)}


@pytest.fixture
def index(tmp_path: Path, subset, dataset, write_images) -> Index:
    write_images(tmp_path / "plain", SIZES)
    write_images(tmp_path / "flipped", SIZES)
    subsets = subset(tmp_path / "plain"), subset(tmp_path / "flipped", flip_aug=True)
    return build_index([dataset(*subsets)], tmp_path / "cache", on_bad_image="stop")


def encode(images: Tensor, noise: Tensor) -> Tensor:
    """A VAE of one line: means over 8 x 8 pixels, and a deviation of 0.1."""
    means = torch.nn.functional.avg_pool2d(images, 8)
    return torch.cat([means, means.mean(1, keepdim=True)], 1) + 0.1 * noise


def all_latents(store: LatentStore) -> list[np.ndarray]:
    flips = store.index.flips.tolist()
    read = [store.read([row], [flip])[0] for row in range(len(flips)) for flip in {False, flips[row]}]
    assert all(latent.any() for latent in read)
    return read


def test_any_batch_size_and_number_of_parts(index: Index, tmp_path: Path) -> None:
    expected = None
    for batch_size, parts in ((1, 1), (4, 1), (3, 2)):
        store = build_store(index, tmp_path)
        for part in range(parts):
            assert cache_latents(store, encode, batch_size=batch_size, part=part, parts=parts) == {}
        found = all_latents(store)
        expected = expected or found
        assert all(np.array_equal(left, right) for left, right in zip(found, expected, strict=True))


def test_what_is_stored(index: Index, tmp_path: Path) -> None:
    store = build_store(index, tmp_path)
    cache_latents(store, encode, batch_size=2)
    assert store.bytes == 2 * sum(latent.size for latent in all_latents(store))
    row = next(row for row in range(len(index)) if index.flips[row] and index[row].path.name == "c.png")
    entry = index[row]
    assert (entry.bucket.width, entry.bucket.height) == (96, 32) and entry.resized == (96, 38)
    pixels = to_tensor(entry.load((0, 3))[None])
    assert pixels.min() >= -1 and pixels.max() <= 1 and pixels.shape == (1, 3, 32, 96)
    means = encode(pixels, torch.zeros(1, 4, 4, 12))
    plain, mirrored = (torch.from_numpy(store.read([row], [flip])).float() for flip in (False, True))
    assert plain.shape == means.shape and (plain - means).std() < 0.15
    assert (mirrored - means.flip(3)).std() < 0.15
    assert not torch.allclose(mirrored, plain.flip(3), atol=0.05), "encoded by itself, with its own noise"
    twin = next(r for r in range(len(index)) if not index.flips[r] and index[r].path.name == "c.png")
    assert not np.array_equal(store.read([twin], [False]), store.read([row], [False])), "folders differ in noise"


def _read(store: LatentStore, connection) -> None:
    connection.send((store.read([0, 1], [False, False]).sum(dtype=np.float64), len(pickle.dumps(store))))


def test_another_process_maps_the_same_memory(index: Index, tmp_path: Path) -> None:
    store = build_store(index, tmp_path)
    cache_latents(store, encode, batch_size=2)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_read, args=(store, sender))
    process.start()
    total, size = receiver.recv()
    process.join()
    assert total == store.read([0, 1], [False, False]).sum(dtype=np.float64) and size < 5000


def test_bad_images(index: Index, tmp_path: Path) -> None:
    """Half a file, a file that became another size, a latent that is not finite: named, the others encoded."""
    half = index[0].path
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    index[1].path.write_bytes(index[2].path.read_bytes())

    def explode(images: Tensor, noise: Tensor) -> Tensor:
        latents = encode(images, noise)
        if images.shape[2:] == (96, 32):
            latents[0, 0, 0, 0] = float("nan")
        return latents

    store = build_store(index, tmp_path)
    bad = cache_latents(store, explode, batch_size=1)
    narrow = [row for row in range(len(index)) if index[row].path.name == "d.webp"]
    assert sorted(bad) == sorted([0, 1, *narrow])
    assert [bad[row].file for row in bad] == [str(index[row].path) for row in bad]
    assert "truncated" in bad[0].message or "not readable" in bad[0].message
    assert "changed" in bad[1].message and "NaN" in bad[narrow[0]].message
    left = index.without(bad)
    assert left.repeats.sum() == index.repeats.sum() - 4 and left.fingerprint != index.fingerprint
    assert store.read([2], [False]).any()


def test_other_systems_and_too_little_memory(index: Index, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(latents_module.os, "sysconf", lambda name: 1)
    with pytest.raises(UserError, match="cache_latents = True: the latents take"):
        build_store(index, tmp_path)
    monkeypatch.delattr(latents_module.os, "memfd_create")
    store = build_store(index, tmp_path / "new")
    assert store.path.parent == tmp_path / "new" and store.path.stat().st_size == store.bytes
