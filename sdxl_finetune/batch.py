"""Batch: the one thing that passes from data to objective. Everything random in a training step has been drawn
by then, so that the loss is a plain function of weights and batch.
"""

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

TIMESTEPS = 1000
"""Of the noise schedule that SDXL was trained with: a batch's timesteps are 0 to 999."""
LATENT_CHANNELS = 4
"""Channels of SDXL's latents."""


@dataclass(frozen=True)
class Position:
    """Where a micro-batch stands in the run; all counts start at 0 at the start of training, never of a resume."""

    epoch: int
    step: int
    """Optimizer step, over the whole run."""
    micro: int
    """Micro-batch within the step's accumulation window."""
    micros: int
    """How many micro-batches that window has (fewer at the end of an epoch)."""

    @property
    def last_micro(self) -> bool:
        return self.micro + 1 == self.micros


@dataclass(frozen=True, kw_only=True)
class Batch:
    """k images of one bucket, for one rank. Sizes are pixels, (height, width); h, w are latent sizes, an eighth."""

    position: Position
    latents: Float32[Tensor, "k 4 h w"] | None
    """As the VAE gives them, unscaled; None when `images` are to be encoded on the training device."""
    images: Float32[Tensor, "k 3 H W"] | None
    """In [-1, 1]."""
    encoding_noise: Float32[Tensor, "k 4 h w"] | None
    """Standard normal, for the VAE's sample of `images`."""
    noise: Float32[Tensor, "k 4 h w"]
    input_noise: Float32[Tensor, "k 4 h w"] | None
    """Added to `noise` for the model's input only (ip_noise_gamma)."""
    timesteps: Int64[Tensor, " k"]
    tokens1: Int64[Tensor, "k chunks 77"]
    tokens2: Int64[Tensor, "k chunks 77"]
    token_weights: Float32[Tensor, "k chunks 77"] | None
    """Of weighted_captions; one weight per token position, the same for both encoders."""
    original_size: Int64[Tensor, "k 2"]
    crop_top_left: Int64[Tensor, "k 2"]
    target_size: Int64[Tensor, "k 2"]
    weights: Float32[Tensor, " k"]
    """Share of each image's loss in the step: over all ranks and the micro-batches of a window they add up to
    the number of ranks (data parallel training averages over ranks)."""
    images_in_step: int = 0
    """Images that this micro-batch trains on, over all ranks."""

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`; copies from pinned memory do not wait."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change) -> "Batch":  # type: ignore[no-untyped-def]
        changed = {
            field.name: change(value)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **changed)


def to_images(pixels: UInt8[Tensor, "k H W 3"]) -> Float32[Tensor, "k 3 H W"]:
    """Images in [-1, 1] of pixels of 0 to 255, on their device."""
    pixels = pixels.permute(0, 3, 1, 2)
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)
