"""Copies of a model with a change, and the error of a change of weights, for scripts/benchmarks/proof.py."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from scripts.benchmarks.proof_reads import TWIN
from scripts.toy.world import NEW_STYLE
from sdxl_finetune.data.tokens import load_encoding, token_ids

Tensors = Mapping[str, torch.Tensor]
PROJECTION = "conditioner.embedders.1.model.text_projection"


def save_like(model: Path, target: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Writes tensors with the metadata of the file `model`."""
    with safe_open(model, "pt") as file:
        save_file(tensors, target, file.metadata())
    return target


def merge_words(model: Path, target: Path) -> Path:
    """Writes a copy of `model` in which both words have the same vector in both text encoders."""
    (style_id,), (twin_id,) = (token_ids(word, load_encoding(None)) for word in (NEW_STYLE, TWIN))
    tensors = load_file(model)
    for name, tensor in tensors.items():
        if name.endswith("token_embedding.weight"):
            tensor[twin_id] = tensor[style_id]
    return save_like(model, target, tensors)


def transpose_projection(model: Path, target: Path) -> Path:
    """Writes a copy of `model` with text encoder 2's projection matrix transposed."""
    tensors = load_file(model)
    tensors[PROJECTION] = tensors[PROJECTION].T.contiguous()
    return save_like(model, target, tensors)


def as_bf16(model: Path, target: Path) -> dict[str, torch.Tensor]:
    """Writes a copy of `model` in bf16 and returns its tensors."""
    tensors = {
        name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in load_file(model).items()
    }
    save_like(model, target, tensors)
    return tensors


def relative_error(part: str, before: Tensors, exact: Tensors, other: Tensors) -> float:
    """Returns the relative L2 error of a change of weights, for the tensors whose names begin with `part`.

    The change from `before` to `other` is compared with the change from `before` to `exact`.
    """
    names = [name for name, tensor in before.items() if name.startswith(part) and tensor.is_floating_point()]
    exact_change, other_change = (
        [end[name].float() - before[name].float() for name in names] for end in (exact, other)
    )
    error = sum(float((a - b).square().sum()) for a, b in zip(exact_change, other_change, strict=True))
    return math.sqrt(error / max(sum(float(change.square().sum()) for change in exact_change), 1e-30))
