"""The out-of-memory message names only what can still be changed."""

import pytest
import torch

from sdxl_finetune.batch import Batch, Position
from sdxl_finetune.config import Config
from sdxl_finetune.runtime.out_of_memory import OutOfMemory, name_the_batch


def batch(images: int) -> Batch:
    sizes = torch.full((images, 2), 64)
    latents = torch.zeros(images, 4, 8, 8)
    return Batch(
        position=Position(0, 2, 0, 1),
        latents=latents,
        images=None,
        encoding_noise=None,
        noise=latents,
        input_noise=None,
        timesteps=torch.zeros(images, dtype=torch.int64),
        original_size=sizes,
        crop_top_left=sizes,
        target_size=sizes,
        weights=torch.ones(images),
    )


def message(config: Config, images: int) -> str:
    with pytest.raises(OutOfMemory) as raised, name_the_batch(batch(images), config):
        raise MemoryError
    return str(raised.value)


def test_a_batch_of_one_is_not_made_smaller() -> None:
    said = message(Config(train_batch_size=4), 4)
    assert "out of memory in step 3: 4 images of bucket 64x64" in said and "train_batch_size = 1" in said
    said = message(Config(train_batch_size=4), 1)
    assert "1 image of bucket 64x64" in said and "batch" not in said.partition("Options")[2]


def test_what_is_set_is_not_named_again_and_a_cost_is_said() -> None:
    options = {"gradient_checkpointing": True, "fused_backward_pass": True, "optimizer_type": "Adafactor"}
    options |= {"full_bf16": True, "mixed_precision": "bf16"}
    said = message(Config(**options), 1)
    assert not any(name in said for name in options)
    assert "exact_masters = false (each step is rounded to bf16" in said


def test_the_batch_size_of_a_dataset_config_is_named_as_it_is_written_there() -> None:
    assert "batch_size = 1 in the dataset_config" in message(Config(dataset_config="data.toml"), 2)
