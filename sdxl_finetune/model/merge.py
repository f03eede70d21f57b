"""Merges of SDXL models: each tensor of the result is a weighted sum of the models' tensors.

An average has weights of sum 1. `A + (B - C) * m` has the weights 1, m and -m. The sum is computed in float64 and
rounded once. Tensors are summed one at a time when a writer reads them. A merge therefore needs memory for about five
times the largest tensor, whatever the number and the size of the models.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.model.declared import EDM, FLOW, FLOW_KEYS, V_PRED, ZTSNR
from sdxl_finetune.model.keymap import LOGIT_SCALE, UNET, KeyMap
from sdxl_finetune.model.tensorfile import Source
from sdxl_finetune.model.weights import Weights

PARTS = ("unet", "te1", "te2", "vae")
SLICE = 1 << 22
"""Numbers that are converted to float64 at once: 32 MiB."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The weights of each model, in the order of the models."""

    parts: Mapping[str, tuple[float, ...]]
    """Weights by part (PARTS)."""
    blocks: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Weights by block of the U-Net, as `input_blocks.4` or `output_blocks`. The longest name that fits wins."""

    def weights(self, name: str, key: str) -> tuple[float, ...]:
        """The weights of the tensor with this name and this key in a single-file checkpoint."""
        inside = key.removeprefix(UNET) + "."
        fitting = [block for block in self.blocks if name.startswith("unet.") and inside.startswith(f"{block}.")]
        if fitting:
            return self.blocks[max(fitting, key=len)]
        return self.parts[name.partition(".")[0]]

    def unet_weights(self) -> list[tuple[float, ...]]:
        """All weights that any tensor of the U-Net has."""
        return [self.parts["unet"], *self.blocks.values()]


@dataclass(frozen=True)
class Ingredient:
    """A model to merge, and its name in messages."""

    name: str
    weights: Weights


def merge_weights(models: Sequence[Ingredient], recipe: Recipe, dtype: torch.dtype) -> Weights:
    """The merge of the models, with tensors of `dtype`.

    Raises UserError if the models have other sizes or objectives, or if a block is unknown. Reading a tensor raises
    UserError if a value of the result is infinite or NaN.
    """
    first = models[0].weights
    if problems := list(_size_problems(models)):
        raise UserError(problems)
    markers = _merge_markers(models, recipe)
    keymap = KeyMap(first.architecture.layout)
    keys = {name: keymap.place(name).key for name in first.tensors}
    for block in recipe.blocks:
        if not any(key.startswith(f"{UNET}{block}.") for key in keys.values()):
            message = "the U-Net has no such block: give input_blocks, middle_block or output_blocks, as input_blocks.4"
            raise UserError(Problem(message, key="block_weights", value=block))
    tensors = {}
    for name, source in first.tensors.items():
        sources = [model.weights.tensors.get(name) for model in models]
        weights = recipe.weights(name, keys[name])
        if name == LOGIT_SCALE and None in sources:  # SDXL never uses it, and diffusers folders do not hold it
            sources, weights = [source], (1.0,)
        used = [
            (model.name, each, weight)
            for model, each, weight in zip(models, sources, weights, strict=False)
            if each is not None and weight
        ]
        read = partial(_read_sum, name, source.shape, used, dtype)
        tensors[name] = Source(shape=source.shape, dtype=dtype, read=read)
    return Weights(architecture=first.architecture, tensors=tensors, markers=markers)


def _read_sum(
    name: str, shape: tuple[int, ...], used: Sequence[tuple[str, Source, float]], dtype: torch.dtype
) -> Tensor:
    """The weighted sum of one tensor over the models. A single model of weight 1 is copied exactly."""
    total = torch.zeros(shape, dtype=torch.float64).reshape(-1)
    for _, source, weight in used:
        values = source.read().reshape(-1)
        for start in range(0, len(total), SLICE):
            part = slice(start, start + SLICE)
            total[part].add_(values[part].double(), alpha=weight)
    result = total.to(dtype)
    if not result.isfinite().all():
        if total.isfinite().all():
            message = f"the merge of {name} holds values beyond the range of {str(dtype).removeprefix('torch.')}"
            raise UserError(Problem(f"{message}: choose bf16 or float", key="save_precision"))
        broken = next(file for file, source, _ in used if not source.read().isfinite().all())
        raise UserError(Problem(f"{name} holds infinite values or NaN: choose another checkpoint", file=broken))
    return result.reshape(shape)


def _size_problems(models: Sequence[Ingredient]) -> Iterator[Problem]:
    first = models[0]
    for model in models[1:]:
        for each in dataclasses.fields(first.weights.architecture):
            values = [getattr(one.weights.architecture, each.name) for one in (first, model)]
            if values[0] != values[1]:
                message = f"the model has another size than {first.name}: {each.name} is {values[1]}, not {values[0]}"
                yield Problem(f"{message}. Only models of one size can be merged", file=model.name)
                break


def _merge_markers(models: Sequence[Ingredient], recipe: Recipe) -> Mapping[str, Tensor]:
    """The marker tensors of the merge. Raises UserError if the U-Nets that are mixed have different objectives.

    A model with an objective counts as 1, and a model without it as 0. The same sum as for the weights must give 0 or 1
    for each block of the U-Net. `A + (B - C) * 1` may thus add v-prediction to A, if B has it and C has not. It may not
    add a second objective. A merge of flows has the shift of the first.
    """
    mixed = recipe.unet_weights()
    used = [model for number, model in enumerate(models) if any(weights[number] for weights in mixed)]
    edm = [{key: model.weights.markers[key].tolist() for key in EDM if key in model.weights.markers} for model in used]
    for model, its in zip(used, edm, strict=True):
        if its != edm[0]:
            message = f"one of this file and {used[0].name} is an EDM model (Playground v2.5, CosXL), the other is not"
            raise UserError(Problem(f"{message}, or has other noise levels. They cannot be merged", file=model.name))
    markers = {key: tensor for key, tensor in used[0].weights.markers.items() if key in EDM}
    for key, meaning, option in (
        (FLOW, "flow objective", "flow_model"),
        (V_PRED, "v-prediction", "v_parameterization"),
        (ZTSNR, "zero terminal SNR", "zero_terminal_snr"),
    ):
        flags = [float(key in model.weights.markers) for model in models]
        sums = {round(sum(w * f for w, f in zip(weights, flags, strict=True)), 6) for weights in mixed}
        if len(sums) > 1 or not sums <= {0.0, 1.0}:
            have = [model.name for model in used if key in model.weights.markers]
            lack = [model.name for model in used if key not in model.weights.markers]
            message = f"has no {meaning}, but {', '.join(have)} has: their U-Nets in one would draw noise"
            remedy = f"If the file only does not say so: sdxl-model convert FILE NEW --{option}"
            raise UserError(Problem(f"{message}. {remedy}", file=", ".join(lack) or models[0].name))
        if sums == {1.0}:
            markers[key] = torch.empty(0)
    if FLOW in markers and not markers.keys().isdisjoint((V_PRED, ZTSNR)):
        names = ", ".join(model.name for model in used)
        message = "their sum would be a flow and have v-prediction or zero terminal SNR, and a model has one objective"
        raise UserError(Problem(f"{message}. Merge models of one objective", file=names))
    if FLOW in markers:
        first = next(model.weights.markers for model in used if FLOW in model.weights.markers)
        markers |= {key: first[key] for key in FLOW_KEYS if key in first}
    return markers
