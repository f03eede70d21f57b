"""Gradient checkpointing changes no result and does not differentiate frozen encoders; attention falls back to sdpa.

test_sdxl.py compares checkpointed gradients with the reference.
"""

import logging

import pytest
import torch

from sdxl_finetune.batch import Tokens
from sdxl_finetune.model.attention import enable_gradient_checkpointing, use_attention
from sdxl_finetune.model.random_model import TINY, build_random_model
from sdxl_finetune.model.sdxl import SDXL
from sdxl_finetune.model.text import text_model


@pytest.fixture
def model() -> SDXL:
    return build_random_model(TINY, seed=0)[0].train()


def tokens() -> torch.Tensor:
    ids = torch.full((1, 1, 77), 49407)
    ids[:, :, 0] = 49406
    return ids


def test_gradient_checkpointing_computes_layers_twice(model: SDXL) -> None:
    enable_gradient_checkpointing(model)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    layers = [*text_model(model.te1).encoder.layers, *text_model(model.te2).encoder.layers]
    for layer in layers:
        layer.self_attn.register_forward_pre_hook(count)
    for block in (model.unet.up_blocks[0].resnets[0], model.unet.down_blocks[0].resnets[0]):
        block.conv1.register_forward_pre_hook(count)
    sizes = torch.zeros(1, 2, dtype=torch.int64)
    prediction = model(torch.randn(1, 4, 8, 8), torch.tensor([5]), Tokens(tokens(), tokens()), sizes, sizes, sizes)
    once = len(layers) + 2
    assert calls == once
    prediction.mean().backward()
    assert calls == 2 * once


def test_gradient_checkpointing_does_not_differentiate_frozen_encoders(model: SDXL) -> None:
    enable_gradient_checkpointing(model)
    model.te1.requires_grad_(False)
    model.te2.requires_grad_(False)
    hidden, pooled = model.encode_text(Tokens(tokens(), tokens()))
    assert not hidden.requires_grad
    assert not pooled.requires_grad


def test_attention_falls_back_to_sdpa_with_a_one_line_warning(model: SDXL, caplog: pytest.LogCaptureFixture) -> None:
    before = {name: type(processor) for name, processor in model.unet.attn_processors.items()}
    with caplog.at_level(logging.WARNING):
        assert use_attention(model, "xformers") == "sdpa"
    assert len(caplog.records) == 1
    assert "xformers" in caplog.text
    assert {name: type(processor) for name, processor in model.unet.attn_processors.items()} == before


def test_sdpa_is_the_default_attention(model: SDXL) -> None:
    assert use_attention(model, "sdpa") == "sdpa"
    assert {type(processor).__name__ for processor in model.unet.attn_processors.values()} == {"AttnProcessor2_0"}
