"""Damages files: bytes of any file, and the inner structure of JSON, TOML, text, tensors, tars, pickles and images.

Each function takes the bytes of a file and returns other bytes with a few words that say what was done. The damage is a
function of the random generator that is passed.
"""

import io
import json
import pickle
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import torch

from sdxl_finetune.data.tables import TAIL

Damaged = tuple[str, bytes]
CANARY = "canary_was_touched"
"""File in the folder of a trial. Code in a damaged file that is run makes it."""
LONG = "word, " * 200_000
DEEP = 100_000
"""Depth of nested brackets, far beyond what a parser that calls itself can hold."""
ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**31, 2**63, 2**64, -(2**63), 1e308, float("nan"), float("inf"), -0.5),
    *("", " ", "../../../../etc/passwd", "/etc/passwd", "x\0y", "a\nb", "\ud800", "<script>alert(1)</script>", LONG),
    *("{" * 5000, "(" * 5000, "%s%n", "nan", "1e999", [], {}, [[]], [None], {"a": {"a": 1}}, ["x"] * 3000, "\u202e"),
)
HUGE = (b"\xff" * 8, b"\xff\xff\xff\x7f" * 2, b"\0" * 8, (2**40).to_bytes(8, "little"), (2**63).to_bytes(8, "little"))
FOREIGN = (
    *(b"", b"\n", b"<html><body>404 Not Found</body></html>", b"version https://git-lfs.github.com/spec/v1\noid x\n"),
    *(b"\x1f\x8b\x08\0" + b"\0" * 60, b"PK\x03\x04" + b"\0" * 60, b"\x89PNG\r\n\x1a\n", b"\x80\x02}q\0.", b"\0" * 4096),
    *(b"[" * DEEP, b'{"a":' * DEEP, b"ARROW1\0\0" + b"\xff" * 64, b"PAR1" + b"\xff" * 64 + b"PAR1", b"\xff\xfe" * 50),
    *(b"1" * 10_000, b"a = " + b"[" * DEEP, b"\x93NUMPY\x01\0v\0{'descr':'|O','fortran_order':False,'shape':(9,)}"),
)


class _Exploit:
    """An object that makes the canary when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return open, (CANARY, "w")


def damaged(path: PurePath, data: bytes, rng: random.Random) -> Damaged:
    """The damaged content of a file, by the file's ending."""
    inner = INNER.get(path.suffix.lower())
    if inner and rng.random() < 0.6:
        return inner(data, rng)
    return of_bytes(data, rng)


def of_bytes(data: bytes, rng: random.Random) -> Damaged:
    """Damages bytes as disks, networks and editors do, or puts another file in the place of this one."""
    size = max(1, len(data))
    at, length = rng.randrange(size), 1 + int(rng.random() ** 4 * min(size, 100_000))
    if rng.random() < 0.5:  # headers are at the start or at the end
        at = min(size - 1, rng.choice([rng.randrange(512), size - 1 - rng.randrange(min(size, 512))]))
    match rng.randrange(8):
        case 0:
            content = bytearray(data or b"\0")
            for _ in range(rng.randint(1, 8)):
                content[min(size - 1, at + rng.randrange(64))] ^= 1 << rng.randrange(8)
            return "some bits are changed", bytes(content)
        case 1:
            return "the file is cut", data[:at]
        case 2:
            return "a part is zero", data[:at] + bytes(len(data[at : at + length])) + data[at + length :]
        case 3:
            return "a part is random", data[:at] + rng.randbytes(len(data[at : at + length])) + data[at + length :]
        case 4:
            return "a part is missing", data[:at] + data[at + length :]
        case 5:
            return "a part stands there twice", data[: at + length] + data[at:]
        case 6:
            return "a huge number", data[: at // 4 * 4] + rng.choice(HUGE) + data[at // 4 * 4 + 8 :]
    return "another file", rng.choice([*FOREIGN, data + rng.randbytes(1000), rng.randbytes(3000)])


def of_json(data: bytes, rng: random.Random) -> Damaged:
    """Gives one place of a JSON document an odd value."""
    try:
        return "an odd value", json.dumps(_odd_somewhere(json.loads(data), rng)).encode()
    except ValueError:
        return of_bytes(data, rng)


def of_lines(data: bytes, rng: random.Random) -> Damaged:
    """Gives one place of one line of JSON an odd value."""
    lines = data.splitlines() or [b""]
    place = rng.randrange(len(lines))
    what, lines[place] = of_json(lines[place], rng)
    return what, b"\n".join(lines)


def _odd_somewhere(value: Any, rng: random.Random) -> Any:
    """The value with an odd one at a random place, a place missing, or an entry more."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return rng.choice(ODD)
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    place = rng.randrange(len(items))
    key, inner = items[place]
    match rng.randrange(8):
        case 0:
            del items[place]
        case 1:
            items.append((rng.choice([str(odd) for odd in ODD]), inner))
        case _:
            items[place] = key, _odd_somewhere(inner, rng)
    return dict(items) if isinstance(value, dict) else [inner for _, inner in items]


def of_toml(data: bytes, rng: random.Random) -> Damaged:
    """Gives one key of a TOML document an odd value, or the document an odd line."""
    lines = data.decode("utf-8", "replace").splitlines()
    place = rng.randrange(len(lines))
    odd = rng.choice([*ODD, "[" * DEEP, "{a=" * DEEP, "1979-05-27", "0x" + "f" * 999, "1" * 9999])
    text = odd if isinstance(odd, str) and odd[:1] in ("[", "{", "1", "0") else json.dumps(odd)
    if rng.random() < 0.2:
        lines.insert(
            place, rng.choice([f"x = {text}", f"[{text[:200]}]", "[[datasets]]", lines[place], "a.b.c = 1", "="])
        )
    elif "=" in lines[place]:
        lines[place] = f"{lines[place].partition('=')[0]}= {text}"
    return "an odd value", "\n".join(lines).encode("utf-8", "surrogatepass")


def of_text(data: bytes, rng: random.Random) -> Damaged:
    """Puts odd text into a caption, a list of prompts, or a table."""
    odd = rng.choice([odd for odd in ODD if isinstance(odd, str)])
    odd = rng.choice(
        [odd, " --w 999999999 --h 64", " --s 1000000000", "--d x --l nan", "{|" * 2000, '"', ",,,,,", "(:-1e400)"]
    )
    text, at = odd.encode("utf-8", "surrogatepass"), rng.randrange(len(data) + 1)
    return "odd text", rng.choice(
        [data[:at] + text + data[at:], text, data * 3000, b"\xff\xfe" + text, b"\n" * 100_000]
    )


def of_safetensors(data: bytes, rng: random.Random) -> Damaged:
    """Changes the header of a file of tensors."""
    try:
        size = int.from_bytes(data[:8], "little")
        header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    except ValueError:
        return of_bytes(data, rng)
    match rng.randrange(6):
        case 0:
            claimed = rng.choice([0, 1, 2**63, 2**40, 2**64 - 1, len(data), len(data) - 8, size - 1, 100_000_001])
            return "a wrong length of the header", claimed.to_bytes(8, "little") + data[8:]
        case 1:
            text = rng.choice([b"{" * DEEP, b'{"a":' * DEEP, b"[" * DEEP, b'{"a":' + b"1" * 9999 + b"}", b"{}", b"{"])
            return "another header", len(text).to_bytes(8, "little") + text + body
        case 2:
            fields = dict(header.get("__metadata__", {}))
            name = rng.choice(
                [*fields, "sdxl_finetune.resume", "sdxl_finetune.config", "sdxl_finetune.stages", "format"]
            )
            odd = rng.choice(
                [str(rng.choice(ODD)), "[" * DEEP, '{"log": "../../outside"}', '{"origin": 3}', '{"within": "x"}']
            )
            header["__metadata__"] = fields | {name: odd}
            what = "odd metadata"
        case 3:
            name = rng.choice([name for name in header if name != "__metadata__"])
            header[rng.choice([name + ".x", "", "../x", "model.diffusion_model.out.2.weight"])] = header.pop(name)
            what = "another name of a tensor"
        case _:
            name = rng.choice(list(header))
            header[name] = _odd_somewhere(header[name], rng)
            what = "an odd entry of the header"
    text = json.dumps(header).encode()
    return what, len(text).to_bytes(8, "little") + text + body


def of_pickle(data: bytes, rng: random.Random) -> Damaged:
    """Puts objects that run code, or tensors that claim to be huge, into a pickle."""
    out = io.BytesIO()
    big = torch.zeros(1).expand(2**20, 2**20)
    match rng.randrange(5):
        case 0:
            return "a pickle that runs code", pickle.dumps({"state_dict": _Exploit()})
        case 1:
            torch.save({"state_dict": {"a": torch.zeros(2)}, "x": _Exploit()}, out)
            return "a pickle that runs code", out.getvalue()
        case 2:
            torch.save(
                {"state_dict": {"first_stage_model.x": big}, "state": {"unet.x": {"step": big}}, "groups": {}}, out
            )
            return "a huge tensor", out.getvalue()
        case 3:
            odd = rng.choice(
                [1, [], {"state": 3}, {"state": {}, "groups": {}, "random": big}, {1: torch.zeros(1)}, {"a": "b"}]
            )
            torch.save(odd, out)
            return "another object", out.getvalue()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for one in old.infolist():
            content = old.read(one)
            new.writestr(
                one.filename,
                of_bytes(content, rng)[1] if rng.random() < 0.02 or one.filename.endswith("data.pkl") else content,
            )
    return "a damaged member", out.getvalue()


def of_tar(data: bytes, rng: random.Random) -> Damaged:
    """Adds a hostile member to a tar file."""
    out = io.BytesIO(data)
    names = [
        "../../outside.png",
        "/tmp/outside.png",
        "a.png",
        "x" * 5000 + ".png",
        "a\n.txt",
        "a/../b.png",
        "..",
        "con.json",
    ]
    name = rng.choice(names)
    with tarfile.open(fileobj=out, mode="a", format=rng.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])) as tar:
        member = tarfile.TarInfo(name)
        kinds = [tarfile.REGTYPE] * 4 + [
            tarfile.SYMTYPE,
            tarfile.LNKTYPE,
            tarfile.CHRTYPE,
            tarfile.FIFOTYPE,
            tarfile.DIRTYPE,
        ]
        member.type, member.linkname = rng.choice(kinds), rng.choice(["/etc/passwd", "../../x", "a.png"])
        inner = rng.choice([b"", b"x", b"[" * DEEP, _png(rng), json.dumps(rng.choice(ODD)).encode()])
        member.size = len(inner) if member.isreg() else 0
        if rng.random() < 0.3:
            key = rng.choice(["size", "path", "GNU.sparse.size", "GNU.sparse.map", "mtime", "hdrcharset"])
            member.pax_headers = {key: rng.choice(["-1", "9" * 30, "x", "\0", "1,2,3", "nan"])}
        try:
            tar.addfile(member, io.BytesIO(inner))
        except (tarfile.TarError, ValueError, UnicodeError):
            return of_bytes(data, rng)
    content = bytearray(out.getvalue())
    if rng.random() < 0.4:
        content[124:136] = rng.choice(
            [b"\x80" + b"\xff" * 11, b"77777777777\0", b"-0000000001\0", b"xxxxxxxxxxx\0", bytes(12)]
        )
        total = sum(content[:148]) + 8 * 32 + sum(content[156:512])
        content[148:156] = b"%06o\0 " % total
        return "a wrong size of a member", bytes(content)
    return "a hostile member", bytes(content)


def _png(rng: random.Random) -> bytes:
    """A PNG file that claims to be large, or whose text unpacks to very much."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    width, height = rng.choice(
        [(2**31 - 1, 2**31 - 1), (60_000, 60_000), (0, 1), (2**31, 1), (13_000, 13_000), (64, 64), (1, 10**7)]
    )
    bomb = zlib.compress(bytes(1 << 28), 9)
    header = struct.pack(
        ">IIBBBBB", width, height, rng.choice([1, 8, 16, 3]), rng.choice([0, 2, 3, 6, 7]), 0, 0, rng.choice([0, 1, 2])
    )
    extra = rng.choice(
        [b"", chunk(b"zTXt", b"a\0\0" + bomb), chunk(b"iCCP", b"a\0\0" + bomb), chunk(b"eXIf", b"MM\0*" + b"\xff" * 40)]
    )
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


def of_image(data: bytes, rng: random.Random) -> Damaged:
    """Puts an image that claims to be large, or a file of a format that nobody expects, in the place of an image."""
    rest = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n(%stdout) (w) file pop showpage\n%%EOF\n"
    tiff = (
        b"II*\0\x08\0\0\0\x02\0\0\x01\x04\0\x01\0\0\0\xff\xff\xff\x7f\x01\x01\x04\0\x01\0\0\0\xff\xff\xff\x7f\0\0\0\0"
    )
    gif = b"GIF89a" + b"\xff" * 4 + b"\xf7\0\0" + bytes(768) + b",\0\0\0\0\xff\xff\xff\xff\0\x08\x02"
    svg = b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>"
    at = data.find(b"\xff\xc0")
    if at > 0 and rng.random() < 0.3:
        return "claims to be large", data[: at + 5] + b"\xff\xff\xff\xff" + data[at + 9 :]
    if rng.random() < 0.5:
        return "a bomb", _png(rng)
    return "another kind of image", rng.choice(
        [rest, tiff, gif, svg, b"P6 99999 99999 255\n" + bytes(99), b"BM" + b"\xff" * 60]
    )


def of_parquet(data: bytes, rng: random.Random) -> Damaged:
    """Gives a column of a Parquet file odd values or another type."""
    table = pa.parquet.read_table(io.BytesIO(data))
    place = rng.randrange(table.num_columns)
    odd = rng.choice([odd for odd in ODD if not isinstance(odd, dict) and odd != "\ud800"])
    try:
        column = pa.array([odd] * table.num_rows)
    except (pa.ArrowException, OverflowError):
        return of_bytes(data, rng)
    column = rng.choice([column, pa.nulls(table.num_rows), pa.array([b"\xff"] * table.num_rows)])
    changed = [
        table.drop_columns([table.column_names[place]]),
        table.slice(0, 0),
        table.append_column("caption", column),
    ]
    changed += [table.set_column(place, table.column_names[place], column)] * 4
    out = io.BytesIO()
    pa.parquet.write_table(rng.choice(changed), out)
    return "an odd column", out.getvalue()


def of_table(data: bytes, rng: random.Random) -> Damaged:
    """Changes a file of the index: an Arrow table with JSON in the metadata of its schema."""
    table = pa.ipc.open_file(data[:-TAIL]).read_all()
    metadata = dict(table.schema.metadata or {})
    if metadata and rng.random() < 0.5:
        name = rng.choice(list(metadata))
        metadata[name] = rng.choice([b"", b"{", b"[" * DEEP, b"null", b"[[1]]", b"{}", of_json(metadata[name], rng)[1]])
        table = table.replace_schema_metadata(metadata)
    else:
        place = rng.randrange(table.num_columns)
        name, kind = table.column_names[place], table.schema.field(place).type
        columns = [
            pa.nulls(table.num_rows, kind),
            pa.nulls(table.num_rows),
            table.column(place).take([0] * table.num_rows),
        ]
        if pa.types.is_integer(kind):
            columns += [pa.array([odd] * table.num_rows, kind) for odd in (-1, 0, (1 << kind.bit_width - 1) - 1)]
        table = rng.choice(
            [table.set_column(place, name, rng.choice(columns)), table.slice(1), table.drop_columns([name])]
        )
    out = io.BytesIO()
    with pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)
    return "an odd table", out.getvalue()


IMAGE_ENDINGS = (".png", ".jpg", ".webp", ".bmp")
INNER: dict[str, Callable[[bytes, random.Random], Damaged]] = {
    ".json": of_json, ".jsonl": of_lines, ".toml": of_toml, ".txt": of_text, ".csv": of_text, ".tar": of_tar,
    ".safetensors": of_safetensors, ".latents": of_safetensors, ".text_outputs": of_safetensors, ".ckpt": of_pickle,
    ".pt": of_pickle, ".parquet": of_parquet, ".index": of_table, ".scan": of_table, ".members": of_table,
} | dict.fromkeys(IMAGE_ENDINGS, of_image)  # fmt: skip
"""Functions that damage the structure of files, by the endings of the files."""
