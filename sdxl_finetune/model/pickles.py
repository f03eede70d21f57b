"""Reads pickled tensors of files that others wrote, without running code from them.

torch's weights-only unpickler builds tensors, numbers, texts and containers, and refuses everything else. A hostile
file can still ask for memory out of proportion: compressed members that unpack to very much, or a tensor of huge shape
that repeats one number. Both are refused here before their values are read.
"""

import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdxl_finetune.errors import Problem, UserError

ZIP = b"PK\x03\x04"
"""First bytes of torch's zip format, which torch writes since 1.6. Only its tensors can be mapped."""
MOST_UNPACKED = 4
"""Most bytes to unpack for each byte of a file. torch does not compress; other tools may, but weights shrink little."""


def load_pickle(path: Path) -> Any:
    """The object in a pickled file. Its tensors are mapped from the disk if the file has torch's zip format.

    Raises UserError for a damaged file, for a file that would run code, and for tensors that are larger than the file.
    """
    try:
        with path.open("rb") as file:
            mapped = file.read(len(ZIP)) == ZIP
        if mapped:
            _check_members(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the pickle's version, which the error tells if it matters
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        _check_tensors(content)
    except pickle.UnpicklingError as error:
        if "Weights only load failed" not in str(error):
            raise _damaged(path, error) from None
        message = (
            "the file holds more than tensors and is not unpickled, because that could run any code: "
            "convert it to .safetensors with a tool that you trust"
        )
        raise UserError(Problem(message, file=str(path))) from None
    except Exception as error:  # the unpickler raises errors of any kind for damaged bytes
        raise _damaged(path, error) from None
    return content


def _damaged(path: Path, error: Exception) -> UserError:
    reason = (str(error) or type(error).__name__).splitlines()[0][:200]
    return UserError(
        Problem(f"the file is damaged or is no checkpoint ({reason}): fetch or save it again", file=str(path))
    )


def _check_members(path: Path) -> None:
    """Raises ValueError if the members of a zip file unpack to far more than the file."""
    with zipfile.ZipFile(path) as members:
        size = sum(member.file_size for member in members.infolist())
    if size > MOST_UNPACKED * path.stat().st_size:
        raise ValueError(f"its members would unpack to {size:,} bytes")


def _check_tensors(content: Any) -> None:
    """Raises ValueError if a tensor has more values than are stored for it."""
    for tensor in _tensors(content, 0):
        if tensor.layout is not torch.strided:
            raise ValueError("it holds a sparse tensor")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"a tensor of the shape {tuple(tensor.shape)} has fewer values than that")


def _tensors(value: Any, depth: int) -> Iterator[Tensor]:
    """The tensors in nested containers. Raises ValueError for containers that are nested without end."""
    if depth > 50:
        raise ValueError("it is nested too deeply")
    match value:
        case Tensor():
            yield value
        case Mapping():
            for inner in value.values():
                yield from _tensors(inner, depth + 1)
        case list() | tuple() | set():
            for inner in value:
                yield from _tensors(inner, depth + 1)
