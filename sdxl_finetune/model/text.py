"""CLIP's text encoders as SDXL uses them: how they are built, and what they give for a caption.

SDXL uses the penultimate hidden state of both encoders, before the final norm (Podell et al., arXiv 2307.01952,
section 2.1). Text encoder 1 is therefore built without its last layer and final norm. Text encoder 2 also gives the
pooled output: the last hidden state of the first end-of-text token, normed and projected. The reference differs only in
the orientation of that projection.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdxl_finetune.batch import TextOutputs, Tokens


def build_te1(config: Mapping[str, Any]) -> CLIPTextModel:
    """Text encoder 1 up to its penultimate hidden state, which is then its last one."""
    shortened = {**config, "num_hidden_layers": config["num_hidden_layers"] - 1}
    encoder = CLIPTextModel(CLIPTextConfig(**shortened))
    text_model(encoder).final_layer_norm = nn.Identity()
    return encoder


def build_te2(config: Mapping[str, Any]) -> CLIPTextModelWithProjection:
    """Text encoder 2 with all layers, because the pooled output needs the last layer and the final norm."""
    return CLIPTextModelWithProjection(CLIPTextConfig(**config))


def text_model(encoder: nn.Module) -> Any:
    """The module with embeddings and layers: `encoder.text_model`, or CLIPTextModel itself since transformers 5.6."""
    return getattr(encoder, "text_model", encoder)


def refill_positions(encoder: nn.Module) -> None:
    """Fills the only buffer of an encoder that was built on the meta device. No checkpoint holds it."""
    embeddings = text_model(encoder).embeddings
    length = embeddings.position_embedding.weight.shape[0]
    embeddings.position_ids = torch.arange(length).expand(1, -1)


def encode_tokens(te1: nn.Module, te2: nn.Module, tokens: Tokens, *, zero_cond: bool = False) -> TextOutputs:
    """The penultimate hidden states of both encoders, side by side, and the pooled output of the first chunk.

    Weights of tokens multiply the hidden states, as in the reference's weighted captions, and not the pooled output.
    With `zero_cond` hidden states and pooled output of empty captions are zero. The code of SDXL's authors drops
    captions in this way (`ucg_rate` in generative-models). The encoders still run on empty captions, with gradients of
    zero. Each rank therefore uses all parameters, even if all its captions are empty.
    """
    size = tokens.ids1.shape[:2]
    output1 = te1(tokens.ids1.flatten(0, 1))
    output2 = te2(tokens.ids2.flatten(0, 1), output_hidden_states=True)
    states = torch.cat([output1.last_hidden_state, output2.hidden_states[-2]], dim=-1)
    hidden = join_chunks(states.unflatten(0, size))
    if tokens.weights is not None:
        hidden = hidden * join_chunks(tokens.weights).unsqueeze(-1).to(hidden.dtype)
    pooled = output2.text_embeds.unflatten(0, size)[:, 0]
    if zero_cond:
        kept = ~tokens.empty.unsqueeze(-1)
        hidden, pooled = torch.where(kept.unsqueeze(-1), hidden, 0), torch.where(kept, pooled, 0)
    return TextOutputs(hidden, pooled)


def join_chunks(chunks: Float[Tensor, "k chunks 77 *w"]) -> Float[Tensor, "k t *w"]:
    """Joins chunks of 77 positions to one sequence of t = 75 x chunks + 2 positions.

    The sequence is the first chunk's begin-of-text, the 75 inner positions of each chunk, and the last chunk's last
    position.
    """
    inner = chunks[:, :, 1:-1].flatten(1, 2)
    return torch.cat([chunks[:, 0, :1], inner, chunks[:, -1, -1:]], dim=1)
