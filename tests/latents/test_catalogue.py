"""Shards in an object store, the catalogue, and local copies: what is asked for, and what damage does."""

import logging
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from sdxl_finetune.errors import UserError
from sdxl_finetune.latents import shards as shards_module
from sdxl_finetune.latents.catalogue import Shelf, local_shelf
from sdxl_finetune.latents.library import Library
from sdxl_finetune.latents.records import Records
from sdxl_finetune.latents.shards import Kind, Shard, ShardWriter, read_shard
from sdxl_finetune.storage import Address, LocalCopies, Location, copies, list_files, objects, read, write
from tests.s3_server import S3Server

KIND = Kind("latents", "vae")
FOLDER = Address("s3://bucket/cache/latents/vae")


def latents(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 4, 8, 8), np.float32).astype(np.float16)


def make(folder: Location, count: int, seed: int = 0, kept: LocalCopies | None = None) -> Shard:
    with ShardWriter(folder, KIND, 0, Path("/nowhere"), kept) as writer:
        for number, latent in enumerate(latents(count, seed)):
            writer.add(f"{seed:08d}{number:08d}".encode(), latent)
            writer.add_file(f"f{seed:07d}{number:08d}".encode(), f"c{seed:07d}{number:08d}".encode())
    (shard,) = writer.shards
    return shard


def same(a: Shard, b: Shard) -> bool:
    tables = (
        np.array_equal(getattr(a, name), getattr(b, name)) for name in ("keys", "crcs", "stat_hashes", "contents")
    )
    return (a.path, a.start, a.size) == (b.path, b.start, b.size) and all(tables)


@pytest.fixture(params=["local", "s3"])
def shelf(request: pytest.FixtureRequest, tmp_path: Path, s3: S3Server) -> Shelf:
    if request.param == "local":
        return local_shelf(tmp_path / "shards", KIND)
    return Shelf(FOLDER, KIND, tmp_path / "here" / "catalogue")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "PAUSES", (0.01,))


class TestCatalogue:
    def test_it_holds_what_the_shards_hold(self, shelf: Shelf) -> None:
        made = [make(shelf.folder, 5, seed) for seed in range(4)]
        for _ in range(2):
            opened = shelf.open(check=True)
            assert len(opened) == 4 and all(same(a, b) for a, b in zip(opened, made, strict=True))

    def test_known_shards_are_not_opened(self, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
        for seed in range(4):
            make(shelf.folder, 5, seed)
        shelf.open(check=True)
        make(shelf.folder, 5, 4)
        opened: list[Location] = []

        def noted(path: Location, *rest: object) -> Shard:
            opened.append(path)
            return read_shard(path, *rest)

        monkeypatch.setattr("sdxl_finetune.latents.catalogue.read_shard", noted)
        assert len(shelf.open(check=True)) == 5 and len(opened) == 1
        assert len(shelf.open(check=False)) == 5 and len(opened) == 1

    def test_a_start_from_the_store_costs_one_listing(self, s3: S3Server, tmp_path: Path) -> None:
        for seed in range(12):
            make(FOLDER, 3, seed)
        shelf = Shelf(FOLDER, KIND, tmp_path / "catalogue")
        s3.clear()
        shelf.open(check=True)
        assert s3.requests == {"GET": 1 + 12}, "a shard this small is read with its header"
        s3.clear()
        shelf.open(check=True)
        assert s3.requests == {"GET": 1}

    def test_tables_of_a_large_shard_cost_two_requests(self, s3: S3Server) -> None:
        make(FOLDER, 200)
        (found,) = list_files(FOLDER)
        s3.clear()
        shard = read_shard(FOLDER / found.name, KIND, found.size)
        assert s3.requests == {"GET": 2} and len(shard.keys) == 200

    def test_a_damaged_catalogue_is_made_again(self, shelf: Shelf) -> None:
        make(shelf.folder, 5)
        before = shelf.open(check=True)
        data = bytearray(shelf.catalogue.read_bytes())
        for position in (3, len(data) // 2, len(data) - 3):
            shelf.catalogue.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
            assert same(shelf.open(check=True)[0], before[0]), position
        for size in (0, 5, len(data) - 1):
            shelf.catalogue.write_bytes(data[:size])
            assert same(shelf.open(check=True)[0], before[0]), size

    def test_a_shard_that_vanished_is_forgotten(self, shelf: Shelf) -> None:
        from sdxl_finetune.storage import delete

        shards = [make(shelf.folder, 5, seed) for seed in range(3)]
        shelf.open(check=True)
        delete(shards[1].path)
        assert [shard.path for shard in shelf.open(check=True)] == [shards[0].path, shards[2].path]

    def test_a_damaged_shard_is_named_and_set_aside(self, shelf: Shelf, quick: None, caplog) -> None:
        sound, hurt, foreign = make(shelf.folder, 5), make(shelf.folder, 5, 1), shelf.folder / f"9{KIND.ending}"
        data = bytearray(read(hurt.path))
        data[-3] ^= 1
        write(hurt.path, bytes(data))
        write(foreign, b"no shard at all")
        with caplog.at_level(logging.WARNING):
            assert [shard.path for shard in shelf.open(check=True)] == [sound.path]
        assert caplog.text.count("is encoded again") == 2
        assert {found.name for found in list_files(shelf.folder) if found.name.endswith(KIND.ending)} == {
            sound.path.name
        }


class TestRecords:
    def records(self, shards: list[Shard], kept: LocalCopies | None) -> tuple[Records, Library]:
        library = Library(shards)
        return Records(library.files, kept), library

    def read(self, records: Records, library: Library, shard: Shard, number: int) -> np.ndarray:
        file, crc, start = library.places(shard.keys[number][None])[0].tolist()
        latent = np.empty((4, 8, 8), np.float16)
        records.read(file, start, crc, latent, lambda: "the latent of x.png")
        return latent

    def test_without_copies_one_request_reads_one_record(self, s3: S3Server) -> None:
        shard = make(FOLDER, 5)
        records, library = self.records([shard], None)
        s3.clear()
        assert np.array_equal(self.read(records, library, shard, 3), latents(5)[3])
        assert s3.requests == {"GET": 1}

    def test_a_copy_serves_all_further_reads(self, s3: S3Server, tmp_path: Path) -> None:
        shard = make(FOLDER, 5)
        kept = LocalCopies(tmp_path, 1 << 20)
        records, library = self.records([shard], kept)
        s3.clear()
        for number in range(5):
            assert np.array_equal(self.read(records, library, shard, number), latents(5)[number])
        other = self.records([shard], kept)[0]
        assert np.array_equal(self.read(other, library, shard, 2), latents(5)[2])
        assert s3.requests == {"HEAD": 1, "GET": 1}

    def test_a_written_shard_is_kept_at_once(self, s3: S3Server, tmp_path: Path) -> None:
        kept = LocalCopies(tmp_path, 1 << 20)
        shard = make(FOLDER, 5, kept=kept)
        s3.clear()
        assert np.array_equal(self.read(*self.records([shard], kept), shard, 1), latents(5)[1])
        assert not s3.requests

    @pytest.mark.parametrize("damage", ["bit", "short", "empty"])
    def test_a_damaged_copy_is_fetched_again(self, s3: S3Server, tmp_path: Path, caplog, damage: str) -> None:
        kept = LocalCopies(tmp_path, 1 << 20)
        shard = make(FOLDER, 5, kept=kept)
        assert isinstance(shard.path, Address)
        copy = kept.path(shard.path)
        data = bytearray(copy.read_bytes())
        data[shard.start + 4 * shard.size + 1] ^= 1
        copy.write_bytes({"bit": data, "short": data[: shard.start + 10], "empty": b""}[damage])
        records, library = self.records([shard], kept)
        for _ in range(2):
            assert np.array_equal(self.read(records, library, shard, 4), latents(5)[4])
        assert caplog.text.count("is fetched again") == 1 and copy.stat().st_size == len(data)

    def test_a_damaged_object_is_named_and_deleted(self, s3: S3Server, tmp_path: Path) -> None:
        shard = make(FOLDER, 5)
        data = bytearray(read(shard.path))
        data[shard.start + 1] ^= 1
        write(shard.path, bytes(data))
        for kept in (None, LocalCopies(tmp_path, 1 << 20)):
            write(shard.path, bytes(data))
            with pytest.raises(UserError, match=r"x\.png is damaged; the object is deleted: start the run again"):
                self.read(*self.records([shard], kept), shard, 0)
            assert not list(list_files(FOLDER))

    def test_a_missing_object_is_named(self, s3: S3Server, quick: None) -> None:
        shard = make(FOLDER, 5)
        objects.delete(shard.path)
        with pytest.raises(UserError, match=r"s3://bucket/cache.*x\.png cannot be read \(does not exist\)"):
            self.read(*self.records([shard], None), shard, 0)

    def test_many_files_are_read_with_few_open(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sdxl_finetune.latents.records.OPEN_FILES", 2)
        shards = [make(tmp_path, 2, seed) for seed in range(5)]
        records, library = self.records(shards, None)
        for seed in (0, 1, 2, 3, 4, 0, 1, 4, 4, 2):
            assert np.array_equal(self.read(records, library, shards[seed], 1), latents(2, seed)[1])
        assert len(records._open) == 2


class TestLocalCopies:
    def fill(self, count: int, size: int = 1000) -> list[Address]:
        addresses = [FOLDER / f"{number}" for number in range(count)]
        for address in addresses:
            write(address, os.urandom(size))
        return addresses

    def test_the_copy_used_longest_ago_goes_first(self, s3: S3Server, tmp_path: Path) -> None:
        kept, addresses = LocalCopies(tmp_path, 3000), self.fill(5)
        for number, address in enumerate(addresses[:3]):
            path = kept.find(address)
            assert path
            os.utime(path, (1000 + number, 1000 + number))
        assert kept.find(addresses[0])  # its use is noted now
        for address in addresses[3:]:
            assert kept.find(address)
        there = {address.name for address in addresses if kept.path(address).exists()}
        assert there == {"0", "3", "4"}
        assert sum(path.stat().st_size for path in tmp_path.rglob(f"*{copies.ENDING}")) <= 3000

    def test_copies_in_use_stay_and_the_rest_is_read_from_the_store(self, s3: S3Server, tmp_path: Path) -> None:
        kept, addresses = LocalCopies(tmp_path, 3000), self.fill(4)
        assert all(kept.find(address) for address in addresses[:3])
        assert kept.find(addresses[3]) is None

    def test_processes_that_want_the_same_object_fetch_it_once(self, s3: S3Server, tmp_path: Path) -> None:
        (address,) = self.fill(1, 1 << 20)
        kept = LocalCopies(tmp_path, 1 << 30)
        context = multiprocessing.get_context("spawn")
        running = [context.Process(target=kept.find, args=(address,)) for _ in range(3)]
        s3.clear()
        for process in running:
            process.start()
        for process in running:
            process.join(60)
            assert process.exitcode == 0
        assert s3.requests["GET"] == 1
        assert kept.path(address).read_bytes() == read(address)

    def test_a_full_disk_or_a_folder_that_cannot_be_written_is_no_error(
        self, s3: S3Server, tmp_path: Path, caplog
    ) -> None:
        (tmp_path / "file").write_text("")
        assert LocalCopies(tmp_path / "file" / "folder", 1 << 30).find(self.fill(1)[0]) is None
        assert "no local copy" in caplog.text


def test_shards_at_an_address_appear_whole(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "MAX_BYTES", 5 * 512)
    with ShardWriter(FOLDER, KIND, 7, Path("/nowhere")) as writer:
        for number, latent in enumerate(latents(12)):
            writer.add(f"{number:016d}".encode(), latent)
    assert [len(shard.keys) for shard in writer.shards] == [5, 5, 2]
    assert {found.name for found in list_files(FOLDER)} == {shard.path.name for shard in writer.shards}
    assert all("-00007-" in shard.path.name for shard in writer.shards)
