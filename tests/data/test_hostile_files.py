"""Broken and hostile images, captions, tar files and files of the index have a message and cost little memory."""

import contextlib
import io
import json
import resource
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from sdxl_finetune.data import images
from sdxl_finetune.data.caption_sources import LARGEST_TEXT
from sdxl_finetune.data.images import ImageError, image_size, load_image
from sdxl_finetune.data.index import Index, build_index
from sdxl_finetune.data.listing import list_all
from sdxl_finetune.data.tables import TAIL, is_sound, map_array, map_table, write_table
from sdxl_finetune.errors import Tally, UserError

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def number(value: int) -> bytes:
    return struct.pack(">I", value)


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file of this size with few pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    every = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    parts = (number(len(data)) + kind + data + number(zlib.crc32(kind + data)) for kind, data in every)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def test_no_image_is_read_by_running_a_program(tmp_path: Path) -> None:
    """Pillow knows the format EPS, which it hands to Ghostscript. The name of the file does not matter."""
    path = tmp_path / "a.png"
    path.write_bytes(EPS)
    Image.init()
    with Image.open(path) as image:
        assert image.format == "EPS" and "GIF" in images._others()
    for read in (image_size, load_image):
        with pytest.raises(ImageError, match="not an image of a known format"):
            read(path)


@pytest.mark.parametrize("size", [(60_000, 60_000), (2**31 - 1, 2**31 - 1), (1, 2**31 - 1)])
def test_images_with_too_many_pixels_are_refused_before_memory_is_taken(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(*size))
    before = peak_bytes()
    for read in (image_size, load_image):
        with pytest.raises(ImageError, match="larger than the limit of 178956970 pixels"):
            read(path)
    assert peak_bytes() - before < 100 << 20


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
def test_texts_and_profiles_that_unpack_to_very_much_take_little_memory(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(64, 64, (kind, b"a\0\0" + zlib.compress(bytes(1 << 29), 9))))
    before = peak_bytes()
    for read in (image_size, load_image):
        with contextlib.suppress(ImageError):
            read(path)
    assert peak_bytes() - before < 200 << 20


def test_files_too_large_for_captions_are_named(tmp_path: Path, write_images, subset, dataset) -> None:
    write_images(tmp_path / "a", {"a.png": (64, 64), "b.png": (64, 64)})
    for name, size in (("a", LARGEST_TEXT), ("b", LARGEST_TEXT + 1)):
        (tmp_path / "a" / f"{name}.caption").write_bytes(b"x" * size)
    with pytest.raises(UserError, match=r"b\.caption: the file has more than 1048576 bytes") as caught:
        build_index([dataset(subset(tmp_path / "a"))], tmp_path / "cache", "stop")
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("text", ["[" * 100_000, '{"caption": ' + "[" * 100_000, '{"caption": 1' + "0" * 9999 + "}"])
def test_json_that_is_nested_without_end_is_named(tmp_path: Path, write_images, subset, dataset, text: str) -> None:
    """The same text beside an image, as metadata, and as a line of metadata."""
    write_images(tmp_path / "a", {"a.png": (64, 64)})
    files = {"a/a.json": {"caption_sources": ".json#caption:1"}, "meta.json": {}, "meta.jsonl": {}}
    for name, options in files.items():
        (tmp_path / name).write_text(text)
        if name.startswith("meta"):
            options = {"metadata_file": tmp_path / name}
        with pytest.raises(UserError) as caught:
            build_index([dataset(subset(tmp_path / "a", **options))], tmp_path / "cache", "stop")
        assert name in str(caught.value) and "JSON" in str(caught.value)


def tar_with(header: bytes) -> bytes:
    """A tar file of two images, with other bytes of size and type in the second header."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in ("a.png", "b.png"):
            member = tarfile.TarInfo(name)
            member.size = len(png(64, 64))
            tar.addfile(member, io.BytesIO(png(64, 64)))
    content = bytearray(out.getvalue())
    start = 512 + -(-len(png(64, 64)) // 512) * 512
    content[start + 124 : start + 124 + len(header)] = header
    content[start + 148 : start + 156] = b" " * 8
    content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
    return bytes(content)


@pytest.mark.parametrize(
    "size", [b"\x80" + b"\xff" * 11, b"\xff" * 11 + b"\x00", b"77777777777\0", b"\x80\0\0\0\0\0\0\xff\xff\xff\xff\xff"]
)
@pytest.mark.parametrize("kind", [b"0", b"L", b"x", b"K", b"S"])
def test_sizes_in_tar_headers_are_bounded(tmp_path: Path, subset, size: bytes, kind: bytes) -> None:
    """Sizes below 0 and beyond the file, of data and of long names, for which Python would take the memory first."""
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "a.tar").write_bytes(tar_with(size + b"0" * 12 + b" " * 8 + kind))
    before = peak_bytes()
    listing = list_all([subset(tmp_path / "tars")], tmp_path / "cache")[0]
    assert [row["name"] for row in listing.table.to_pylist()] == [b"a.tar/a.png"]
    problems = listing.problems.problems()
    assert problems and all("a.tar" in str(problem) for problem in problems)
    assert peak_bytes() - before < 100 << 20


@pytest.mark.parametrize("name", ["../../b.png", "/tmp/b.png", "c/../../b.png"])
def test_members_that_lead_out_of_a_tar_file_are_read_from_it_and_written_nowhere(
    tmp_path: Path, subset, dataset, name: str
) -> None:
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "a.tar", "w") as tar:
        member = tarfile.TarInfo(name)
        out = io.BytesIO()
        Image.new("RGB", (64, 64)).save(out, "PNG")
        member.size = len(out.getvalue())
        tar.addfile(member, io.BytesIO(out.getvalue()))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    before = set(tmp_path.parent.rglob("*"))
    index = build_index([dataset(subset(tmp_path / "tars"))], tmp_path / "cache", "skip")
    assert len(index) == 1 and load_image(index[0].path, data=index[0].read()).shape == (64, 64, 3)
    new = {path for path in set(tmp_path.parent.rglob("*")) - before if tmp_path / "cache" not in (path, *path.parents)}
    assert new == set()


def test_changed_bytes_in_files_of_the_index_are_noticed(tmp_path: Path, write_images, subset, dataset) -> None:
    """Any byte of the index is changed: the next start makes it again. Files of older versions have no checksum."""
    write_images(tmp_path / "a", {"a.png": (64, 64), "b.png": (96, 64)})
    (tmp_path / "a" / "a.caption").write_text("a red house")

    def start() -> tuple[Path, list]:
        index = build_index([dataset(subset(tmp_path / "a"))], tmp_path / "cache", "stop")
        return index.path, [index[row].captions for row in range(len(index))]

    path, captions = start()
    content = path.read_bytes()
    for place in (0, len(content) // 3, content.index(b"a red house"), content.index(b'"digests"'), len(content) - 1):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert not is_sound(path)
        assert start() == (path, captions) and path.read_bytes() == content
    path.write_bytes(content[:-TAIL])
    assert map_table(path).num_rows == 2
    assert start() == (path, captions) and path.read_bytes() == content
    for damaged in (b"", content[:-1], json.dumps([1]).encode()):
        path.write_bytes(damaged)
        assert start() == (path, captions)


def header(text: str) -> bytes:
    """The start of a file of `np.save` with this header."""
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


@pytest.mark.parametrize(
    "text",
    [
        "{'descr': '|u1', 'fortran_order': False, 'shape': (9000000000000000, 16), }\n",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n",
        "{'descr': (\n",
        "(" * 9000,
        "",
    ],
)
def test_damaged_arrays_are_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.npy"
    assert map_array(path) is None
    np.save(path, np.arange(3))
    assert np.array_equal(map_array(path), [0, 1, 2])
    path.write_bytes(header(text))
    assert map_array(path) is None


def test_an_epoch_of_too_many_images_is_refused(tmp_path: Path, subset, dataset, write_images) -> None:
    folder = tmp_path / "images"
    write_images(folder, {"a.png": (64, 64), "b.png": (64, 64)})
    for repeats, fits in ((500_000_000, True), (500_000_001, False)):
        asked = [dataset(subset(folder, num_repeats=repeats))]
        with contextlib.nullcontext() if fits else pytest.raises(UserError, match="lower num_repeats"):
            assert int(build_index(asked, tmp_path / "cache", "stop").repeats.sum()) == 2 * repeats


DAMAGED = [b"[", b"[" * 100_000, b"3", b"[3]", b"{}", b'[["a"]]', b"\xff", b'{"digests": 3, "captions": {}}']


def with_metadata(path: Path, name: str, value: bytes | None) -> None:
    """Writes a file of the index again, with another value in its metadata. Its checksum agrees."""
    table = map_table(path, mapped=False)
    metadata = {key: each for key, each in table.schema.metadata.items() if key != name.encode()}
    write_table(path, table.replace_schema_metadata(metadata | ({} if value is None else {name: value})))


@pytest.mark.parametrize("value", [None, *DAMAGED])
@pytest.mark.parametrize("name", ["saved", "buckets"])
def test_an_index_with_damaged_metadata_is_made_again(tmp_path, write_images, subset, dataset, name, value) -> None:
    write_images(tmp_path / "images", {"a.png": (64, 64)})

    def build() -> Index:
        return build_index([dataset(subset(tmp_path / "images"))], tmp_path / "cache", "stop")

    first = build()
    whole = first.path.read_bytes()
    with_metadata(first.path, name, value)
    again = build()
    assert (again.facts(), again.buckets) == (first.facts(), first.buckets) and again.path.read_bytes() == whole


@pytest.mark.parametrize("value", [None, *DAMAGED])
def test_marks_with_damaged_remarks_are_made_again(tmp_path, write_images, subset, dataset, value) -> None:
    write_images(tmp_path / "images", {"a.png": (64, 64), "b.png": (64, 64)})
    (tmp_path / "scores.csv").write_text("path,score\na.png,0.9\n")
    options = {"quality_tags": "good > 0.5, bad", "quality_scores": str(tmp_path / "scores.csv")}

    def build() -> Index:
        own = subset(tmp_path / "images", **options, quality_missing="none")
        return build_index([dataset(own)], tmp_path / "cache", "stop")

    first = build()
    (path,) = (tmp_path / "cache" / "marks").iterdir()
    whole = path.read_bytes()
    with_metadata(path, "remarks", value)
    assert build().facts() == first.facts()
    assert value in (b"{}",) or path.read_bytes() == whole


@pytest.mark.parametrize("text", ["[", "[" * 100_000, "3", "[3]", '[["a"]]', "{}", ""])
def test_an_image_with_damaged_kept_problems_is_read_again(tmp_path, write_images, subset, dataset, text) -> None:
    write_images(tmp_path / "images", {"a.png": (64, 64)})
    (tmp_path / "images" / "b.png").write_bytes(b"no image")

    def problems() -> list[str]:
        found = Tally()
        build_index([dataset(subset(tmp_path / "images"))], tmp_path / "cache", "skip", bad_files=found)
        return list(map(str, found.problems()))

    first = problems()
    tables = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and is_sound(path)]
    (path,) = (path for path in tables if "problems" in map_table(path, mapped=False).column_names)
    table = map_table(path, mapped=False)
    column = table.column_names.index("problems")
    damaged = table.set_column(column, table.schema.field("problems"), pa.array([text], pa.large_string()))
    write_table(path, damaged)
    assert problems() == first and "b.png" in first[0]
