"""Latents are functions of what an image holds and how it is cut: the same in any batch and from any store."""

import multiprocessing
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sdxl_finetune.batch import LatentSize, to_images
from sdxl_finetune.data.index import Index, build_index
from sdxl_finetune.errors import UserError
from sdxl_finetune.latents.store import LatentStore

SIZES = {"a.png": (64, 64), "b.jpg": (80, 64), "c.png": (160, 64), "d.webp": (64, 160), "e.png": (70, 70)}


@pytest.fixture
def build(tmp_path: Path, subset, dataset):
    """build(): the index of the images in `plain` and `flipped`, as they are then."""

    def build(**options) -> Index:
        subsets = subset(tmp_path / "plain"), subset(tmp_path / "flipped", **{"flip_aug": True, **options})
        return build_index([dataset(*subsets)], tmp_path / "cache", on_bad_image="stop")

    return build


@pytest.fixture
def index(tmp_path: Path, write_images, build) -> Index:
    write_images(tmp_path / "plain", SIZES)
    write_images(tmp_path / "flipped", {f"x{name}": size for name, size in SIZES.items()}, seed=100)
    return build()


def vae(images: Tensor, noise: Tensor) -> Tensor:
    """One of one line: means over 8 x 8 pixels, and a deviation of 0.1."""
    means = torch.nn.functional.avg_pool2d(images, 8)
    return torch.cat([means, means.mean(1, keepdim=True)], 1) + 0.1 * noise


def encode(pixels: Tensor, noise: Tensor):
    latents = vae(to_images(pixels), noise).half()
    return lambda: latents


def all_latents(store: LatentStore) -> list[np.ndarray]:
    rows = np.flatnonzero(store.index.repeats).tolist()
    flips = store.index.flips.tolist()
    read = [store.read([row], [flip])[0] for row in rows for flip in sorted({False, flips[row]})]
    assert all(latent.any() for latent in read)
    return read


def equal(left: list[np.ndarray], right: list[np.ndarray]) -> bool:
    return len(left) == len(right) and all(map(np.array_equal, left, right))


def test_any_batch_size_number_of_parts_and_place(index: Index, tmp_path: Path, cache_latents) -> None:
    expected = all_latents(cache_latents(index, encode, batch_size=1)[0])
    for options in ({"batch_size": 4}, {"batch_size": 3, "parts": 2}, {"folder": tmp_path / "disk", "parts": 3}):
        store, report, _ = cache_latents(index, encode, **options)
        assert equal(all_latents(store), expected) and report.counts == {"encoded": 10} and not report.bad


def test_what_is_stored(index: Index, cache_latents, tmp_path: Path) -> None:
    store, _, shards = cache_latents(index, encode)
    assert sum(len(shard.keys) * shard.size for shard in shards) == 2 * sum(map(np.size, all_latents(store)))
    row = next(row for row in range(len(index)) if index[row].path.name == "xc.png")
    entry = index[row]
    assert (entry.bucket.width, entry.bucket.height) == (96, 32) and entry.resized == (96, 38)
    pixels = to_images(torch.from_numpy(entry.load((0, 3))[None]))
    assert pixels.min() >= -1 and pixels.max() <= 1 and pixels.shape == (1, 3, 32, 96)
    means = vae(pixels, torch.zeros(1, 4, 4, 12))
    plain, mirrored = (torch.from_numpy(store.read([row], [flip])).float() for flip in (False, True))
    assert plain.shape == means.shape and 0.08 < (plain - means).std() < 0.12
    assert 0.08 < (mirrored - means.flip(3)).std() < 0.12
    assert not torch.allclose(mirrored, plain.flip(3), atol=0.05), "encoded by itself, with its own noise"


def test_one_image_in_two_subsets_is_encoded_once(index: Index, subset, dataset, tmp_path: Path, cache_latents) -> None:
    folder = tmp_path / "plain"
    index = build_index(
        [dataset(subset(folder), subset(folder, flip_aug=True))], tmp_path / "cache", on_bad_image="stop"
    )
    store, report, shards = cache_latents(index, encode)
    assert sum(len(shard.keys) for shard in shards) == 10, "each as it is and mirrored, and no more"
    assert equal(list(store.read([0], [False])), list(store.read([5], [False])))
    assert {frozenset(pair) for pair in report.duplicates.items()} == {frozenset((row, row + 5)) for row in range(5)}


def _read(store: LatentStore, connection) -> None:
    connection.send((store.read([0, 1], [False, False]).sum(dtype=np.float64), len(pickle.dumps(store))))


@pytest.mark.parametrize("disk", [False, True])
def test_another_process_reads_the_same_files(index: Index, tmp_path: Path, cache_latents, disk: bool) -> None:
    store = cache_latents(index, encode, folder=tmp_path / "disk" if disk else None)[0]
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_read, args=(store, sender))
    process.start()
    total, size = receiver.recv()
    process.join()
    assert total == store.read([0, 1], [False, False]).sum(dtype=np.float64) and size < 5000


def test_bad_images(index: Index, cache_latents) -> None:
    """Half a file, another image, no file, a latent that is not finite: named, the others encoded."""
    rows = {index[row].path.name: row for row in range(len(index))}
    half = index[rows["a.png"]].path
    state = half.stat()
    index[rows["b.jpg"]].path.write_bytes(index[rows["c.png"]].path.read_bytes())
    index[rows["e.png"]].path.unlink()

    def explode(pixels: Tensor, noise: Tensor):
        latents = encode(pixels, noise)()
        if pixels.shape[1:3] == (96, 32):
            latents[0, 0, 0, 0] = float("nan")
        return lambda: latents

    store, report, _ = cache_latents(index, explode, batch_size=1)
    bad = {index[row].path.name: problem for row, problem in report.bad.items()}
    assert sorted(bad) == ["b.jpg", "d.webp", "e.png", "xd.webp"]
    assert [problem.file for problem in report.bad.values()] == [str(index[row].path) for row in report.bad]
    assert "NaN" in bad["d.webp"].message and "No such file" in bad["e.png"].message
    assert "changed since it was scanned" in bad["b.jpg"].message
    left = index.without(report.bad)
    assert left.repeats.sum() == index.repeats.sum() - 4 and left.facts() != index.facts()
    assert store.read([rows["a.png"]], [False]).any()
    half.write_bytes(half.read_bytes()[: state.st_size // 2])
    report = cache_latents(index, encode)[1]
    assert "truncated" in report.bad[rows["a.png"]].message or "changed" in report.bad[rows["a.png"]].message


def changes(index: Index, tmp_path: Path, cache_latents, encode=encode) -> dict[str, int]:
    """What a further run over the same folder of shards does."""
    store, report, _ = cache_latents(index, encode, folder=tmp_path / "disk")
    all_latents(store)
    return dict(report.counts)


def test_only_what_changed_is_encoded_again(index: Index, build, tmp_path: Path, cache_latents, write_images) -> None:
    first = cache_latents(index, encode, folder=tmp_path / "disk")[0]
    assert changes(index, tmp_path, cache_latents) == {}
    image = tmp_path / "plain" / "a.png"
    os.utime(image, (1, 1))
    image.with_name("b.jpg").rename(image.with_name("z.jpg"))
    shutil.copytree(tmp_path / "flipped", tmp_path / "copy", copy_function=shutil.copy)
    shutil.rmtree(tmp_path / "flipped")
    (tmp_path / "copy").rename(tmp_path / "flipped")
    assert changes(build(), tmp_path, cache_latents) == {"found again": 7}
    assert changes(build(), tmp_path, cache_latents) == {}
    write_images(tmp_path / "plain", {"a.png": (64, 64)}, seed=9)
    write_images(tmp_path / "plain", {"new.png": (64, 64)}, seed=10)
    assert changes(build(), tmp_path, cache_latents) == {"encoded": 2}
    image.unlink()
    assert changes(build(flip_aug=False), tmp_path, cache_latents) == {}
    again = cache_latents(build(), encode, folder=tmp_path / "disk")[0]
    old = {first.index[row].path.name: first.read([row], [False]) for row in range(len(first.index))}
    for row in range(len(again.index)):
        name = again.index[row].path.name.replace("z.jpg", "b.jpg")
        assert name == "new.png" or np.array_equal(old[name], again.read([row], [False]))


def test_a_flip_or_another_geometry_is_encoded_and_the_rest_kept(
    index: Index, subset, dataset, tmp_path: Path, cache_latents
) -> None:
    def counts(**options) -> tuple[int, int]:
        flips = {"flip_aug": True} if options.pop("flip", False) else {}
        how = {"resize_interpolation": options.pop("resize_interpolation", None)}
        subsets = [subset(tmp_path / "plain", **flips, **how), subset(tmp_path / "flipped", flip_aug=True, **how)]
        index = build_index([dataset(*subsets, **options)], tmp_path / "cache", on_bad_image="stop")
        _, report, shards = cache_latents(index, encode, folder=tmp_path / "disk")
        return report.counts["encoded"], sum(len(shard.keys) for shard in shards)

    assert counts() == (10, 15)
    assert counts(flip=True) == (5, 20), "only the mirrored ones are new"
    assert counts(resize_interpolation="lanczos") == (10, 35)
    assert counts(resolution=(96, 96))[0] >= 8
    assert counts(flip=True)[0] == counts()[0] == 0


def test_an_interrupted_run_keeps_what_it_finished(index: Index, tmp_path: Path, cache_latents) -> None:
    from sdxl_finetune.latents.encoding import Encoding, encode_images
    from sdxl_finetune.latents.keys import row_keys
    from sdxl_finetune.latents.library import Library
    from sdxl_finetune.latents.shards import Kind, ShardWriter
    from sdxl_finetune.latents.store import find_places, missing_rows

    folder, keys, library = tmp_path / "disk", row_keys(index), Library([])
    rows = missing_rows(index, find_places(index, keys, library))
    settings = {"latent_size": LatentSize(), "batch_size": 1, "threads": 1}
    job = Encoding(index=index, keys=keys, known=library, encode=encode, **settings)
    with ShardWriter(folder, Kind("latents", "vae"), 0, tmp_path) as writer:
        images = encode_images(job, rows, writer)
        assert [next(images) for _ in range(3)] == [1, 1, 1]
        images.close()
    done = job.report.counts["encoded"]
    assert 3 < done < 6, "and what the device was at"
    assert changes(index, tmp_path, cache_latents) == {"encoded": 10 - done}


def test_damage_is_noticed_when_a_latent_is_read(index: Index, tmp_path: Path, cache_latents) -> None:
    store, _, shards = cache_latents(index, encode, folder=tmp_path / "disk")
    with shards[0].path.open("r+b") as file:
        file.seek(shards[0].start + 5)
        file.write(b"\xff\xff")
    plain = store.places[:, 0]
    here = (plain["file"] == store.records.files.index(shards[0].path)) & (plain["start"] == shards[0].start)
    row = int(np.flatnonzero(here)[0])
    with pytest.raises(UserError, match=r"is damaged.*start the run again") as caught:
        store.read([row], [False])
    assert str(index[row].path) in str(caught.value) and str(shards[0].path) in str(caught.value)
    with pytest.raises(UserError, match="cannot be read"):
        store.read([row], [False])
    assert shards[0].path.with_suffix(".damaged").is_file() and not shards[0].path.exists()
    assert changes(index, tmp_path, cache_latents)["encoded"] >= 1
