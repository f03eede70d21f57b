"""Tar shards: the same images as in a folder, whatever the order of members, and every broken tar is told."""

import gzip
import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from sdxl_finetune.config.caption_sources import read_sources
from sdxl_finetune.data.images import ImageError
from sdxl_finetune.data.index import Index, build_index
from sdxl_finetune.data.listing import list_all
from sdxl_finetune.data.scan import scan
from sdxl_finetune.data.sources import tar_files
from sdxl_finetune.data.sources.listed import Listing
from sdxl_finetune.data.sources.tars import expand
from sdxl_finetune.errors import UserError
from tests.data.conftest import SIZES

Pack = Callable[..., Path]


@pytest.fixture
def listing(tmp_path: Path, subset) -> Callable[..., Listing]:
    """listing(**options): the listing of the tar files in the folder `tars`."""

    def listing(**options: object) -> Listing:
        return list_all([subset(tmp_path / "tars", **options)], tmp_path / "cache")[0]

    return listing


def picture(color: int = 0, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (color, 0, 0)).save(file, kind)
    return file.getvalue()


def captions(listing: Listing) -> dict[str, list[str | None]]:
    return {row["name"].decode(): row["captions"] for row in listing.table.to_pylist()}


def messages(listing: Listing) -> list[str]:
    return [problem.message for problem in listing.problems.problems()]


def test_names_with_ranges() -> None:
    assert expand("data-{000..003}.tar") == ["data-000.tar", "data-001.tar", "data-002.tar", "data-003.tar"]
    assert expand("{9..11}-{0..1}.tar") == ["9-0.tar", "9-1.tar", "10-0.tar", "10-1.tar", "11-0.tar", "11-1.tar"]
    assert expand("one.tar") == ["one.tar"] and expand("{b..a}.tar") == ["{b..a}.tar"]
    for impossible in ("{5..3}.tar", "{0..999999999999}.tar", "{0..9999}-{0..9999}.tar"):
        with pytest.raises(UserError, match="must rise, and all of them may name 1,000,000 tar files"):
            expand(impossible)


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_the_same_images_as_in_a_folder(
    format: int, tmp_path: Path, pack: Pack, images: dict[str, bytes], subset, dataset
) -> None:
    names = list(images)
    random.Random(format).shuffle(names)
    pack("data-1.tar", {f"./{name}" if name > "c" else name: images[name] for name in names}, format)
    (tmp_path / "tars" / "stats.json").write_text("{}")
    plain, packed = (
        build_index([dataset(subset(tmp_path / folder))], tmp_path / "cache", "stop") for folder in ("plain", "tars")
    )
    assert len(plain) == len(packed) == len(SIZES)
    for row in range(len(plain)):
        one, other = plain[row], packed[row]
        assert other.path == tmp_path / "tars" / "data-1.tar" / one.path.name
        assert (one.captions, one.size, one.resized, one.bucket) == (
            other.captions,
            other.size,
            other.resized,
            other.bucket,
        )
        assert other.read() == other.read(unchanged=True) == one.path.read_bytes()
        assert np.array_equal(one.load((0, 0)), other.load((0, 0)))


def test_long_and_unusual_names(pack: Pack, listing) -> None:
    long = "/".join(["folder" * 10] * 3) + "/" + "name" * 40
    for number, format in enumerate([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]):
        members = {
            f"{long}.png": picture(),
            f"{long}.txt": b"long",
            "d\u00e9j\u00e0/vu.png": picture(1),
            "a.b.png": picture(),
        }
        members |= {
            "a.b.txt": b"dots",
            "a.txt": b"another",
            "._a.b.png": b"of macOS",
            ".txt": b"",
            "x.gif": b"",
            "y": b"",
        }
        pack(f"{number}.tar", members, format)
    found = listing()
    expected = {f"{long}.png": ["long"], "d\u00e9j\u00e0/vu.png": [""], "a.b.png": ["dots"]}
    assert captions(found) == {f"{n}.tar/{name}": text for n in range(2) for name, text in expected.items()}
    assert not found.problems and found.others[".gif"] == 2


def test_texts_beside_images(pack: Pack, listing) -> None:
    entry = {"caption": "json", "tags": ["a", "b"], "score": 0.25, "width": 1, "height": 2, "long": "a long one"}
    members = {
        "1.png": picture(),
        "1.txt": b"\xef\xbb\xbf a text \r\n",
        "1.json": json.dumps(entry).encode(),
        "2.caption": b"a caption",
        "2.png": picture(),
        "3.json": json.dumps(entry, indent=2).encode(),
        "3.png": picture(),
        "4.png": picture(),
        "5.png": picture(),
        "5.TXT": b"",
    }
    pack("x.tar", members)
    found = listing(class_tokens="instead")
    texts = {f"x.tar/{n}.png": [text] for n, text in enumerate(["a text", "a caption", "json,a, b", "instead", ""], 1)}
    assert captions(found) == texts
    assert found.table["score"].to_pylist() == [0.25, None, 0.25, None, None]
    assert set(zip(found.table["width"].to_pylist(), found.table["height"].to_pylist(), strict=True)) == {(40, 30)}
    assert captions(listing(metadata_columns=("caption=long",)))["x.tar/3.png"] == ["a long one,a, b"]
    assert captions(listing(caption_extension=".caption"))["x.tar/2.png"] == ["a caption"]


def test_caption_sets_in_tars(pack: Pack, listing, tmp_path: Path) -> None:
    entry = json.dumps({"tags": ["a", "b"], "long": "a long one"}).encode()
    members = {"1.png": picture(), "1.txt": b"text", "1.json": entry, "2.png": picture(), "2.txt": b" "}
    pack("x.tar", members)
    sources = read_sources("tags:0.6, long, .txt, .json#long")
    both = {"x.tar/1.png": ["a, b", "a long one", "text", "a long one"], "x.tar/2.png": [None] * 4}
    assert captions(listing(caption_sources=sources)) == both
    path = tmp_path / "meta.parquet"
    columns = {"key": ["1", "2"], "tags": [None, "from the table"], "long": ["longer", ""], "caption": ["unused"] * 2}
    pa.parquet.write_table(pa.table(columns), path)
    joined = {
        "x.tar/1.png": ["a, b", "longer", "text", "a long one"],
        "x.tar/2.png": ["from the table", None, None, None],
    }
    assert captions(listing(caption_sources=sources, metadata_file=path)) == joined
    files = read_sources(".txt")
    assert captions(listing(caption_sources=files, metadata_file=path)) == {
        "x.tar/1.png": ["text"],
        "x.tar/2.png": [None],
    }


def test_bad_members_are_counted_by_kind(pack: Pack, listing) -> None:
    members = {
        "good.png": picture(),
        "empty.png": b"",
        "text.png": b"not an image",
        "latin.png": picture(),
        "latin.txt": "caf\u00e9".encode("latin-1"),
        "json.png": picture(),
        "json.json": b"{",
        "score.png": picture(),
        "score.json": b'{"score": "high"}',
        "list.png": picture(),
        "list.json": b"[]",
    }
    path = pack("x.tar", members)
    with tarfile.open(path, "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo(f"{kind.decode()}.png")
            info.type, info.linkname = kind, "good.png"
            tar.addfile(info)
        info = tarfile.TarInfo("good.png")
        info.size = len(picture())
        tar.addfile(info, io.BytesIO(picture(9)))
    found = listing()
    assert list(captions(found)) == ["x.tar/good.png"] and len(found.problems) == 9
    expected = [
        "empty",
        "not an image of a known",
        "not UTF-8",
        "not valid JSON",
        "must be a number",
        "must be an object",
    ]
    expected += ["a link or sparse", "a link or sparse", "holds this name twice"]
    assert sorted(messages(found)) == sorted(next(one for one in messages(found) if text in one) for text in expected)
    assert messages(listing()) == messages(found), "problems are kept with the members"


def test_truncated_and_damaged_tars(pack: Pack, listing, tmp_path: Path) -> None:
    members = {f"{number}.png": picture(number) for number in range(4)}
    whole = pack("whole.tar", members).read_bytes()
    member = len(whole[: whole.index(b"1.png")])
    cases = {
        "within.tar": (whole[: 3 * member + 600], 3, "ends within a member, after 3 whole ones"),
        "noend.tar": (whole[: 4 * member], 4, None),
        "header.tar": (
            whole[: 2 * member] + b"\1" * 512 + whole[2 * member + 512 :],
            2,
            f"damaged at byte {2 * member}",
        ),
        "garbage.tar": (b"x" * 2000, 0, "not readable as a tar file"),
        "empty.tar": (b"", 0, "not readable as a tar file"),
        "zipped.tar": (gzip.compress(whole), 0, "is compressed"),
    }
    for name, (data, _, _) in cases.items():
        (tmp_path / "tars" / name).write_bytes(data)
    found = listing()
    for name, (_, count, message) in cases.items():
        assert sum(image.startswith(name) for image in captions(found)) == count, name
        own = [problem.message for problem in found.problems.problems() if str(problem.file).endswith(name)]
        assert len(own) == (message is not None) and all(message in one for one in own), (name, own)


def test_only_changed_tars_are_looked_through_again(pack: Pack, listing, monkeypatch, tmp_path: Path) -> None:
    read = []
    original = tar_files.read_members
    monkeypatch.setattr(
        "sdxl_finetune.data.sources.tars.read_members",
        lambda location, *rest: read.append(location.name) or original(location, *rest),
    )
    for number in range(3):
        pack(f"{number}.tar", {f"{number}.png": picture(number)})
    first = listing().table
    assert read == ["0.tar", "1.tar", "2.tar"] and listing().table.equals(first) and len(read) == 3
    pack("1.tar", {"new.png": picture(7), "other.png": picture(8)})
    assert list(captions(listing())) == ["0.tar/0.png", "1.tar/new.png", "1.tar/other.png", "2.tar/2.png"]
    assert read[3:] == ["1.tar"]
    kept = next((tmp_path / "cache" / "tars").glob("*/0.tar.members"))
    kept.write_bytes(kept.read_bytes()[:100])
    assert len(listing().table) == 4 and read[4:] == ["0.tar"]


def test_a_changed_tar_is_noticed_when_an_image_is_read(pack: Pack, tmp_path: Path, subset, dataset) -> None:
    path = pack("x.tar", {"a.png": picture(), "b.png": picture(1)})
    index = build_index([dataset(subset(tmp_path / "tars"))], tmp_path / "cache", "stop")
    pack("x.tar", {"b.png": picture(1), "a.png": picture(), "c.png": picture(3)})
    with pytest.raises(ImageError) as caught:
        index[0].read()
    assert "x.tar was changed since it was scanned" in caught.value.reason
    path.unlink()
    with pytest.raises(ImageError) as caught:
        index[0].load((0, 0))
    assert "not readable" in caught.value.reason and caught.value.path == str(path / "a.png")


def test_patterns_name_the_tars(pack: Pack, listing, tmp_path: Path) -> None:
    for number in range(4):
        pack(f"data-{number:02}.tar", {"a.png": picture(number)})
    assert list(captions(listing(tar_files="data-{01..02}.tar"))) == ["data-01.tar/a.png", "data-02.tar/a.png"]
    assert list(captions(listing(tar_files="data-*1.tar"))) == ["data-01.tar/a.png"]
    messages = {
        "data-{02..05}.tar": r"2 of 4 tar files are missing \(data-04\.tar, data-05\.tar\): download them, or name"
        r" those that are there: data-\*\.tar$",
        "dat-{1..2}.tar": r"2 of 2 tar files are missing \(dat-1\.tar, dat-2\.tar\): check the name, because the folder"
        r" holds data-00\.tar, data-01\.tar, data-02\.tar, data-03\.tar$",
        "dat-*.tar": r"no tar file has such a name: check the name, because the folder holds data-00\.tar, ",
    }
    for pattern, message in messages.items():
        with pytest.raises(UserError, match=message):
            listing(tar_files=pattern)
    for path in (tmp_path / "tars").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"no tar file has such a name: check the name, .* holds no tar files$"):
        listing(tar_files="data-*.tar")


def test_the_metadata_of_all_tar_files_can_be_used_with_a_part_of_them(pack: Pack, listing, tmp_path, caplog) -> None:
    for number in range(3):
        pack(f"{number}.tar", {f"{number}{letter}.png": picture() for letter in "ab"})
    path = tmp_path / "meta.parquet"
    names = [f"{number}{letter}" for number in range(3) for letter in "ab"]
    pa.parquet.write_table(pa.table({"key": names[1:], "tags": names[1:]}), path)
    found = listing(metadata_file=path, tar_files="{0..1}.tar")
    assert captions(found) == {"0.tar/0b.png": ["0b"], "1.tar/1a.png": ["1a"], "1.tar/1b.png": ["1b"]}
    assert not found.problems
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == (
        f"{path}: 2 of 5 entries are left out, because {tmp_path}/tars/{{0..1}}.tar does not hold their images, for"
        " example 2a, 2b. 3 of 4 images there have an entry and are used"
    )
    (tmp_path / "tars" / "1.tar").write_bytes(b"broken" * 200)
    assert len(listing(metadata_file=path, tar_files="{0..1}.tar").problems) == 1
    pa.parquet.write_table(pa.table({"key": ["0000", "0001"]}), path)
    message = (
        r"none of its 2 entries names an image of .*tars\. Entries are for example 0000, 0001, and an image is 0\.tar"
    )
    with pytest.raises(UserError, match=message):
        listing(metadata_file=path)


def test_a_folder_of_images_beside_tars_stays_one_of_images(pack: Pack, listing, tmp_path: Path, caplog) -> None:
    pack("x.tar", {"a.png": picture()})
    (tmp_path / "tars" / "b.png").write_bytes(picture())
    assert list(listing().table["name"].to_pylist()) == [b"b.png"]
    assert "1 .tar files are not read" in caplog.text
    (tmp_path / "tars" / "b.png").unlink()
    (tmp_path / "tars" / "x.tar").rename(tmp_path / "tars" / "x.tar.gz")
    with pytest.raises(UserError, match=r"holds no images .*unpack tar files with gunzip"):
        listing()


def test_metadata_names_members(pack: Pack, listing, tmp_path: Path) -> None:
    for number in range(2):
        pack(f"{number}.tar", {f"{number}{letter}.png": picture() for letter in "abc"} | {f"{number}a.txt": b"beside"})
    names = ["0.tar/0a.png", "0b", "1.tar/1a", "1c.png", str(tmp_path / "tars" / "1.tar" / "1b.png"), "gone", "0a"]
    columns = {"key": names, "score": [float(number) for number in range(7)]}
    path = tmp_path / "meta.parquet"
    pa.parquet.write_table(pa.table(columns), path)
    found = listing(metadata_file=path)
    scores = dict(zip(captions(found), found.table["score"].to_pylist(), strict=True))
    assert scores == {"0.tar/0a.png": 0, "0.tar/0b.png": 1, "1.tar/1a.png": 2, "1.tar/1b.png": 4, "1.tar/1c.png": 3}
    assert captions(found)["1.tar/1a.png"] == ["beside"] and captions(found)["1.tar/1b.png"] == [""]
    assert found.table["offset"].null_count == 0
    (repeated,) = messages(found)
    assert repeated.startswith("row 7: the image is named in an earlier row")
    pa.parquet.write_table(pa.table({**columns, "caption": [f"text {number}" for number in range(7)]}), path)
    assert captions(listing(metadata_file=path))["1.tar/1a.png"] == ["text 2"]


def test_members_of_one_name_in_several_tars(pack: Pack, listing, tmp_path: Path) -> None:
    for number in range(2):
        pack(f"{number}.tar", {"a.png": picture(number)})
    path = tmp_path / "meta.json"
    path.write_text(json.dumps({"1.tar/a": {"caption": "one"}, "a": {"caption": "either"}}))
    found = listing(metadata_file=path)
    assert captions(found) == {"1.tar/a.png": ["one"]} and "several images have this name" in messages(found)[0]


def test_processes_find_the_same(pack: Pack, listing, monkeypatch, tmp_path: Path) -> None:
    for number in range(3):
        pack(f"{number}.tar", {f"{letter}.png": picture(number) for letter in "abc"})
    first = listing().table
    monkeypatch.setattr("sdxl_finetune.data.sources.tars.IN_PROCESS", 0)
    (tmp_path / "cache").rename(tmp_path / "old")
    assert listing().table.equals(first)


def test_indexes_of_one_run(pack: Pack, tmp_path: Path, subset, dataset, images, cache_latents) -> None:
    """Latents of a folder are found again for the same images in tar files."""
    from tests.latents.test_encoding import encode

    pack("x.tar", images)
    shards = tmp_path / "latents"

    def latents(folder: str) -> tuple[Index, dict]:
        index = build_index([dataset(subset(tmp_path / folder))], tmp_path / "cache", "stop")
        store, report, _ = cache_latents(index, encode, folder=shards)
        return [store.read([row], [False])[0] for row in range(len(index))], report.counts

    (plain, counts), (packed, counts_of_tar) = latents("plain"), latents("tars")
    assert counts == {"encoded": 5} and counts_of_tar == {"found again": 5}
    assert all(np.array_equal(one, other) for one, other in zip(plain, packed, strict=True))


def test_face_cutouts_in_tars_share_the_caption_of_their_image(pack: Pack, listing) -> None:
    members = {
        "a/cat.png": picture(),
        "a/cat.txt": b"a cat",
        "a/cat_10_20_5_5.png": picture(1),
        "a/cat_1_2_3_4.png": picture(2),
        "a/cat_1_2_3_4.txt": b"its face",
        "b/dog_1_2_3_4.png": picture(3),
    }
    pack("x.tar", members)
    expected = {"a/cat": "a cat", "a/cat_10_20_5_5": "a cat", "a/cat_1_2_3_4": "its face", "b/dog_1_2_3_4": ""}
    assert captions(listing()) == {f"x.tar/{name}.png": [text] for name, text in expected.items()}
    pack("x.tar", members | {"a/cat.txt": b"\xff"})
    assert list(captions(listing())) == ["x.tar/a/cat_1_2_3_4.png", "x.tar/b/dog_1_2_3_4.png"]


def test_a_tar_is_looked_through_again_when_more_kinds_of_images_can_be_read(pack: Pack, listing, monkeypatch) -> None:
    """As after the installation of a package that a warning has recommended."""
    pack("x.tar", {"a.png": picture(), "b.jpg": picture(1, "JPEG")})
    with monkeypatch.context() as fewer:
        fewer.setattr("sdxl_finetune.data.images.IMAGE_SUFFIXES", (".png",))
        assert list(captions(listing())) == ["x.tar/a.png"]
    assert list(captions(listing())) == ["x.tar/a.png", "x.tar/b.jpg"]


def test_other_options_of_captions_count_also_without_a_check(pack: Pack, tmp_path: Path, subset) -> None:
    pack("x.tar", {"a.png": picture(), "a.json": json.dumps({"caption": "a cat", "tags": "1cat"}).encode()})

    def texts(**options: object) -> list[str]:
        table, _ = scan([subset(tmp_path / "tars", **options)], tmp_path / "cache", skip_check=True)
        return table["captions"].to_pylist()[0]

    assert texts() == ["a cat,1cat"] and texts(caption_separator=";") == ["a cat;1cat"]
