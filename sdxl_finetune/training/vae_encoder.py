"""The VAE as the latent cache uses it (latents.encoding.Encoder)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from sdxl_finetune.batch import to_images
from sdxl_finetune.errors import counted
from sdxl_finetune.latents.encoding import Encode
from sdxl_finetune.model.vae import encode, latent_size, vae_identity
from sdxl_finetune.runtime.out_of_memory import OutOfMemory, is_out_of_memory


class VaeEncoder:
    """Encodes batches of pixels with a VAE on a device. On a GPU the host goes on meanwhile."""

    def __init__(self, vae: AutoencoderKL, device: torch.device) -> None:
        self._vae, self._device = vae, device
        self.latent_size = latent_size(vae)

    def identity(self) -> str:
        """A hash of all that latents depend on."""
        return vae_identity(self._vae)

    @contextmanager
    def on_device(self) -> Iterator[Encode]:
        """Moves the VAE to the device, and back to host memory when the context ends."""
        self._vae.to(self._device)
        try:
            yield self._start
        finally:
            self._vae.to("cpu")

    def _start(self, pixels: Tensor, noise: Tensor) -> Callable[[], Tensor]:
        is_gpu = self._device.type == "cuda"
        if is_gpu:
            pixels, noise = pixels.pin_memory(), noise.pin_memory()
        try:
            images = to_images(pixels.to(self._device, non_blocking=True))
            latents = encode(self._vae, images, noise.to(self._device, non_blocking=True)).half()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            count, height, width, _ = pixels.shape
            remedy = "lower vae_batch_size" if count > 1 else "use a lower max_bucket_reso or resolution"
            batch = f"{counted(count, 'image')} of {width}x{height}"
            raise OutOfMemory(f"out of memory encoding {batch}: {remedy}") from error
        return start_copy(latents)


def start_copy(tensor: Tensor) -> Callable[[], Tensor]:
    """Starts to copy a tensor to host memory. Returns a function that waits for the copy."""
    arrived = tensor.to("cpu", non_blocking=True)  # on a GPU, into pinned memory
    event = torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None

    def wait() -> Tensor:
        if event is not None:
            event.synchronize()
        return arrived

    return wait
