"""The tensors of a checkpoint by name (see keymap.py), whichever layout the checkpoint is stored in."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from sdxl_finetune.errors import UserError
from sdxl_finetune.model.keymap import TE2, UNET, VAE, KeyMap, Layout, Level, Place
from sdxl_finetune.model.tensorfile import Source

T = TypeVar("T")


class NamedTensors:
    """The tensors of a checkpoint by name, in the shapes of the modules."""

    def __init__(self, tensors: Mapping[str, Source]) -> None:
        self.tensors = tensors
        single_file = not any(key.startswith(("unet.", "te1.", "te2.", "vae.")) for key in tensors)
        self.layout = _single_file_layout(tensors) if single_file else _diffusers_layout(tensors)
        self._keymap = KeyMap(self.layout) if single_file else None

    def __contains__(self, name: str) -> bool:
        return self.key(name) in self.tensors

    def key(self, name: str) -> str:
        """The key under which the file would hold the tensor `name`."""
        return self._place(name).key

    def count(self, pattern: str) -> int:
        """The number of tensors whose names are `pattern` with 0, 1, 2, ... in it."""
        return _count(self, pattern)

    def shape(self, name: str) -> tuple[int, ...]:
        """The module's shape of a tensor. Raises UserError if the file does not hold it."""
        place = self._place(name)
        if place.key not in self.tensors:
            raise UserError(f"the file has no tensor {place.key}: it is damaged or not SDXL; fetch or save it again")
        return place.shape(self.tensors[place.key].shape)

    def read(self, name: str) -> Tensor:
        """The values of a tensor, as a view of the file's tensor where possible."""
        place = self._place(name)
        return place.take(self.tensors[place.key].read())

    def _place(self, name: str) -> Place:
        # In the diffusers layout, keys are names. A name that the single-file layout does not have is its own key.
        try:
            return self._keymap.place(name) if self._keymap else Place(name)
        except KeyError:
            return Place(name)


def common_value(values: Sequence[T], what: str) -> T:
    """The value that all `values` have. Raises UserError, which names `what`, if they differ."""
    if len(set(values)) != 1:
        raise UserError(f"the {what} is not the same everywhere ({values}): this is not SDXL's U-Net")
    return values[0]


def _single_file_layout(keys: Mapping[str, object]) -> Layout:
    levels: list[Level] = []
    attention: list[bool] = []
    for block in range(1, len(keys) + 2):
        prefix = f"{UNET}input_blocks.{block}"
        if f"{prefix}.0.in_layers.0.weight" in keys:
            attention.append(f"{prefix}.1.proj_in.weight" in keys)
            continue
        levels.append(_level(len(levels), attention))
        attention = []
        if f"{prefix}.0.op.weight" not in keys:
            break
    return Layout(
        unet=tuple(levels),
        te2_layers=_count(keys, TE2 + "transformer.resblocks.{}.ln_1.weight"),
        vae_levels=_count(keys, VAE + "encoder.down.{}.block.0.conv1.weight"),
        vae_layers=_count(keys, VAE + "encoder.down.0.block.{}.conv1.weight"),
    )


def _diffusers_layout(names: Mapping[str, object]) -> Layout:
    levels = []
    for i in range(_count(names, "unet.down_blocks.{}.resnets.0.conv1.weight")):
        layers = range(_count(names, f"unet.down_blocks.{i}.resnets.{{}}.conv1.weight"))
        attention = [f"unet.down_blocks.{i}.attentions.{j}.proj_in.weight" in names for j in layers]
        levels.append(_level(i, attention))
    return Layout(
        unet=tuple(levels),
        te2_layers=_count(names, "te2.text_model.encoder.layers.{}.layer_norm1.weight"),
        vae_levels=_count(names, "vae.encoder.down_blocks.{}.resnets.0.conv1.weight"),
        vae_layers=_count(names, "vae.encoder.down_blocks.0.resnets.{}.conv1.weight"),
    )


def _level(number: int, attention: list[bool]) -> Level:
    return Level(len(attention), bool(attention) and common_value(attention, f"attention of level {number}"))


def _count(names: Mapping[str, object] | NamedTensors, pattern: str) -> int:
    count = 0
    while pattern.format(count) in names:
        count += 1
    return count
