"""Untrained models with random weights, of any size: for tests, benchmarks and trials without a GPU.

They have the whole CLIP vocabulary, so that real captions work. The scale of their latents is about SDXL's.
"""

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel

from sdxl_finetune.model.architecture import Architecture, TextSize, te1_config
from sdxl_finetune.model.keymap import LOGIT_SCALE, module_name
from sdxl_finetune.model.sdxl import SDXL
from sdxl_finetune.model.vae import build_vae, latent_scale, latent_size


def text_size(width: int, layers: int) -> TextSize:
    """The size of a text encoder with CLIP's proportions."""
    return TextSize(width=width, layers=layers, mlp_width=4 * width, projection=width)


TINY = Architecture(
    unet_widths=(32, 64, 128),
    unet_layers=(2, 2, 2),
    transformer_layers=(0, 1, 2),
    middle_transformer_layers=2,
    time_width=128,
    te1=text_size(64, 3),
    te2=text_size(128, 3),
    vae_widths=(32, 32, 64, 64),
    vae_layers=1,
)
"""About 8 million parameters in the U-Net and 14 million in the text encoders, most of them for the vocabulary."""

SMALL = Architecture(
    unet_widths=(96, 192, 384),
    unet_layers=(2, 2, 2),
    transformer_layers=(0, 1, 2),
    middle_transformer_layers=2,
    time_width=384,
    te1=text_size(128, 6),
    te2=text_size(256, 6),
    vae_widths=(32, 64, 128, 128),
    vae_layers=2,
)
"""About 70 million parameters in the U-Net."""


@torch.no_grad()
def build_random_model(architecture: Architecture, seed: int) -> tuple[SDXL, AutoencoderKL]:
    """A model and its VAE in float32, as diffusers and transformers initialise them. Equal seeds give equal weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SDXL(architecture)
        whole = CLIPTextModel(CLIPTextConfig(**te1_config(architecture)))
        tensors = {module_name("te1", name): tensor.detach() for name, tensor in whole.named_parameters()}
        tensors[LOGIT_SCALE] = torch.tensor(100.0).log()
        model.unused = {name: tensors[name] for name in model.unused_names()}
        vae = build_vae(architecture)
        _scale_latents(vae, torch.rand(4, 3, 64, 64) * 2 - 1)
    return model, vae


def _scale_latents(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Scales encoder and decoder so that latents of such images, times the VAE's scale, have a deviation of 1."""
    deviation, scales = vae.encode(images).latent_dist.mean.std(), latent_scale(vae).scale
    scale = sum(scales) / len(scales)
    last, first = vae.quant_conv or vae.encoder.conv_out, vae.post_quant_conv or vae.decoder.conv_in
    for parameter in last.parameters():
        parameter[: latent_size(vae).channels] /= deviation * scale
    first.weight *= scale
