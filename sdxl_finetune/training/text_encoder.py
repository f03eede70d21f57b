"""The text encoders as the cache of their outputs uses them (latents.captions.TextEncoder)."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sdxl_finetune.data.tokens import Tokenizer
from sdxl_finetune.latents.captions import EncodeText
from sdxl_finetune.model.sdxl import SDXL
from sdxl_finetune.model.text import encode_tokens
from sdxl_finetune.runtime.out_of_memory import OutOfMemory, is_out_of_memory
from sdxl_finetune.training.vae_encoder import start_copy


class TextEncoders:
    """Encodes captions with both text encoders of a model, in float32. On a GPU the host goes on meanwhile."""

    def __init__(self, sdxl: SDXL, tokenizer: Tokenizer, device: torch.device) -> None:
        self._sdxl, self._tokenizer, self._device = sdxl, tokenizer, device
        size1, size2 = sdxl.architecture.te1, sdxl.architecture.te2
        self.hidden_shape = tokenizer.positions, size1.width + size2.width
        self.pooled_size = size2.projection
        self.tokenizer_identity = tokenizer.identity()
        self.zeroed: Callable[[str], bool] | None = tokenizer.is_empty if sdxl.zero_cond else None

    def identity(self) -> str:
        """A hash of the exact weights of both encoders, in 32 hex digits. It does not depend on the file."""
        digest = hashlib.blake2b(digest_size=16)
        for part, encoder in (("te1", self._sdxl.te1), ("te2", self._sdxl.te2)):
            for name, parameter in sorted(encoder.named_parameters()):
                digest.update(f"{part}.{name} {list(parameter.shape)} ".encode())
                digest.update(self._sdxl.masters.value(parameter).float().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    @contextmanager
    def on_device(self) -> Iterator[EncodeText]:
        """Puts copies of the encoders in float32 on the device. They are freed when the context ends."""
        encoders = self._sdxl.float32_text_encoders(self._device)
        yield lambda captions: self._start(encoders, captions)

    @torch.no_grad()
    def _start(self, encoders: tuple[nn.Module, nn.Module], captions: Sequence[str]) -> Callable[[], Tensor]:
        try:
            tokens = self._tokenizer(captions).to(self._device)
            with torch.autocast(self._device.type, enabled=False):
                hidden, pooled = encode_tokens(*encoders, tokens, zero_cond=self._sdxl.zero_cond)
            return start_copy(torch.cat([hidden.flatten(1), pooled], dim=1).half())
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            remedy = "lower text_encoder_batch_size" if len(captions) > 1 else "use a GPU with more memory"
            raise OutOfMemory(f"out of memory encoding {len(captions)} captions: {remedy}") from error
