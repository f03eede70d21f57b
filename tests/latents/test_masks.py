"""The mask cache holds what uncached training reads, keyed by content."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from sdxl_finetune.config import Config, Subset
from sdxl_finetune.data.index import Index, build_index
from sdxl_finetune.data.masks import latent_mask, load_mask
from sdxl_finetune.errors import UserError
from sdxl_finetune.latents.catalogue import local_shelf
from sdxl_finetune.latents.keys import hash16, row_keys
from sdxl_finetune.latents.masks import MaskStore, find_mask_files, prepare_masks
from sdxl_finetune.latents.shards import Kind, Shard

SIZES = {"a.png": (64, 64), "b.png": (200, 180), "c.png": (70, 64), "d.png": (64, 90), "same_as_a.png": (64, 64)}


@pytest.fixture
def folders(tmp_path: Path, write_images) -> tuple[Path, Path]:
    """Images, and masks with soft edges. Two masks are equal."""
    write_images(tmp_path / "images", SIZES)
    (tmp_path / "masks").mkdir()
    for number, (name, size) in enumerate(SIZES.items()):
        save_mask(tmp_path / "masks" / name, size, number % 4)
    return tmp_path / "images", tmp_path / "masks"


def save_mask(path: Path, size: tuple[int, int], number: int) -> None:
    coarse = np.random.default_rng(number).integers(0, 256, (7, 7), np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def prepare(tmp_path: Path, dataset) -> Callable[..., tuple[Index, MaskStore | None]]:
    """prepare(subset, ..., disk=True): the index and its masks."""

    def build(*subsets: Subset, disk: bool = True, on_bad_image: str = "stop") -> tuple[Index, MaskStore | None]:
        index = build_index([dataset(*subsets)], tmp_path / "cache", "stop")
        options = {"cache_latents": True, "cache_latents_to_disk": disk, "on_bad_image": on_bad_image}
        return prepare_masks(index, Config(output_dir=tmp_path, **options), Accelerator(), 8)

    return build


def expected(index: Index, row: int) -> np.ndarray:
    entry = index[row]
    left, top = ((a - b) // 2 for a, b in zip(entry.resized, (entry.bucket.width, entry.bucket.height), strict=True))
    return latent_mask(load_mask(entry, entry.resized, (left, top)), 8).astype(np.float16)


@pytest.mark.parametrize("disk", [True, False])
def test_cached_masks_are_those_of_uncached_training(folders, subset, prepare, disk: bool) -> None:
    """As they are, and mirrored. An image of a subset without masks counts fully."""
    images, masks = folders
    (images.parent / "plain").mkdir()
    Image.new("RGB", (64, 64)).save(images.parent / "plain" / "e.png")
    index, store = prepare(subset(images, conditioning_data_dir=masks), subset(images.parent / "plain"), disk=disk)
    assert store is not None and len(index) == 6
    for row in range(5):
        straight, mirrored = store.read([row, row], [False, True])
        assert straight.dtype == np.float16 and 0 <= straight.min() < 0.4 < 0.6 < straight.max() <= 1
        assert np.array_equal(straight, expected(index, row))
        assert np.array_equal(mirrored, straight[:, ::-1])
    assert (store.read([5], [False]) == 1).all()


def test_a_run_without_masks_has_no_store(folders, subset, prepare, tmp_path: Path) -> None:
    assert prepare(subset(folders[0]))[1] is None
    assert not (tmp_path / "cache" / "masks").exists()


def mask_shards(tmp_path: Path) -> list[Shard]:
    (folder,) = (tmp_path / "cache" / "masks").iterdir()
    return local_shelf(folder, Kind("masks", folder.name)).open(check=False)


def keys_in(tmp_path: Path) -> list[bytes]:
    return [key.tobytes() for shard in mask_shards(tmp_path) for key in shard.keys]


def test_masks_are_found_again_by_content(folders, subset, prepare, tmp_path: Path) -> None:
    """A mask is made anew if it or the size of its image changes, and not if it is touched or moved."""
    images, masks = folders
    prepare(subset(images, conditioning_data_dir=masks))
    first = keys_in(tmp_path)
    assert len(first) == len(set(first)) == 4, "equal masks are stored once"
    for path in masks.iterdir():
        os.utime(path, (1, 1))
    prepare(subset(images, conditioning_data_dir=masks))
    assert keys_in(tmp_path) == first
    save_mask(masks / "b.png", (200, 180), 9)
    index, store = prepare(subset(images, conditioning_data_dir=masks))
    assert len(keys_in(tmp_path)) == 5
    assert np.array_equal(store.read([1], [False])[0], expected(index, 1))
    Image.new("RGB", (70, 70)).save(images / "c.png")
    with pytest.raises(UserError, match="the mask has 70x64 pixels, but its image 70x70"):
        prepare(subset(images, conditioning_data_dir=masks))


def test_masks_of_files_leave_the_keys_of_latents_as_they_are(folders, subset, dataset, tmp_path: Path) -> None:
    """alpha_mask changes pixels under transparent parts, so its latents have keys of their own."""
    images, masks = folders
    options = ({}, {"conditioning_data_dir": masks}, {"alpha_mask": True})
    indexes = [build_index([dataset(subset(images, **one))], tmp_path / "cache", "stop") for one in options]
    plain, with_files, with_alpha = (row_keys(index) for index in indexes)
    rows, contents = np.arange(5), np.zeros((5, 16), np.uint8)
    for mirrored in (False, True):
        assert np.array_equal(plain.keys(rows, contents, mirrored), with_files.keys(rows, contents, mirrored))
        assert (plain.keys(rows, contents, mirrored) != with_alpha.keys(rows, contents, mirrored)).any(axis=1).all()


def test_the_alpha_channel_is_cached_too(folders, subset, prepare) -> None:
    images, masks = folders
    for name in ("a.png", "b.png"):
        with Image.open(images / name) as image, Image.open(masks / name) as mask:
            image.putalpha(mask)
            image.save(images / name)
    index, store = prepare(subset(images, alpha_mask=True))
    assert all(np.array_equal(store.read([row], [False])[0], expected(index, row)) for row in range(5))
    assert [float(store.read([row], [False]).min()) < 1 for row in range(5)] == [True, True, False, False, False]


def test_masks_that_cannot_be_read_are_named_together(folders, subset, prepare) -> None:
    images, masks = folders
    for name in ("a.png", "d.png"):
        (masks / name).write_bytes((masks / name).read_bytes()[:120])
    (masks / "c.png").unlink()
    one = subset(images, conditioning_data_dir=masks)
    with pytest.raises(UserError) as caught:
        prepare(one)
    assert {Path(problem.file).name for problem in caught.value.problems} == {"a.png", "c.png", "d.png"}
    index, store = prepare(one, on_bad_image="skip")
    assert index.used.tolist() == [False, True, False, False, True]
    assert store.read([1], [False]).shape == (1, 8, 8)


def test_a_damaged_mask_is_named(folders, subset, prepare, tmp_path: Path) -> None:
    one = subset(folders[0], conditioning_data_dir=folders[1])
    _, store = prepare(one)
    for shard in mask_shards(tmp_path):
        with shard.path.open("r+b") as file:
            file.seek(shard.start)
            file.write(bytes(100))
    with pytest.raises(UserError, match=r"the mask of .* is damaged"):
        for row in range(5):
            store.read([row], [False])


def test_alpha_masks_are_found_in_columns(folders, subset, dataset, tmp_path: Path, monkeypatch) -> None:
    """No image is looked at by itself, because there may be millions. The hashes are those of single images."""
    images, masks = folders
    subsets = (
        subset(images, alpha_mask=True),
        subset(images, alpha_mask=True, resize_interpolation="area"),
        subset(images, conditioning_data_dir=masks),
        subset(images),
    )
    index = build_index([dataset(*subsets)], tmp_path / "cache", "stop")
    looked_at: list[int] = []
    original = Index.__getitem__
    monkeypatch.setattr(Index, "__getitem__", lambda self, row: looked_at.append(row) or original(self, row))
    files, bad = find_mask_files(index)
    assert len(files.rows) == 3 * len(SIZES) and not bad
    assert {subsets.index(original(index, row).subset) for row in looked_at} <= {2}
    for row, found in zip(files.rows.tolist(), files.geometry_hashes, strict=True):
        entry = original(index, row)
        channel = "red" if entry.subset.conditioning_data_dir else "alpha"
        sizes = (*entry.size, *entry.resized, entry.bucket.width, entry.bucket.height)
        text = " ".join(map(str, ("1", channel, entry.interpolation, *sizes)))
        assert found.tobytes() == hash16(text.encode())
