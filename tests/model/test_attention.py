"""Gradient checkpointing changes no number and touches no frozen encoder; attention falls back in one line.

That checkpointed gradients are the reference's stands in test_sdxl.
"""

import logging

import pytest
import torch

from sdxl_finetune.model.attention import enable_gradient_checkpointing, use_attention
from sdxl_finetune.model.initial import TINY, build_initial
from sdxl_finetune.model.sdxl import SDXL
from sdxl_finetune.model.text import text_model


@pytest.fixture
def model() -> SDXL:
    return build_initial(TINY, seed=0)[0].train()


def tokens() -> torch.Tensor:
    ids = torch.full((1, 1, 77), 49407)
    ids[:, :, 0] = 49406
    return ids


def test_checkpointing_runs_layers_again(model: SDXL) -> None:
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
    prediction = model(torch.randn(1, 4, 8, 8), torch.tensor([5]), tokens(), tokens(), sizes, sizes, sizes)
    once = len(layers) + 2
    assert calls == once
    prediction.mean().backward()
    assert calls == 2 * once


def test_frozen_encoders_are_not_differentiated(model: SDXL) -> None:
    enable_gradient_checkpointing(model)
    model.te1.requires_grad_(False)
    model.te2.requires_grad_(False)
    hidden, pooled = model.encode_text(tokens(), tokens())
    assert not hidden.requires_grad
    assert not pooled.requires_grad


def test_attention_falls_back_with_one_line(model: SDXL, caplog: pytest.LogCaptureFixture) -> None:
    before = {name: type(processor) for name, processor in model.unet.attn_processors.items()}
    with caplog.at_level(logging.WARNING):
        assert use_attention(model, "xformers") == "sdpa"
    assert len(caplog.records) == 1
    assert "xformers" in caplog.text
    assert {name: type(processor) for name, processor in model.unet.attn_processors.items()} == before


def test_sdpa_is_the_default(model: SDXL) -> None:
    assert use_attention(model, "sdpa") == "sdpa"
    assert {type(processor).__name__ for processor in model.unet.attn_processors.values()} == {"AttnProcessor2_0"}
