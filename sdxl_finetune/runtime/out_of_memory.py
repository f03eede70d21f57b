"""The out-of-memory message: the batch that did not fit, and the options that need less memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sdxl_finetune.batch import Batch
from sdxl_finetune.config import Config

FULL_BF16 = {"full_bf16": True, "mixed_precision": "bf16"}
ADAMW_8BIT = {
    "optimizer_type": "AdamW8bit",
    "optimizer_args": {},
    "use_8bit_adam": False,
    "use_lion_optimizer": False,
}


class OutOfMemory(Exception):
    """The device or the machine has less memory than the batch needs. The message says what to change."""


def remedies(config: Config) -> list[tuple[str, dict[str, Any]]]:
    """Options that lower the memory of a step and are not set yet, those that cost the least first.

    Each is a text to show, and the changes to the config.
    """
    is_8bit = config.use_8bit_adam or config.optimizer_type.lower().endswith(("8bit", "adafactor"))
    is_fp16 = config.mixed_precision == "fp16"
    candidates: list[tuple[bool, str, dict[str, Any]]] = [
        (not config.gradient_checkpointing, "gradient_checkpointing = true", {"gradient_checkpointing": True}),
        (not config.full_bf16 and not is_fp16, 'full_bf16 = true with mixed_precision = "bf16"', FULL_BF16),
        (not is_8bit, 'optimizer_type = "AdamW8bit"', ADAMW_8BIT),
        (not config.is_fused and not is_fp16, "fused_backward_pass = true", {"fused_backward_pass": True}),
    ]
    return [(text, changes) for helps, text, changes in candidates if helps]


def is_out_of_memory(error: Exception) -> bool:
    """True for torch's class for devices, and for the messages of its CPU allocator and of oneDNN."""
    messages = ("allocate memory", "could not create a primitive")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in messages)


@contextmanager
def name_the_batch(batch: Batch, config: Config) -> Iterator[None]:
    """Turns an out-of-memory error in its context into OutOfMemory, which names the batch and the remedies."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        height, width = batch.target_size[0].tolist()
        texts = [text for text, _ in remedies(config)]
        texts += [f"a lower train_batch_size (now {config.train_batch_size})", "a lower resolution or max_bucket_reso"]
        raise OutOfMemory(
            f"out of memory in step {batch.position.step + 1}: {len(batch.weights)} images of bucket {width}x{height}, "
            f"{config.max_token_length} tokens. Options that need less memory: {'; '.join(texts)}"
        ) from error
