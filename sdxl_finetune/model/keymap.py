"""The names of an SDXL model's tensors: one table from the modules' names to the keys of a single-file checkpoint.

A *name* is the part and the name in diffusers' or transformers' module: `unet.conv_in.weight`, `te1.text_model...`,
`te2.text_projection.weight`, `vae.encoder...`. A *key* is the name in a single-file checkpoint. Loading and saving use
the same table, so that they cannot disagree. Its rows are those of the golden key maps, for any number of levels and
layers.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

UNET = "model.diffusion_model."
TE1 = "conditioner.embedders.0.transformer."
TE2 = "conditioner.embedders.1.model."
VAE = "first_stage_model."
LOGIT_SCALE = "te2.logit_scale"
"""CLIP's contrastive temperature. transformers' encoder does not use it, and only single-file checkpoints hold it."""

_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESBLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_VAE_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


@dataclass(frozen=True)
class Level:
    """One resolution of the U-Net."""

    layers: int
    """Residual layers on the way down. On the way up there is one more."""
    attention: bool


@dataclass(frozen=True)
class Layout:
    """The numbers of levels and layers that a model's names and keys depend on."""

    unet: tuple[Level, ...]
    te2_layers: int
    vae_levels: int
    vae_layers: int
    """Residual layers of each level of the VAE's encoder. The decoder has one more."""


@dataclass(frozen=True)
class Place:
    """The place of a module's tensor in a single-file checkpoint."""

    key: str
    transposed: bool = False
    """True if the file holds the transposed matrix: OpenCLIP applies text_projection as `pooled @ matrix`."""
    pointwise: bool = False
    """True if the file holds a linear layer's matrix [o, i] as a 1x1 convolution [o, i, 1, 1]."""
    third: int | None = None
    """Third of the file's first dimension, 0 to 2, if the file joins query, key and value in one tensor."""

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The module's shape of a tensor that has shape `stored` in the file."""
        if self.third is not None:
            stored = (stored[0] // 3, *stored[1:])
        if self.pointwise and len(stored) == 4:
            stored = stored[:2]
        return stored[::-1] if self.transposed else stored

    def take(self, stored: Tensor) -> Tensor:
        """The module's tensor, as a view of the file's tensor."""
        if self.third is not None:
            stored = stored.chunk(3)[self.third]
        if self.pointwise and stored.ndim == 4:
            stored = stored[:, :, 0, 0]
        return stored.t() if self.transposed else stored


def put(parts: Iterable[tuple[Place, Tensor]]) -> Tensor:
    """The file's tensor, made of the module's tensors that have their place in it: the inverse of `Place.take`."""
    stored = []
    for place, tensor in sorted(parts, key=lambda part: part[0].third or 0):
        if place.transposed:
            tensor = tensor.t()
        if place.pointwise and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        stored.append(tensor)
    return torch.cat(stored) if len(stored) > 1 else stored[0]


def module_name(part: str, name: str) -> str:
    """The name of a tensor that the module of `part` calls `name`.

    transformers 5 removed the prefix `text_model.` from CLIPTextModel. Names here always have it, as in all files.
    """
    has_no_prefix = part in ("te1", "te2") and not name.startswith(("text_model.", "text_projection.", "logit_scale"))
    return f"{part}.text_model.{name}" if has_no_prefix else f"{part}.{name}"


class KeyMap:
    """The table of names and keys for one layout."""

    def __init__(self, layout: Layout) -> None:
        self._rows: dict[str, Place] = {"te1": Place(TE1.removesuffix("."))}
        for rows in (_unet_rows(layout.unet), _te2_rows(layout.te2_layers), _vae_rows(layout)):
            self._rows.update(rows)

    def place(self, name: str) -> Place:
        """The place of the tensor `name`. Raises KeyError if no SDXL model of this layout has such a tensor."""
        prefix, rest = name, ""
        while prefix not in self._rows:
            prefix, dot, last = prefix.rpartition(".")
            if not dot:
                raise KeyError(name)
            rest = f".{last}{rest}"
        row = self._rows[prefix]
        return Place(row.key + rest, row.transposed, row.pointwise, row.third)


def _unet_rows(levels: tuple[Level, ...]) -> Iterator[tuple[str, Place]]:
    for name, key in _unet_modules(levels):
        yield f"unet.{name}", Place(UNET + key)


def _unet_modules(levels: tuple[Level, ...]) -> Iterator[tuple[str, str]]:
    yield from _UNET_ENDS.items()
    block = 1
    for i, level in enumerate(levels):
        for j in range(level.layers):
            yield from _resnet_modules(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{block}.0")
            yield f"down_blocks.{i}.attentions.{j}", f"input_blocks.{block}.1"
            block += 1
        if i + 1 < len(levels):
            yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{block}.0.op"
            block += 1
    for j in range(2):
        yield from _resnet_modules(f"mid_block.resnets.{j}", f"middle_block.{2 * j}")
    yield "mid_block.attentions.0", "middle_block.1"
    block = 0
    for i, level in enumerate(reversed(levels)):
        for j in range(level.layers + 1):
            yield from _resnet_modules(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{block}.0")
            yield f"up_blocks.{i}.attentions.{j}", f"output_blocks.{block}.1"
            block += 1
        upsampler = 2 if level.attention else 1
        yield f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{block - 1}.{upsampler}.conv"


def _resnet_modules(name: str, key: str) -> Iterator[tuple[str, str]]:
    for inner, stored in _UNET_RESNET.items():
        yield f"{name}.{inner}", f"{key}.{stored}"


def _te2_rows(layers: int) -> Iterator[tuple[str, Place]]:
    yield "te2.text_model.embeddings.token_embedding", Place(f"{TE2}token_embedding")
    yield "te2.text_model.embeddings.position_embedding.weight", Place(f"{TE2}positional_embedding")
    yield "te2.text_model.final_layer_norm", Place(f"{TE2}ln_final")
    yield "te2.text_projection.weight", Place(f"{TE2}text_projection", transposed=True)
    yield LOGIT_SCALE, Place(f"{TE2}logit_scale")
    for n in range(layers):
        name, key = f"te2.text_model.encoder.layers.{n}", f"{TE2}transformer.resblocks.{n}"
        for inner, stored in _RESBLOCK.items():
            yield f"{name}.{inner}", Place(f"{key}.{stored}")
        for third, projection in enumerate(("q_proj", "k_proj", "v_proj")):
            for kind in ("weight", "bias"):
                place = Place(f"{key}.attn.in_proj_{kind}", third=third)
                yield f"{name}.self_attn.{projection}.{kind}", place


def _vae_rows(layout: Layout) -> Iterator[tuple[str, Place]]:
    last = layout.vae_levels - 1
    yield "vae", Place(VAE.removesuffix("."))
    for half in ("encoder", "decoder"):
        name, key = f"vae.{half}", f"{VAE}{half}"
        yield f"{name}.conv_norm_out", Place(f"{key}.norm_out")
        yield f"{name}.mid_block.resnets.0", Place(f"{key}.mid.block_1")
        yield f"{name}.mid_block.resnets.1", Place(f"{key}.mid.block_2")
        attention = f"{name}.mid_block.attentions.0"
        yield f"{attention}.group_norm", Place(f"{key}.mid.attn_1.norm")
        for inner, stored in _VAE_ATTENTION.items():
            yield f"{attention}.{inner}", Place(f"{key}.mid.attn_1.{stored}", pointwise=True)
    for i in range(layout.vae_levels):
        down, up = f"{VAE}encoder.down.{i}", f"{VAE}decoder.up.{last - i}"
        yield f"vae.encoder.down_blocks.{i}.downsamplers.0", Place(f"{down}.downsample")
        yield f"vae.decoder.up_blocks.{i}.upsamplers.0", Place(f"{up}.upsample")
        for j in range(layout.vae_layers + 1):
            for name, key in ((f"vae.encoder.down_blocks.{i}", down), (f"vae.decoder.up_blocks.{i}", up)):
                yield f"{name}.resnets.{j}", Place(f"{key}.block.{j}")
                yield f"{name}.resnets.{j}.conv_shortcut", Place(f"{key}.block.{j}.nin_shortcut")
