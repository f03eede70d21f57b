"""SDXL (Podell et al., arXiv 2307.01952) as one module: U-Net and both text encoders, whose forward is the prediction.

One module, because FSDP2 and DeepSpeed take only one, and because saving can then read its children. Everything in
it is used by every forward; tensors that a checkpoint holds but SDXL never uses are kept beside it (`unused`) and
written back as they came.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float, Int64
from torch import Tensor, nn

from sdxl_finetune.low_bits import MasterWeights
from sdxl_finetune.model.architecture import Architecture, te1_config, te2_config, unet_config
from sdxl_finetune.model.keymap import LOGIT_SCALE, KeyMap
from sdxl_finetune.model.text import (
    build_te1,
    build_te2,
    hidden1,
    hidden2_and_pooled,
    join_chunks,
    text_model,
)


class SDXL(nn.Module):
    """U-Net and text encoders of `architecture`, with the weights that their libraries initialise them with."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.unet = UNet2DConditionModel(**unet_config(architecture))
        self.te1 = build_te1(te1_config(architecture))
        self.te2 = build_te2(te2_config(architecture))
        self.unused: dict[str, Tensor] = {}
        """By name (see keymap): te1's last layer and final norm, te2's logit_scale. On the CPU, as the file had
        them; no part of the module's state, never trained, always saved."""
        self.masters = MasterWeights()
        """Exact values of the parameters in bf16, frozen ones included. Files are saved from them."""

    def unused_names(self) -> list[str]:
        """The names of the tensors that `unused` holds for a whole checkpoint."""
        last = f"te1.text_model.encoder.layers.{self.architecture.te1.layers - 1}"
        layer = [f"{last}.{name}" for name, _ in text_model(self.te2).encoder.layers[0].named_parameters()]
        norm = [f"te1.text_model.final_layer_norm.{kind}" for kind in ("weight", "bias")]
        return [*layer, *norm, LOGIT_SCALE]

    def parameters_by_part(self) -> dict[str, dict[str, nn.Parameter]]:
        """The parameters of unet, text_encoder1 and text_encoder2 by name.

        U-Net parameters have their names in a single-file checkpoint, in which `block_lr` counts blocks.
        """
        keymap = KeyMap(self.architecture.layout)
        return {
            "unet": {keymap.place(f"unet.{name}").key: parameter for name, parameter in self.unet.named_parameters()},
            "text_encoder1": dict(self.te1.named_parameters()),
            "text_encoder2": dict(self.te2.named_parameters()),
        }

    def encode_text(
        self,
        tokens1: Int64[Tensor, "k chunks 77"],
        tokens2: Int64[Tensor, "k chunks 77"],
        token_weights: Float[Tensor, "k chunks 77"] | None = None,
    ) -> tuple[Float[Tensor, "k t c"], Float[Tensor, "k p"]]:
        """Both encoders' hidden states side by side (t = 75 x chunks + 2) and the pooled output of the first chunk.

        `token_weights` multiply the hidden states, as the reference's weighted captions do; the pooled output is
        not weighted.
        """
        size = tokens1.shape[:2]
        states1 = hidden1(self.te1, tokens1.flatten(0, 1))
        states2, pooled = hidden2_and_pooled(self.te2, tokens2.flatten(0, 1))
        hidden = join_chunks(torch.cat([states1, states2], dim=-1).unflatten(0, size))
        if token_weights is not None:
            hidden = hidden * join_chunks(token_weights).unsqueeze(-1).to(hidden.dtype)
        return hidden, pooled.unflatten(0, size)[:, 0]

    def forward(
        self,
        noisy_latents: Float[Tensor, "k 4 h w"],
        timesteps: Int64[Tensor, " k"],
        tokens1: Int64[Tensor, "k chunks 77"],
        tokens2: Int64[Tensor, "k chunks 77"],
        original_size: Int64[Tensor, "k 2"],
        crop_top_left: Int64[Tensor, "k 2"],
        target_size: Int64[Tensor, "k 2"],
        token_weights: Float[Tensor, "k chunks 77"] | None = None,
    ) -> Float[Tensor, "k 4 h w"]:
        """The U-Net's prediction, in float32. Sizes are (height, width) in pixels.

        Timesteps and sizes stay integers here: the U-Net embeds them in float32 and casts the embedding (in
        bfloat16 1001 would be 1000).
        """
        hidden, pooled = self.encode_text(tokens1, tokens2, token_weights)
        return self.predict(
            noisy_latents, timesteps, hidden, pooled, size_ids(original_size, crop_top_left, target_size)
        )

    def predict(
        self,
        noisy_latents: Float[Tensor, "k 4 h w"],
        timesteps: Int64[Tensor, " k"],
        hidden: Float[Tensor, "k t c"],
        pooled: Float[Tensor, "k p"],
        sizes: Int64[Tensor, "k 6"],
    ) -> Float[Tensor, "k 4 h w"]:
        """The same for text that is encoded already: sampling encodes a prompt once for many steps."""
        dtype = self.unet.dtype
        return self.unet(
            noisy_latents.to(dtype),
            timesteps,
            encoder_hidden_states=hidden.to(dtype),
            added_cond_kwargs={"text_embeds": pooled.to(dtype), "time_ids": sizes},
            return_dict=False,
        )[0].float()


def size_ids(
    original_size: Int64[Tensor, "k 2"], crop_top_left: Int64[Tensor, "k 2"], target_size: Int64[Tensor, "k 2"]
) -> Int64[Tensor, "k 6"]:
    """The six numbers of SDXL's size conditioning (section 2.2 of the paper), in the order of its label embedding."""
    return torch.cat([original_size, crop_top_left, target_size], dim=1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it no dropout and no checkpointing; each module's own mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
