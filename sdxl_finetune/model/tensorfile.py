"""Reads and writes files of tensors, one tensor at a time.

Opening a file (.safetensors or .ckpt) gives a `Source` for every tensor: its shape and dtype, and a function that reads
its values from the mapped file. Writing takes Sources too. Both therefore need memory for one tensor beside the model.
The writer puts the bytes where the safetensors library would put them.
"""

import functools
import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.model.pickles import load_pickle
from sdxl_finetune.printable import encodable

_DTYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Words that torch.compile and other wrappers of modules put into names. They are left out of keys when a file is
opened."""
_WRITTEN = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
"""Dtypes that can be written, in the library's own order. Files hold tensors of the last dtype first."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One tensor of a file or model: its shape and dtype, and a function that reads its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


def source_of(tensor: Tensor) -> Source:
    return Source(shape=tuple(tensor.shape), dtype=tensor.dtype, read=lambda: tensor)


def source_bytes(source: Source) -> int:
    """Bytes of the values of a tensor."""
    return math.prod(source.shape) * source.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """The tensors of one file by key, its metadata, and the counters of a .ckpt file."""

    tensors: Mapping[str, Source]
    metadata: Mapping[str, str] = field(default_factory=dict)
    epoch: int | None = None
    """Epoch in a .ckpt file, if it has one."""
    global_step: int | None = None
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    """Config of the noise scheduler in a diffusers folder."""
    vae: Mapping[str, Any] = field(default_factory=dict)
    """Config of the VAE in a diffusers folder."""


def open_tensors(path: Path) -> TensorFile:
    """Opens a .safetensors file, or a pickled state dict (.ckpt, .pt, .pth, .bin).

    Unpickling reads weights only and never runs code from the file. Raises UserError for a damaged file, for a file
    that would run code, and for a file that is no checkpoint.
    """
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise UserError(Problem("the file is empty: fetch or save it again", file=str(path)))
    if start.startswith(b"version https://git-lfs"):
        message = "this is a Git LFS pointer and not the file itself: fetch the file (`git lfs pull`)"
        raise UserError(Problem(message, file=str(path)))
    if start.startswith(b"GGUF"):
        message = "this is a GGUF file of quantised weights, which cannot be trained: fetch the unquantised model"
        raise UserError(Problem(message, file=str(path)))
    if start.lstrip()[:1] == b"<":
        raise UserError(Problem("this is a web page, not a model: download the file again", file=str(path)))
    # The content decides, because .safetensors files with the name .ckpt are common.
    if start[8:9] == b"{":
        return _open_safetensors(path)
    if start.startswith((b"PK\x03\x04", b"\x80")):
        if path.suffix == ".safetensors":
            raise UserError(Problem("this is a .ckpt file and not a .safetensors file: rename it", file=str(path)))
        return _open_pickle(path)
    raise UserError(Problem("the file is damaged or is no checkpoint: fetch or save it again", file=str(path)))


def _open_safetensors(path: Path) -> TensorFile:
    if encodable(str(path)) != str(path):
        message = "the path is not UTF-8, and the safetensors library opens no such file: rename the file or its folder"
        raise UserError(Problem(message, file=str(path)))
    try:
        opened = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        message = f"the file is damaged or incomplete ({error}): fetch or save it again"
        raise UserError(Problem(message, file=str(path))) from None
    tensors = {}
    unknown = set()
    for key in opened.keys():  # noqa: SIM118 (`opened` is no mapping)
        part = opened.get_slice(key)
        dtype = _DTYPES.get(part.get_dtype())
        if dtype is None:
            unknown.add(part.get_dtype())
        else:
            read = functools.partial(opened.get_tensor, key)
            tensors[key] = Source(shape=tuple(part.get_shape()), dtype=dtype, read=read)
    if unknown:
        message = f"the file holds tensors of a type that cannot be trained: {', '.join(sorted(unknown))}"
        raise UserError(Problem(message, file=str(path)))
    return TensorFile(tensors=_unwrapped(tensors), metadata=opened.metadata() or {})


def _open_pickle(path: Path) -> TensorFile:
    content = load_pickle(path)
    outer = content if isinstance(content, dict) else {}
    inner = outer.get("state_dict", outer)
    named = inner.items() if isinstance(inner, Mapping) else ()
    tensors = {key: source_of(value) for key, value in named if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        raise UserError(Problem("the file holds no named tensors: it is no checkpoint", file=str(path)))
    epoch, step = (value if isinstance(value := outer.get(name), int) else None for name in ("epoch", "global_step"))
    return TensorFile(tensors=_unwrapped(tensors), epoch=epoch, global_step=step)


def _unwrapped(tensors: Mapping[str, Source]) -> dict[str, Source]:
    return {".".join(word for word in key.split(".") if word not in _WRAPPERS): tensors[key] for key in tensors}


def write_safetensors(path: Path, tensors: Mapping[str, Source], metadata: Mapping[str, str]) -> None:
    """Writes tensors of the dtypes in _WRITTEN. Each is read, written and freed before the next.

    Equal tensors and metadata give equal bytes. The library instead reads metadata in an order that changes from
    process to process.
    """
    order = list(_WRITTEN)
    keys = sorted(tensors, key=lambda key: (-order.index(tensors[key].dtype), key))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for key in keys:
        source = tensors[key]
        begin, end = end, end + source_bytes(source)
        header[key] = {
            "dtype": _WRITTEN[source.dtype],
            "shape": list(source.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key in keys:
            _write_bytes(file, tensors[key])
        assert file.tell() == 8 + len(text) + end


def write_pickle(path: Path, content: Mapping[str, Any]) -> None:
    """Writes values and tensors as torch.save does. Raises OSError if storage fails.

    torch writes through a file of Python. To a path it writes by itself, without noticing an error at closing the file,
    and an error before that has no number.
    """
    try:
        with path.open("wb") as file:
            torch.save(content, file)
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        raise cause or error from None


def _write_bytes(file: BinaryIO, source: Source) -> None:
    tensor = source.read().detach().to("cpu").contiguous()
    assert tuple(tensor.shape) == source.shape
    assert tensor.dtype == source.dtype
    file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
