"""Images in an object store: the same as in a folder, with few requests, from a real S3 server on the loopback."""

import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from sdxl_finetune.config import load_config, load_datasets
from sdxl_finetune.config.dataset import find_folders
from sdxl_finetune.data.images import ImageError
from sdxl_finetune.data.index import Index, build_index
from sdxl_finetune.data.listing import list_all
from sdxl_finetune.data.sources.listed import Listing
from sdxl_finetune.errors import UserError
from sdxl_finetune.storage import Address, delete, open_location, write
from sdxl_finetune.storage.objects import _store
from tests.data.conftest import SIZES
from tests.data.test_tars import Pack, captions, messages, picture
from tests.latents.test_encoding import encode
from tests.s3_server import BUCKET, Proxy, S3Server, environment, running_server

ROOT = Address(f"s3://{BUCKET}")


@pytest.fixture(scope="module")
def running() -> Iterator[S3Server]:
    with running_server() as server:
        yield server


@pytest.fixture
def server(running: S3Server, monkeypatch, tmp_path: Path) -> Iterator[S3Server]:
    """The server, and an environment that leads to it."""
    for name, value in environment(running.port).items():
        monkeypatch.setenv(name, value)
    running.clear()
    yield running
    _store.cache_clear()


@pytest.fixture
def upload(server: S3Server, tmp_path: Path) -> Callable[[Path], Address]:
    """upload(folder): the address below which all files of a folder are."""

    def upload(folder: Path) -> Address:
        address = ROOT / tmp_path.name / folder.name
        for path in folder.rglob("*"):
            if path.is_file():
                write(address / path.relative_to(folder).as_posix(), path)
        server.clear()
        return address

    return upload


@pytest.fixture
def index_of(tmp_path: Path, subset, dataset) -> Callable[..., Index]:
    def index_of(place: Path | Address, **options: object) -> Index:
        return build_index([dataset(subset(place, **options))], tmp_path / "cache", "stop")

    return index_of


@pytest.fixture
def listing(tmp_path: Path, subset) -> Callable[..., Listing]:
    def listing(place: Address, **options: object) -> Listing:
        return list_all([subset(place, **options)], tmp_path / "cache")[0]

    return listing


def assert_same(plain: Index, other: Index) -> None:
    assert len(plain) == len(other) == len(SIZES)
    for row in range(len(plain)):
        one, same = plain[row], other[row]
        assert (one.path.name, one.captions, one.size, one.bucket) == (
            same.path.name,
            same.captions,
            same.size,
            same.bucket,
        )
        assert same.read() == one.path.read_bytes() and np.array_equal(one.load((0, 0)), same.load((0, 0)))


def test_the_same_images_as_in_a_folder(images, tmp_path: Path, upload, server: S3Server, index_of) -> None:
    address = upload(tmp_path / "plain")
    index = index_of(address)
    # One listing, and for each image its first kilobytes and its caption.
    assert server.requests == {"GET": 1 + 2 * len(SIZES)}
    server.clear()
    assert index[0].path == address / "a.png" and index_of(address).facts() == index.facts()
    assert server.requests == {"GET": 1}, "what is known is not asked for again"
    assert_same(index_of(tmp_path / "plain"), index)


def test_only_what_has_changed_is_read_again(images, tmp_path: Path, upload, server: S3Server, index_of) -> None:
    address = upload(tmp_path / "plain")
    index_of(address)
    write(address / "b.caption", b"another")
    write(address / "c.webp", picture(3, "WEBP"))
    delete(address / "d.bmp")
    write(address / "f.png", picture())
    server.clear()
    index = index_of(address)
    assert server.requests == {"GET": 1 + 2 + 2 + 1}
    assert [index[row].caption for row in range(len(index))] == [
        "a picture of a\nanother line",
        "another",
        "a picture of c\nanother line",
        "a picture of e\nanother line",
        "",
    ]
    assert index[2].size == (40, 30)


def test_large_images_are_not_read_for_their_size(tmp_path: Path, upload, server: S3Server, listing) -> None:
    folder = tmp_path / "large"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (500, 600, 3), np.uint8)
    for name in ("a.png", "b.jpg", "c.bmp", "d.webp"):
        Image.fromarray(noise).save(folder / name)
    address = upload(folder)
    table = listing(address).table
    assert table["width"].to_pylist() == [600] * 4 and table["height"].to_pylist() == [500] * 4
    assert server.requests == {"GET": 1 + 4}


def test_tars_in_a_store(images, tmp_path: Path, pack: Pack, upload, server: S3Server, index_of) -> None:
    names = list(images)
    for number in range(2):
        pack(f"{number}.tar", {name: images[name] for name in names[number::2]} | {"big.bin": bytes(3_000_000)})
    pack("0.tar", {name: images[name] for name in names[:6]} | {"z.bin": bytes(3_000_000), "z.txt": b""})
    pack("1.tar", {name: images[name] for name in names[6:]})
    address = upload(tmp_path / "tars")
    index = index_of(address)
    # A look for the kind, the listing, and for each tar file its headers: the large member is left out.
    assert server.requests["GET"] <= 2 + 4 + 2 and set(server.requests) == {"GET"}
    assert index[0].path == address / "0.tar" / "a.png"
    assert_same(index_of(tmp_path / "plain"), index)
    server.clear()
    assert index_of(address).facts() == index.facts() and server.requests == {"GET": 2}
    server.clear()
    assert_same(index_of(tmp_path / "plain"), index_of(address, tar_files="{0..1}.tar"))


def test_changed_and_missing_objects_are_noticed(images, tmp_path: Path, pack: Pack, upload, index_of) -> None:
    pack("x.tar", images)
    plain, tars = upload(tmp_path / "plain"), upload(tmp_path / "tars")
    in_store, in_tar = index_of(plain), index_of(tars)
    write(plain / "a.png", picture(1))
    write(tars / "x.tar", pack("x.tar", {"a.png": picture(1), **images}))
    with pytest.raises(ImageError, match="changed since it was scanned"):
        in_store[0].read(unchanged=True)
    for row in range(len(SIZES)):
        with pytest.raises(ImageError, match=r"x\.tar was changed since it was scanned"):
            in_tar[row].read()
    delete(plain / "a.png")
    with pytest.raises(ImageError) as caught:
        in_store[0].read()
    assert caught.value.path == str(plain / "a.png") and "does not exist" in caught.value.reason


def test_bad_objects_are_counted(upload, tmp_path: Path, listing) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    for name, data in {"a.png": picture(), "b.png": b"", "c.png": b"text", "d.png": picture()[:20]}.items():
        (folder / name).write_bytes(data)
    (folder / "a.caption").write_bytes(b"\xff")
    (folder / "e.jpg").write_bytes(picture(0, "JPEG"))
    found = listing(upload(folder))
    assert list(captions(found)) == ["e.jpg"] and len(found.problems) == 4
    assert "the file is empty" in messages(found) and any("not UTF-8" in message for message in messages(found))
    with pytest.raises(UserError, match="holds no images"):
        listing(ROOT / "nothing")


def test_metadata_in_a_store(images, tmp_path: Path, upload, server: S3Server, index_of) -> None:
    lines = [{"image_path": name, "caption": f"a picture of {name[0]}\nanother line"} for name in SIZES]
    folder = tmp_path / "metadata"
    (folder / "parts").mkdir(parents=True)
    (folder / "meta.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "meta.json").write_text(json.dumps({line["image_path"]: {"caption": line["caption"]} for line in lines}))
    for number in range(2):
        columns = {key: [line[key] for line in lines[number::2]] for key in ("image_path", "caption")}
        pa.parquet.write_table(pa.table(columns), folder / "parts" / f"{number}.parquet")
    plain, metadata = upload(tmp_path / "plain"), upload(folder)
    expected = index_of(tmp_path / "plain")
    for name in ("meta.jsonl", "meta.json", "parts", "parts/0.parquet"):
        index = index_of(plain, metadata_file=metadata / name)
        assert len(index) == (3 if name == "parts/0.parquet" else len(SIZES))
        assert all(index[row].caption for row in range(len(index)))
        if name != "parts/0.parquet":
            assert_same(expected, index)
    server.clear()
    with pytest.raises(UserError, match="gone"):
        index_of(plain, metadata_file=metadata / "gone.jsonl")


def test_folders_below_an_address(tmp_path: Path, upload, server: S3Server) -> None:
    folder = tmp_path / "root"
    files = ["5_cat/1.png", "5_cat/1.txt", "12_dog/x.tar", "3_empty/1.txt", "other/1.png", "loose.txt", "6_b c/é.jpg"]
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(b"")
    address = upload(folder)
    found = find_folders(address)
    assert sorted(found.used) == [
        (address / "12_dog", 12, "dog"),
        (address / "5_cat", 5, "cat"),
        (address / "6_b c", 6, "b c"),
    ]
    assert server.requests["GET"] <= 8 and len(found.remarks) == 2 and found.problem is None
    assert find_folders(address / "other").used == [(address / "other", None, None)]
    assert find_folders(address / "12_dog").used == [(address / "12_dog", None, None)]
    assert "no images" in str(find_folders(address / "nowhere").problem)


def test_latents_are_found_again_across_all_sources(
    images,
    tmp_path: Path,
    pack: Pack,
    upload,
    index_of,
    cache_latents,
) -> None:
    pack("x.tar", images)
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({name: {"caption": name[0]} for name in SIZES}))
    places = [tmp_path / "plain", tmp_path / "tars", upload(tmp_path / "plain"), upload(tmp_path / "tars")]
    found = []
    for place in places:
        index = index_of(place, **({"metadata_file": meta} if place == places[0] else {}))
        store, report, _ = cache_latents(index, encode, folder=tmp_path / "latents")
        found.append([store.read([row], [False])[0] for row in range(len(index))])
        assert report.counts == {"encoded" if len(found) == 1 else "found again": len(SIZES)}
        assert not report.bad
    assert all(np.array_equal(one, other) for latents in found for one, other in zip(found[0], latents, strict=True))


def _read_all(index: Index, results: "multiprocessing.Queue[list[bytes]]") -> None:
    results.put([index[row].read() for row in range(len(index))])


def test_other_processes_read_by_themselves(images, tmp_path: Path, pack: Pack, upload, index_of) -> None:
    pack("x.tar", images)
    index = index_of(upload(tmp_path / "tars"))
    expected = [index[row].read() for row in range(len(index))]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_read_all, args=(index, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=300) for _ in workers] == [expected] * 2
    for worker in workers:
        worker.join()


def test_an_object_reads_as_a_file_does(tmp_path: Path, upload, server: S3Server) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    data = np.random.default_rng(1).bytes(700_000)
    (folder / "x.bin").write_bytes(data)
    place = upload(folder) / "x.bin"
    rng = np.random.default_rng(2)
    with open_location(place) as file:
        for start, length in zip(
            rng.integers(0, 700_100, 50).tolist(), rng.integers(0, 3000, 50).tolist(), strict=True
        ):
            file.seek(start)
            assert file.read(length) == data[start : start + length]
    server.clear()
    with open_location(place, len(data)) as file:
        assert file.read() == data
    assert server.requests["GET"] <= 5
    shutil.rmtree(folder)


def test_a_broken_connection_is_tried_again(
    images, tmp_path: Path, upload, running: S3Server, monkeypatch, index_of
) -> None:
    address = upload(tmp_path / "plain")
    proxy = Proxy(running.port, faults=3, limit=300)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    _store.cache_clear()
    assert_same(index_of(tmp_path / "plain"), index_of(address))
    assert proxy.connections > 3
    proxy.close()


def test_a_store_that_does_not_answer_is_named(server: S3Server, monkeypatch, index_of) -> None:
    monkeypatch.setattr("sdxl_finetune.storage.objects.PAUSES", ())
    with pytest.raises(UserError, match=r"s3://nowhere/folder: cannot be listed.*bucket does not exist"):
        index_of(Address("s3://nowhere/folder"))
    with pytest.raises(UserError, match=r"gone\.parquet: .*(does not exist|cannot be read)"):
        index_of(ROOT, metadata_file=ROOT / "gone.parquet")


@pytest.mark.parametrize("text", ["ftp://x/y", "s3://", "s3://key:secret@bucket/x", "s3://bucket/../x"])
def test_impossible_addresses_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "data.toml").write_text(f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{text}'\n")
    options = ["--pretrained_model_name_or_path", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    options += ["--max_train_steps", "1"]
    with pytest.raises(UserError, match="must be a path, or an address") as caught:
        load_config([*options, "--resolution", "64", "--train_data_dir", text], program="sdxl-train")
    config = load_config([*options, "--dataset_config", str(tmp_path / "data.toml")], program="sdxl-train")
    assert config is not None
    with pytest.raises(UserError, match=r"image_dir.*address") as caught_in_file:
        load_datasets(config)
    assert "secret" not in str(caught_in_file.value) and len(caught.value.problems) == 1


def test_face_cutouts_below_an_address_share_the_caption_of_their_image(upload, tmp_path: Path, listing) -> None:
    folder = tmp_path / "faces"
    folder.mkdir()
    for number, name in enumerate(("cat", "cat_10_20_5_5", "cat_1_2_3_4", "dog_1_2_3_4")):
        (folder / f"{name}.png").write_bytes(picture(number))
    (folder / "cat.caption").write_text("a cat")
    (folder / "cat_1_2_3_4.caption").write_text("its face")
    expected = {"cat.png": "a cat", "cat_10_20_5_5.png": "a cat", "cat_1_2_3_4.png": "its face", "dog_1_2_3_4.png": ""}
    assert captions(listing(upload(folder))) == {name: [text] for name, text in expected.items()}
