"""Encoding and decoding by the VAE, always in float32, because SDXL's VAE overflows in float16.

Latents in this module are unscaled, as the encoder's distribution gives them. The U-Net works on those that
`latent_scale(vae)` scales. The sides of images are multiples of `latent_size(vae).pixels`.
"""

import hashlib

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float, Float32
from torch import Tensor, nn

from sdxl_finetune.batch import Batch, LatentSize
from sdxl_finetune.model.architecture import VaeArchitecture, vae_config
from sdxl_finetune.model.latent_scale import LatentScale, scale_of_config

PADDING = "padding_mode"
"""Entry of a VAE's config with the padding of its convolutions, "reflect" or "zeros"."""


def build_vae(architecture: VaeArchitecture) -> AutoencoderKL:
    """A VAE in evaluation mode, without gradients, with the random weights of diffusers.

    With reflection padding, all convolutions that pad do it by reflection. Those that shrink the image are given an
    image that diffusers has already padded with zeros, and keep this, as in the fork.
    """
    vae = AutoencoderKL(**vae_config(architecture))
    if architecture.vae_reflection_padding:
        for module in vae.modules():
            if isinstance(module, nn.Conv2d) and any(module.padding):
                module.padding_mode = "reflect"
        vae.register_to_config(**{PADDING: "reflect"})
    return vae.eval().requires_grad_(False)


def latent_size(vae: AutoencoderKL) -> LatentSize:
    """Channels of the VAE's latents, and how much smaller they are than images: 4 and 8 for SDXL's four levels."""
    return LatentSize(2 ** (len(vae.config.block_out_channels) - 1), vae.config.latent_channels)


def latent_scale(vae: AutoencoderKL) -> LatentScale:
    """The shift and the scale from the VAE's latents to the U-Net's."""
    return scale_of_config(vae.config)


def vae_identity(vae: AutoencoderKL) -> str:
    """A hash of all that latents depend on, in 32 hex digits: the VAE's weights as float32 values, and its padding.

    It depends neither on the file nor on the scale of the latents, because cached latents are unscaled.
    """
    digest = hashlib.blake2b(digest_size=16)
    if vae.config.get(PADDING) == "reflect":
        digest.update(b"reflection padding ")
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)} ".encode())
        digest.update(tensor.float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def encode(
    vae: AutoencoderKL, images: Float[Tensor, "k 3 H W"], noise: Float32[Tensor, "k c h w"] | None = None
) -> Float32[Tensor, "k c h w"]:
    """Latents of images in [-1, 1]: mean + standard deviation x `noise` of the encoder's distribution.

    Without `noise` the latents are the mean.
    """
    assert vae.dtype == torch.float32
    with torch.autocast(images.device.type, enabled=False):
        distribution = vae.encode(images.float()).latent_dist
    return distribution.mean if noise is None else distribution.mean + distribution.std * noise


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Float[Tensor, "k c h w"]) -> Float32[Tensor, "k 3 H W"]:
    """Images of unscaled latents, about in [-1, 1] and not clipped."""
    assert vae.dtype == torch.float32
    with torch.autocast(latents.device.type, enabled=False):
        return vae.decode(latents.float()).sample


def batch_latents(batch: Batch, vae: AutoencoderKL, *, drawn: bool = True) -> Float[Tensor, "k c h w"]:
    """The batch's latents, scaled for the U-Net. Images without cached latents are encoded.

    A latent is a sample of the encoder's distribution by the batch's encoding noise. If not `drawn`, it is the mean.
    """
    latents = batch.latents
    if latents is None:
        assert batch.images is not None
        latents = encode(vae, batch.images, batch.encoding_noise if drawn else None)
    return latent_scale(vae).scaled(latents)
