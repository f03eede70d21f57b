"""Batch: the value that the data loader gives to the objective.

All random numbers of a training step are drawn before the batch exists. The loss is therefore a plain function of
weights and batch.
"""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Float32, Int64, Num, UInt8
from torch import Tensor

from sdxl_finetune.clip_vocabulary import END, FILL_2

TIMESTEPS = 1000
"""Number of timesteps of SDXL's noise schedule. Timesteps are 0 to 999, and those of a flow 1000 t."""
LATENT_CHANNELS = 4
"""Channels of the latents of SDXL's own VAE."""


@runtime_checkable  # jaxtyping checks annotations in the tests
class Sized(Protocol):
    """Anything with a size in pixels."""

    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...


@dataclass(frozen=True)
class LatentSize:
    """The size of a VAE's latents. The default is that of SDXL's own VAE."""

    pixels: int = 8
    """Pixels of an image for one latent, along one side."""
    channels: int = LATENT_CHANNELS

    def of(self, image: Sized) -> tuple[int, int, int]:
        """Channels, height and width of the latent of a bucket or an image."""
        return self.channels, image.height // self.pixels, image.width // self.pixels


SDXL_LATENTS = LatentSize()


@dataclass(frozen=True)
class Position:
    """The place of a micro-batch in the run. All counts start at 0 at the start of training, never at a resume."""

    epoch: int
    step: int
    """Optimizer step, over the whole run."""
    micro_batch: int
    """Number of the micro-batch within its optimizer step."""
    micro_batches_in_step: int
    """Micro-batches of this optimizer step: `gradient_accumulation_steps`, or fewer at the end of an epoch."""

    @property
    def is_last_micro_batch(self) -> bool:
        return self.micro_batch + 1 == self.micro_batches_in_step


class Tokens(NamedTuple):
    """The input of both text encoders for k captions, and the weight of each token, if captions are weighted."""

    ids1: Int64[Tensor, "k chunks 77"]
    ids2: Int64[Tensor, "k chunks 77"]
    weights: Float32[Tensor, "k chunks 77"] | None = None

    @property
    def empty(self) -> Bool[Tensor, " k"]:
        """True for captions without a token: dropped captions, empty caption files, prompts without text."""
        inner = self.ids2[:, :, 1:]
        return ((inner[..., 0] == END) & (inner[..., 1:] == FILL_2).all(-1)).all(-1)

    def to(self, device: torch.device) -> "Tokens":
        """Copies the tokens to `device`. A copy from the CPU to a GPU starts from pinned memory."""

        def copy(tensor: Tensor) -> Tensor:
            pinned = tensor.pin_memory() if device.type == "cuda" and not tensor.is_cuda else tensor
            return pinned.to(device, non_blocking=True)

        return Tokens(copy(self.ids1), copy(self.ids2), None if self.weights is None else copy(self.weights))


class TextOutputs(NamedTuple):
    """The input of the U-Net for k captions: hidden states (t = 75 x chunks + 2 positions) and pooled output."""

    hidden: Float[Tensor, "k t c"]
    pooled: Float[Tensor, "k p"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """k images of one bucket, for one rank. Image sizes are (height, width) in pixels; h and w are latent sizes."""

    position: Position
    latents: Float32[Tensor, "k z h w"] | None
    """Latents as the VAE gives them, not scaled for the U-Net. None if the training device encodes."""
    images: Float32[Tensor, "k 3 H W"] | None
    """Pixels in [-1, 1], for the training device to encode. None if there are latents."""
    encoding_noise: Float32[Tensor, "k z h w"] | None
    """Standard normal noise for the VAE's sample of `images`."""
    noise: Float32[Tensor, "k z h w"]
    input_noise: Float32[Tensor, "k z h w"] | None
    """Noise that is added to `noise` for the model's input only (`ip_noise_gamma`)."""
    negative_latents: Float32[Tensor, "k z h w"] | None = None
    """For each image the latents of another image, scaled as the U-Net sees them, for `contrastive_flow_matching`. None
    without that option, and in a micro-batch of one image."""
    negative_noise: Float32[Tensor, "k z h w"] | None = None
    """Noise of the images of `negative_latents`."""
    timesteps: Num[Tensor, " k"]
    """0 to 999 in int64; those of a flow in float32, above 0 and up to 1000."""
    tokens1: Int64[Tensor, "k chunks 77"] | None = None
    """Tokens for text encoder 1. None if there are cached outputs."""
    tokens2: Int64[Tensor, "k chunks 77"] | None = None
    token_weights: Float32[Tensor, "k chunks 77"] | None = None
    """Weight of each token of `weighted_captions`, the same for both text encoders."""
    hidden: Float[Tensor, "k t c"] | None = None
    """Hidden states of both text encoders: float16 from a cache, or just encoded. None if there are tokens."""
    pooled: Float[Tensor, "k p"] | None = None
    """Pooled output of text encoder 2, like `hidden`."""
    original_size: Int64[Tensor, "k 2"]
    crop_top_left: Int64[Tensor, "k 2"]
    target_size: Int64[Tensor, "k 2"]
    mask: Float32[Tensor, "k h w"] | None = None
    """Factor of the loss at each place, 0 to 1. None if no image of the run has a mask."""
    weights: Float32[Tensor, " k"]
    """Share of each image's loss in the step, times its loss weight. Over all ranks and all micro-batches of the step,
    the shares add up to the number of ranks, because data-parallel training averages gradients over ranks."""
    images_in_step: int = 0
    """Images of this micro-batch over all ranks."""
    first_slot: int | None = 0
    """Place of the rank's first image among the images of this micro-batch. The others follow it. None for a rank that
    has no image of its own and stands in with another one at weight 0."""
    timesteps_of_ranks: tuple[float, ...] = ()
    """Timesteps of this micro-batch over all ranks, for the log. They stay on the host."""

    @property
    def text(self) -> Tokens | TextOutputs:
        """The captions as the model is given them: cached outputs, or tokens to encode."""
        if self.hidden is not None and self.pooled is not None:
            return TextOutputs(self.hidden, self.pooled)
        assert self.tokens1 is not None and self.tokens2 is not None
        return Tokens(self.tokens1, self.tokens2, self.token_weights)

    def among_ranks(self, values: Float[Tensor, " k"]) -> Float[Tensor, " n"]:
        """Values of the rank's images at their places among the n images of all ranks, and 0 at all other places."""
        if self.first_slot is None:
            return torch.zeros(self.images_in_step, dtype=values.dtype, device=values.device)
        after = self.images_in_step - self.first_slot - len(values)
        return torch.nn.functional.pad(values, (self.first_slot, after))

    def to(self, device: torch.device) -> "Batch":
        """Copies the batch to `device`. A copy from pinned memory runs while the host continues."""
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
    """Converts 8-bit pixels to images in [-1, 1], on the same device."""
    pixels = pixels.permute(0, 3, 1, 2)
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)
