"""CLIP's text encoders as SDXL uses them: what is built, what is read off them, how chunks of a caption join.

Both encoders give their penultimate hidden state, before any final norm (SDXL, arXiv 2307.01952, section 2.1), so the
first is built without its last layer and norm. The second also gives the pooled output: the state of the first
end-of-text token, normed and projected. The reference computes the same, save for the projection's orientation.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection


def build_te1(config: Mapping[str, Any]) -> CLIPTextModel:
    """The first encoder up to its penultimate hidden state, which is then its last."""
    built = {**config, "num_hidden_layers": config["num_hidden_layers"] - 1}
    encoder = CLIPTextModel(CLIPTextConfig(**built))
    text_model(encoder).final_layer_norm = nn.Identity()
    return encoder


def build_te2(config: Mapping[str, Any]) -> CLIPTextModelWithProjection:
    """The second encoder, whole: its last layer and norm reach the pooled output."""
    return CLIPTextModelWithProjection(CLIPTextConfig(**config))


def text_model(encoder: nn.Module) -> Any:
    """The module that holds embeddings and layers: transformers has it inside, or (CLIPTextModel from 5.6 on) is it."""
    return getattr(encoder, "text_model", encoder)


def refill_positions(encoder: nn.Module) -> None:
    """Makes the one buffer of an encoder that was built on the meta device; no file holds it."""
    embeddings = text_model(encoder).embeddings
    length = embeddings.position_embedding.weight.shape[0]
    embeddings.position_ids = torch.arange(length).expand(1, -1)


def hidden1(encoder: nn.Module, tokens: Int64[Tensor, "n 77"]) -> Float[Tensor, "n 77 w"]:
    """The first encoder's penultimate hidden state."""
    return encoder(tokens).last_hidden_state


def hidden2_and_pooled(
    encoder: nn.Module, tokens: Int64[Tensor, "n 77"]
) -> tuple[Float[Tensor, "n 77 w"], Float[Tensor, "n p"]]:
    """The second encoder's penultimate hidden state and its pooled, projected output."""
    output = encoder(tokens, output_hidden_states=True)
    return output.hidden_states[-2], output.text_embeds


def join_chunks(chunks: Float[Tensor, "k chunks 77 *w"]) -> Float[Tensor, "k t *w"]:
    """One sequence of t = 75 x chunks + 2 positions: the first chunk's begin-of-text, the 75 inner positions of each
    chunk, the last chunk's last position.
    """
    inner = chunks[:, :, 1:-1].flatten(1, 2)
    return torch.cat([chunks[:, 0, :1], inner, chunks[:, -1, -1:]], dim=1)
