"""Shards: what is damaged, foreign or unfinished is never trusted, and is found out when it should be."""

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sdxl_finetune.errors import UserError
from sdxl_finetune.latents import shards as shards_module
from sdxl_finetune.latents.catalogue import local_shelf
from sdxl_finetune.latents.library import Library, Lookup
from sdxl_finetune.latents.shards import Kind, Shard, ShardWriter, nameless_file

VAE = Kind("latents", "vae")


def open_shards(folder: Path, kind: Kind, *, check: bool) -> list[Shard]:
    return local_shelf(folder, kind).open(check=check)


def hashes(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16), np.uint8)


def latents(count: int, shape: tuple[int, ...] = (4, 8, 8), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, *shape), np.float32).astype(np.float16)


def write(folder: Path | None, count: int, seed: int = 0, shape: tuple[int, ...] = (4, 8, 8)) -> list[Shard]:
    # In the order of memory in which convolutions may leave them.
    values = np.ascontiguousarray(latents(count, shape, seed).transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    with ShardWriter(folder, VAE, 0, Path("/nowhere")) as writer:
        keys, files = hashes(count, seed), hashes(count, seed + 1000)
        for key, file, latent in zip(keys, files, values, strict=True):
            writer.add(key.tobytes(), latent)
            writer.add_file(file.tobytes(), key[::-1].tobytes())
    return writer.shards


def read(library: Library, key: np.ndarray, shape: tuple[int, ...] = (4, 8, 8)) -> np.ndarray:
    place = library.places(key[None])[0]
    with library.files[place["file"]].open("rb") as file:
        file.seek(int(place["start"]))
        return np.frombuffer(file.read(2 * int(np.prod(shape))), np.float16).reshape(shape)


@pytest.mark.parametrize("disk", [True, False])
def test_every_latent_and_file_is_found(tmp_path: Path, monkeypatch, disk: bool) -> None:
    monkeypatch.setattr(shards_module, "MAX_BYTES", 5 * 4 * 8 * 8 * 2)
    folder = tmp_path if disk else None
    written = write(folder, 12) + write(folder, 3, seed=1, shape=(4, 4, 12))
    assert [len(shard.keys) for shard in written] == [5, 5, 2, 3]
    library = Library(written)
    for number, key in enumerate(hashes(12)):
        assert np.array_equal(read(library, key), latents(12)[number])
    assert np.array_equal(read(library, hashes(3, 1)[2], (4, 4, 12)), latents(3, (4, 4, 12), 1)[2])
    known, digests = library.contents(np.concatenate([hashes(12, 1000), hashes(2, 99)]))
    assert known.tolist() == list(range(12)) and np.array_equal(digests, hashes(12)[:, ::-1])
    assert library.places(hashes(2, 98))["file"].tolist() == [-1, -1]
    if disk:
        again = open_shards(tmp_path, VAE, check=True)
        assert [shard.path for shard in again] == [shard.path for shard in written]
        assert all(np.array_equal(a.keys, b.keys) and a.start == b.start for a, b in zip(again, written, strict=True))


def test_the_oldest_of_equal_keys_counts(tmp_path: Path) -> None:
    first, second = write(tmp_path, 4), write(tmp_path, 4)
    assert first[0].path.name < second[0].path.name
    places = Library(open_shards(tmp_path, VAE, check=False)).places(hashes(4))
    assert places["file"].tolist() == [0] * 4


def test_hashes_that_end_in_zeros_are_told_apart() -> None:
    table = np.zeros((3, 16), np.uint8)
    table[1, 14], table[2, 0] = 1, 1
    lookup = Lookup(table)
    assert lookup.find(table[[2, 0, 1]]).tolist() == [2, 0, 1]
    assert lookup.find(np.full((1, 16), 7, np.uint8)).tolist() == [-1]
    assert Lookup(table[:0]).find(table).tolist() == [-1] * 3


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def cut_in_the_header(path: Path) -> None:
    os.truncate(path, 20)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def no_shard(path: Path) -> None:
    save_file({"latents": latents(2)}, path)


def of_another_vae(path: Path) -> None:
    tensors, start = load_file(path), path.read_bytes()
    header = json.loads(start[8 : 8 + int.from_bytes(start[:8], "little")])
    save_file(tensors, path, {**header["__metadata__"], "encoder": "another"})


def other_keys(path: Path) -> None:
    data = path.read_bytes()
    key = hashes(6)[2].tobytes()
    assert key in data
    path.write_bytes(data.replace(key, key[::-1]))


def one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    at = data.index(latents(6)[3].tobytes()[:64])
    data[at + 5] ^= 1
    path.write_bytes(data)


DAMAGES = [cut_short, cut_in_the_header, empty, no_shard, of_another_vae, other_keys, one_bit]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_set_aside(tmp_path: Path, caplog, damage) -> None:
    (sound,), (hurt,) = write(tmp_path, 6, seed=5), write(tmp_path, 6)
    assert len(open_shards(tmp_path, VAE, check=True)) == 2
    damage(hurt.path)
    os.utime(hurt.path, (1, 1))
    with caplog.at_level(logging.WARNING):
        opened = open_shards(tmp_path, VAE, check=True)
    assert [shard.path for shard in opened] == [sound.path]
    assert caplog.text.count(str(hurt.path)) == 1 and "encoded again" in caplog.text
    assert not hurt.path.exists() and hurt.path.with_suffix(".damaged").exists()


def test_a_damaged_file_that_cannot_be_renamed_is_told(tmp_path: Path, caplog) -> None:
    (hurt,) = write(tmp_path, 6)
    cut_short(hurt.path)
    hurt.path.with_suffix(".damaged").mkdir()
    assert open_shards(tmp_path, VAE, check=True) == []
    assert "cannot be renamed" in caplog.text and "is renamed to" not in caplog.text


def test_latents_are_read_through_only_when_the_file_is_another_than_before(tmp_path: Path, monkeypatch) -> None:
    (shard,) = write(tmp_path, 6)
    assert len(open_shards(tmp_path, VAE, check=True)) == 1
    state = shard.path.stat()
    one_bit(shard.path)
    os.utime(shard.path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert len(open_shards(tmp_path, VAE, check=True)) == 1, "as the file system tells, nothing happened"
    os.utime(shard.path, (1, 1))
    assert len(open_shards(tmp_path, VAE, check=False)) == 1, "a reader leaves it to the first process"
    (tmp_path / "checked.json").write_text("{half")
    assert open_shards(tmp_path, VAE, check=True) == []


def test_unfinished_files_of_killed_processes_go(tmp_path: Path) -> None:
    write(tmp_path, 1)
    old, young = (tmp_path / f".0-{number}.latents.{number}.tmp" for number in (1, 2))
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    open_shards(tmp_path, VAE, check=True)
    assert young.exists() and not old.exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"latents cannot be written \(Not a directory"):
        write(tmp_path / "file" / "folder", 1)


def test_systems_without_nameless_files(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delattr(shards_module.os, "memfd_create")
    path = nameless_file(tmp_path / "new")
    assert path.parent == tmp_path / "new" and path.stat().st_size == 0
