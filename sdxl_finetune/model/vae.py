"""Encoding and decoding by the VAE, always in float32, because SDXL's VAE overflows in float16.

Latents in this module are unscaled, as the encoder's distribution gives them. The U-Net works on latents times
`vae.config.scaling_factor` (0.13025). The sides of images are multiples of `pixels_per_latent(vae)`.
"""

import hashlib

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float, Float32
from torch import Tensor

from sdxl_finetune.batch import Batch


def pixels_per_latent(vae: AutoencoderKL) -> int:
    """Pixels of an image for one latent, along one side: 8 for SDXL's four levels."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def vae_identity(vae: AutoencoderKL) -> str:
    """A hash of the VAE's weights as float32 values, in 32 hex digits. It does not depend on the file."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)} ".encode())
        digest.update(tensor.float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def encode(
    vae: AutoencoderKL, images: Float[Tensor, "k 3 H W"], noise: Float32[Tensor, "k 4 h w"] | None = None
) -> Float32[Tensor, "k 4 h w"]:
    """Latents of images in [-1, 1]: mean + standard deviation x `noise` of the encoder's distribution.

    Without `noise` the latents are the mean.
    """
    assert vae.dtype == torch.float32
    with torch.autocast(images.device.type, enabled=False):
        distribution = vae.encode(images.float()).latent_dist
    return distribution.mean if noise is None else distribution.mean + distribution.std * noise


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Float[Tensor, "k 4 h w"]) -> Float32[Tensor, "k 3 H W"]:
    """Images of unscaled latents, about in [-1, 1] and not clipped."""
    assert vae.dtype == torch.float32
    with torch.autocast(latents.device.type, enabled=False):
        return vae.decode(latents.float()).sample


def batch_latents(batch: Batch, vae: AutoencoderKL, *, drawn: bool = True) -> Float[Tensor, "k 4 h w"]:
    """The batch's latents, multiplied by the VAE's scaling factor. Images without cached latents are encoded.

    A latent is a sample of the encoder's distribution by the batch's encoding noise. If not `drawn`, it is the mean.
    """
    latents = batch.latents
    if latents is None:
        assert batch.images is not None
        latents = encode(vae, batch.images, batch.encoding_noise if drawn else None)
    return latents * vae.config.scaling_factor
