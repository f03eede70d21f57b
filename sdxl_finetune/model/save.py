"""Saves an SDXL checkpoint with the reference's keys, shapes and dtypes.

The formats are a single .safetensors or .ckpt file and a diffusers folder. Tensors are converted and written one at a
time, so that saving needs hardly any memory. The exception is .ckpt: a pickle holds all tensors at once. Writing is not
atomic: the caller gives a temporary path (`files.atomic_path`).
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from typing_extensions import assert_never

from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.model.declared import EDM, MODELSPEC, marked_objective
from sdxl_finetune.model.diffusers_folder import save_folder
from sdxl_finetune.model.keymap import LOGIT_SCALE, KeyMap, Place, module_name, put
from sdxl_finetune.model.sdxl import SDXL
from sdxl_finetune.model.tensorfile import Source, source_of, write_pickle, write_safetensors
from sdxl_finetune.model.vae_file import LATENTS, describe_latents, scale_tensors
from sdxl_finetune.model.weights import Weights

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

    If `dtype` is None, tensors keep their dtype in memory. The rest is as in `save_weights`. Values beyond the range of
    float16 become infinite; call `saturated` to find them.
    """
    weights = _weights(model, vae, dtype)
    save_weights(path, weights, save_as=save_as, metadata=metadata, epoch=epoch, global_step=global_step)


def save_weights(
    path: Path, weights: Weights, *, save_as: SaveAs, metadata: Mapping[str, str], epoch: int = 0, global_step: int = 0
) -> None:
    """Writes the weights to `path`. The objective is written where programs look for it.

    Single files get the marker tensors, and a diffusers folder the config of its scheduler. `metadata` goes into
    .safetensors files, with `modelspec.prediction_type` set to `v` for v-prediction and to `flow` for a flow. `epoch`
    and `global_step` go into a .ckpt file. Raises UserError for an EDM model as a diffusers folder.
    """
    if (objective := marked_objective(weights.markers)) != "noise":
        metadata = {**metadata, "modelspec.prediction_type": MODELSPEC[objective]}
    metadata = {key: value for key, value in metadata.items() if key != LATENTS}
    metadata |= describe_latents(weights.architecture)
    match save_as:
        case "safetensors":
            write_safetensors(path, _single_file(weights), metadata)
        case "ckpt":
            state = {key: source.read() for key, source in _single_file(weights).items()}
            write_pickle(path, {"state_dict": state, "epoch": epoch, "global_step": global_step})
        case "diffusers" | "diffusers_safetensors":
            if edm := [key for key in EDM if key in weights.markers]:
                message = f"a diffusers folder has no place for {edm[0]}: save the model as safetensors or ckpt"
                raise UserError(Problem(message, key="save_model_as", value=save_as))
            tensors = {name: source for name, source in weights.tensors.items() if name != LOGIT_SCALE}
            inside = replace(weights, tensors=tensors)
            save_folder(path, inside, metadata, safe=save_as == "diffusers_safetensors")
        case _:
            assert_never(save_as)


def converted(weights: Weights, dtype: torch.dtype) -> Weights:
    """Converts weights to `dtype` when they are read."""
    tensors = {name: _joined([(Place(name), source)], dtype) for name, source in weights.tensors.items()}
    return replace(weights, tensors=tensors)


def single_file_tensors(
    model: SDXL, vae: AutoencoderKL, dtype: torch.dtype | None, *, exact: bool = False
) -> dict[str, Source]:
    """All tensors of a single-file checkpoint by key, converted to `dtype` when they are read.

    If `exact`, tensors are not converted, and tensors with master weights are float32.
    """
    return _single_file(_weights(model, vae, dtype, exact=exact))


def _weights(model: SDXL, vae: AutoencoderKL, dtype: torch.dtype | None, *, exact: bool = False) -> Weights:
    tensors = {
        name: source if exact else _joined([(Place(name), source)], _target(model, name, source, dtype))
        for name, source in _tensors(model, vae)
    }
    return Weights(architecture=model.architecture, tensors=tensors, markers=model.markers)


def _single_file(weights: Weights) -> dict[str, Source]:
    """The tensors of a single-file checkpoint by key. A tensor that is joined of several has their common dtype."""
    keymap = KeyMap(weights.architecture.layout)
    parts: dict[str, list[tuple[Place, Source]]] = defaultdict(list)
    extras = {name: source_of(tensor) for name, tensor in scale_tensors(weights.architecture).items()}
    for name, source in ({**weights.tensors, **extras}).items():
        place = keymap.place(name)
        parts[place.key].append((place, source))
    joined = {
        key: _joined(group, reduce(torch.promote_types, [source.dtype for _, source in group]))
        for key, group in parts.items()
    }
    return joined | {key: source_of(marker) for key, marker in weights.markers.items()}


def checkpoint_bytes(model: SDXL, vae: AutoencoderKL, dtype: torch.dtype | None) -> int:
    """Bytes of the tensors of a checkpoint in `dtype`. If `dtype` is None, tensors keep their dtype in memory."""
    return sum(
        math.prod(source.shape) * _target(model, name, source, dtype).itemsize for name, source in _tensors(model, vae)
    )


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


def _joined(parts: list[tuple[Place, Source]], dtype: torch.dtype) -> Source:
    shape = put([(place, torch.empty(source.shape, device="meta")) for place, source in parts]).shape

    def read() -> Tensor:
        return put([(place, source.read()) for place, source in parts]).to(dtype).contiguous()

    return Source(shape=tuple(shape), dtype=dtype, read=read)
