"""The out-of-memory message: which batch did not fit, and which options take less memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sdxl_finetune.batch import Batch
from sdxl_finetune.config import Config


class OutOfMemory(Exception):
    """The device, or the machine, has less memory than the batch needs; the message says what to change."""


def is_out_of_memory(error: Exception) -> bool:
    """torch has a class of its own for devices only; on a CPU its allocator and oneDNN say it in words."""
    words = ("allocate memory", "could not create a primitive")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


@contextmanager
def name_the_batch(batch: Batch, config: Config) -> Iterator[None]:
    """Turns running out of memory within it into OutOfMemory, which names the bucket and the batch."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        height, width = batch.target_size[0].tolist()
        remedies = [f"lower train_batch_size (now {config.train_batch_size})"]
        if not config.gradient_checkpointing:
            remedies.insert(0, "gradient_checkpointing = true")
        if not (config.use_8bit_adam or config.optimizer_type.lower().endswith("8bit")):
            remedies.append('optimizer_type = "AdamW8bit"')
        if not config.full_bf16:
            remedies.append('full_bf16 = true with mixed_precision = "bf16"')
        if not config.is_fused:
            remedies.append("fused_backward_pass = true")
        remedies.append("a lower resolution or max_bucket_reso")
        raise OutOfMemory(
            f"out of memory in step {batch.position.step + 1}: {len(batch.weights)} images of bucket {width}x{height}, "
            f"{config.max_token_length} tokens. What saves memory: {'; '.join(remedies)}"
        ) from error
