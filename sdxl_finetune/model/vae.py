"""The VAE's two directions, in float32 whatever else runs in half precision: SDXL's overflows in float16.

Latents here are unscaled: what the encoder's distribution gives. The U-Net works on `latents * scaling_factor`,
which `vae.config.scaling_factor` says (0.13025). Sides of images are multiples of `pixels_per_latent(vae)`.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float, Float32
from torch import Tensor

from sdxl_finetune.batch import Batch


def pixels_per_latent(vae: AutoencoderKL) -> int:
    """Along one side: 8 for SDXL's four levels."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def vae_identity(vae: AutoencoderKL) -> str:
    """The same for the same weights, whatever file they came from."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)} ".encode())
        digest.update(tensor.float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def encode(
    vae: AutoencoderKL, images: Float[Tensor, "k 3 H W"], noise: Float32[Tensor, "k 4 h w"] | None = None
) -> Float32[Tensor, "k 4 h w"]:
    """Latents of images in [-1, 1]: mean + deviation x `noise` of the encoder's distribution, or its mean without."""
    with _float32(vae, images):
        distribution = vae.encode(images.float()).latent_dist
    return distribution.mean if noise is None else distribution.mean + distribution.std * noise


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Float[Tensor, "k 4 h w"]) -> Float32[Tensor, "k 3 H W"]:
    """Images of unscaled latents; about [-1, 1], not clipped."""
    with _float32(vae, latents):
        return vae.decode(latents.float()).sample


def batch_latents(batch: Batch, vae: AutoencoderKL, *, drawn: bool = True) -> Float[Tensor, "k 4 h w"]:
    """The batch's latents as the U-Net sees them. Images that have none cached are encoded: each latent is drawn from
    the encoder's distribution with the batch's noise, or is its mean.
    """
    latents = batch.latents
    if latents is None:
        assert batch.images is not None
        latents = encode(vae, batch.images, batch.encoding_noise if drawn else None)
    return latents * vae.config.scaling_factor


@contextmanager
def _float32(vae: AutoencoderKL, tensor: Tensor) -> Iterator[None]:
    assert vae.dtype == torch.float32
    with torch.autocast(tensor.device.type, enabled=False):
        yield
