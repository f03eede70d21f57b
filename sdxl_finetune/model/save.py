"""Saves an SDXL checkpoint with the reference's keys, shapes and dtypes.

The formats are a single .safetensors or .ckpt file and a diffusers folder. Tensors are converted and written one at a
time, so that saving needs hardly any memory. The exception is .ckpt: a pickle holds all tensors at once. Writing is not
atomic: the caller gives a temporary path (`files.atomic_path`).
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from typing_extensions import assert_never

from sdxl_finetune.model.diffusers_folder import save_folder
from sdxl_finetune.model.keymap import LOGIT_SCALE, KeyMap, Place, module_name, put
from sdxl_finetune.model.sdxl import SDXL
from sdxl_finetune.model.tensorfile import Source, source_of, write_safetensors

SaveAs = Literal["safetensors", "ckpt", "diffusers", "diffusers_safetensors"]
"""The reference's values of the option save_model_as."""


def save_checkpoint(
    path: Path,
    model: SDXL,
    vae: AutoencoderKL,
    *,
    save_as: SaveAs,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
    epoch: int = 0,
    global_step: int = 0,
) -> None:
    """Writes the model to `path`, with every tensor in `dtype`, rounded once from its master weight.

    If `dtype` is None, tensors keep their dtype in memory. `metadata` goes into .safetensors files, and `epoch` and
    `global_step` into a .ckpt file. Values beyond the range of float16 become infinite; call `saturated` to find them.
    """
    match save_as:
        case "safetensors":
            write_safetensors(path, single_file_tensors(model, vae, dtype), metadata)
        case "ckpt":
            state = {key: source.read() for key, source in single_file_tensors(model, vae, dtype).items()}
            torch.save({"state_dict": state, "epoch": epoch, "global_step": global_step}, path)
        case "diffusers" | "diffusers_safetensors":
            tensors = {
                name: _source([(Place(name), source)], _target(model, name, source, dtype))
                for name, source in _tensors(model, vae)
                if name != LOGIT_SCALE
            }
            save_folder(path, model.architecture, tensors, metadata, safe=save_as == "diffusers_safetensors")
        case _:
            assert_never(save_as)


def single_file_tensors(
    model: SDXL, vae: AutoencoderKL, dtype: torch.dtype | None, *, exact: bool = False
) -> dict[str, Source]:
    """All tensors of a single-file checkpoint by key, converted to `dtype` when they are read.

    If `exact`, tensors are not converted, and tensors with master weights are float32.
    """
    keymap = KeyMap(model.architecture.layout)
    parts: dict[str, list[tuple[Place, Source]]] = defaultdict(list)
    targets: dict[str, torch.dtype] = {}
    for name, source in _tensors(model, vae):
        place = keymap.place(name)
        parts[place.key].append((place, source))
        target = source.dtype if exact else _target(model, name, source, dtype)
        targets[place.key] = torch.promote_types(target, targets.get(place.key, target))
    return {key: _source(group, targets[key]) for key, group in parts.items()}


def saturated(model: SDXL, vae: AutoencoderKL, dtype: torch.dtype | None) -> list[str]:
    """The names (see keymap.py) of tensors with finite values that are beyond the range of `dtype`."""
    if dtype != torch.float16:
        return []
    largest = torch.finfo(dtype).max
    names = []
    for name, source in _tensors(model, vae):
        tensor = source.read()
        low, high = tensor.aminmax()
        # The second, slow condition is needed only for tensors with values out of range, infinities or NaN.
        if not (low >= -largest and high <= largest) and bool((tensor.isfinite() & (tensor.abs() > largest)).any()):
            names.append(name)
    return names


def _tensors(model: SDXL, vae: AutoencoderKL) -> Iterator[tuple[str, Source]]:
    """Yields all tensors by name. Tensors with master weights have their exact values."""
    for part, module in (("unet", model.unet), ("te1", model.te1), ("te2", model.te2), ("vae", vae)):
        for name, parameter in module.named_parameters():
            dtype, read = model.masters.dtype(parameter), partial(model.masters.value, parameter)
            yield module_name(part, name), Source(shape=tuple(parameter.shape), dtype=dtype, read=read)
    for name, tensor in model.unused.items():
        yield name, source_of(tensor)


def _target(model: SDXL, name: str, source: Source, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype in which a tensor is written: `dtype`, or if that is None, the dtype of its part in memory.

    Tensors that SDXL does not use get the dtype of text encoder 1.
    """
    if dtype is not None:
        return dtype
    part = name.partition(".")[0]
    if part == "vae":
        return source.dtype
    return model.te1.dtype if name in model.unused else getattr(model, part).dtype


def _source(parts: list[tuple[Place, Source]], dtype: torch.dtype) -> Source:
    shape = put([(place, torch.empty(source.shape, device="meta")) for place, source in parts]).shape

    def read() -> Tensor:
        return put([(place, source.read()) for place, source in parts]).to(dtype).contiguous()

    return Source(shape=tuple(shape), dtype=dtype, read=read)
