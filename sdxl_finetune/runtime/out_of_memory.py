"""The out-of-memory message: the batch that did not fit, and the options that need less memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from sdxl_finetune.batch import Batch
from sdxl_finetune.config import Config
from sdxl_finetune.errors import counted

OPTIMIZER = {"optimizer_args": {}, "use_8bit_adam": False, "use_lion_optimizer": False}
"""Options that would overrule or contradict a new `optimizer_type`."""
UNET_ALONE = {"train_text_encoder": False}


class OutOfMemory(Exception):
    """The device or the machine has less memory than the batch needs. The message says what to change."""


@dataclass(frozen=True)
class Remedy:
    """Options that lower the memory of a step."""

    text: str
    """The options as the user writes them."""
    changes: dict[str, Any] = field(hash=False)
    """Options and their new values, for the config."""
    images: int | None = None
    """Images of a batch on one process; None: as before."""
    cost: str = ""
    """Disadvantage of the remedy, if it is more than a little time."""


def remedies(config: Config, images: int) -> list[Remedy]:
    """The remedies for batches of so many images that are not set yet, those that cost the least first."""
    is_8bit = config.use_8bit_adam or config.optimizer_type.lower().endswith(("8bit", "adafactor"))
    is_fp16 = config.mixed_precision == "fp16"
    bf16 = {"full_bf16": True, "mixed_precision": "bf16"}
    adam = OPTIMIZER | {"optimizer_type": "AdamW8bit"}
    adafactor = OPTIMIZER | {
        "optimizer_type": "Adafactor",
        "optimizer_args": {"relative_step": False, "scale_parameter": False, "warmup_init": False},
    }
    draws = config.shuffle_caption or config.caption_tag_dropout_rate or config.enable_wildcard
    variants = config.text_encoder_outputs_variants if config.text_encoder_outputs_variants > 1 or not draws else 8
    cached: dict[str, Any] = {"cache_text_encoder_outputs": True, "text_encoder_outputs_variants": variants}
    cached_text = "cache_text_encoder_outputs = true"
    if draws:
        cached_text += f" with text_encoder_outputs_variants = {variants}"
    masters_off = "each step is rounded to bf16, so small updates are lost (docs/precision.md)"
    another = "another optimizer, with fewer states: compare the previews"
    batch = "batch_size = 1 in the dataset_config" if config.dataset_config else "train_batch_size = 1"
    candidates = [
        (not config.gradient_checkpointing, Remedy("gradient_checkpointing = true", {"gradient_checkpointing": True})),
        (not config.full_bf16 and not is_fp16, Remedy('full_bf16 = true with mixed_precision = "bf16"', bf16)),
        (not is_8bit, Remedy('optimizer_type = "AdamW8bit"', adam)),
        (not config.is_fused and not is_fp16, Remedy("fused_backward_pass = true", {"fused_backward_pass": True})),
        (images > 1, Remedy(batch, {}, images=1)),
        (config.train_text_encoder, Remedy("train_text_encoder = false", UNET_ALONE, cost="only the U-Net is trained")),
        (not config.cache_text_encoder_outputs, Remedy(cached_text, cached)),
        (
            config.optimizer_type.lower() != "adafactor",
            Remedy('optimizer_type = "Adafactor" with relative_step=False', adafactor, cost=another),
        ),
        (config.exact_masters, Remedy("exact_masters = false", {"exact_masters": False}, cost=masters_off)),
    ]
    return [remedy for helps, remedy in candidates if helps]


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
        images = len(batch.weights)
        texts = [f"{each.text} ({each.cost})" if each.cost else each.text for each in remedies(config, images)]
        texts.append("a lower resolution or max_bucket_reso")
        raise OutOfMemory(
            f"out of memory in step {batch.position.step + 1}: {counted(images, 'image')} of bucket"
            f" {width}x{height}, {config.max_token_length} tokens. Options that need less memory: {'; '.join(texts)}."
            " sdxl-check estimates how much each of them leaves"
        ) from error
