"""A model for the latents of another VAE: its first and last convolution get other numbers of channels.

All other weights of the U-Net stay. The model does not know the new latents yet: it has to be trained on them.
"""

from dataclasses import fields, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from sdxl_finetune.model.architecture import VaeArchitecture
from sdxl_finetune.model.load import OpenedVae
from sdxl_finetune.model.tensorfile import Source
from sdxl_finetune.model.weights import Weights

NewChannels = Literal["zero", "copy"]
CONV_IN, CONV_OUT = "unet.conv_in.weight", ("unet.conv_out.weight", "unet.conv_out.bias")


def adapt_latents(model: Weights, vae: OpenedVae, new_channels: NewChannels) -> Weights:
    """The model with another VAE, and with a U-Net of as many channels as that VAE's latents have.

    The first channels keep their weights. Further ones are `zero`, so that the U-Net ignores them and predicts 0, or a
    `copy`: channel i gets the weights of channel i modulo the number of old ones. Weights of the first convolution that
    are copied n times are divided by the root of n, so that its output keeps its variance on independent channels.
    """
    old, new = model.architecture.latent_channels, vae.architecture.latent_channels
    tensors = {name: source for name, source in model.tensors.items() if not name.startswith("vae.")}
    tensors |= vae.sources()
    if old != new:
        tensors[CONV_IN] = _changed(tensors[CONV_IN], 1, old, new, new_channels)
        for name in CONV_OUT:
            tensors[name] = _changed(tensors[name], 0, old, new, new_channels)
    changed = {field.name: getattr(vae.architecture, field.name) for field in fields(VaeArchitecture)}
    return replace(model, architecture=replace(model.architecture, **changed), tensors=tensors)


def _changed(source: Source, axis: int, old: int, new: int, new_channels: NewChannels) -> Source:
    shape = (*source.shape[:axis], new, *source.shape[axis + 1 :])
    return replace(source, shape=shape, read=partial(_read, source, axis, old, new, new_channels))


def _read(source: Source, axis: int, old: int, new: int, new_channels: NewChannels) -> Tensor:
    channels = torch.arange(new)
    tensor = source.read().index_select(axis, channels % old).clone()
    rows = tensor.transpose(0, axis)
    if new_channels == "zero":
        rows[old:] = 0
    elif axis == 1:
        copies = (channels % old).bincount(minlength=old)[channels % old]
        rows /= copies.sqrt().to(rows.dtype).view(-1, 1, 1, 1)
    return tensor
