"""SDXL (Podell et al., arXiv 2307.01952) as one module: U-Net and both text encoders. Its forward is the prediction.

It is one module because FSDP2 and DeepSpeed accept only one. Every forward uses every parameter. Text encoders whose
outputs are cached therefore leave the module. Tensors that a checkpoint holds but SDXL never uses are kept in `unused`,
and are saved unchanged.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float, Int64, Num
from torch import Tensor, nn

from sdxl_finetune.batch import TextOutputs, Tokens
from sdxl_finetune.low_bits import MasterWeights
from sdxl_finetune.model.architecture import Architecture, te1_config, te2_config, unet_config
from sdxl_finetune.model.keymap import LOGIT_SCALE, KeyMap
from sdxl_finetune.model.text import build_te1, build_te2, encode_tokens, refill_positions, text_model


class SDXL(nn.Module):
    """U-Net and text encoders of an architecture, with the random weights of diffusers and transformers."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.unet = UNet2DConditionModel(**unet_config(architecture))
        self.te1 = build_te1(te1_config(architecture))
        self.te2 = build_te2(te2_config(architecture))
        self.unused: dict[str, Tensor] = {}
        """Tensors by name (see keymap.py): te1's last layer and final norm, and te2's logit_scale. They are on the CPU,
        in the file's precision, not part of the module's state, never trained and always saved."""
        self.markers: dict[str, Tensor] = {}
        """Marker tensors by their key in a single-file checkpoint, by which user interfaces recognise the objective
        (see declared.py). They are saved with every checkpoint."""
        self.zero_cond = False
        """True if the outputs for empty captions are zero (`use_zero_cond`), false if the empty text is encoded."""
        self.masters = MasterWeights()
        """Exact values of the parameters in bf16, frozen ones included. Files are saved from them."""

    def unused_names(self) -> list[str]:
        """The names of the tensors that `unused` holds for a complete checkpoint."""
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

    def detach_text_encoders(self) -> None:
        """Takes both text encoders out of the module, because the outputs for all captions are cached.

        `te1` and `te2` stay attributes, in host memory: checkpoints hold them, and previews use them. `to()`,
        data-parallel training and `parameters()` no longer reach them.
        """
        for name in ("te1", "te2"):
            encoder = self._modules.pop(name)
            assert encoder is not None
            self.__dict__[name] = encoder.eval().requires_grad_(False)

    def float32_text_encoders(self, device: torch.device) -> tuple[nn.Module, nn.Module]:
        """Copies of both text encoders on `device`, with their exact values in float32, in evaluation mode."""
        copies = []
        for encoder, build, config in (
            (self.te1, build_te1, te1_config(self.architecture)),
            (self.te2, build_te2, te2_config(self.architecture)),
        ):
            with torch.device("meta"):
                copy = build(config)
            values = {
                name: self.masters.value(parameter).float().to(device) for name, parameter in encoder.named_parameters()
            }
            copy.load_state_dict(values, assign=True)
            refill_positions(copy)
            copies.append(copy.to(device).eval().requires_grad_(False))
        return copies[0], copies[1]

    def encode_text(self, tokens: Tokens) -> TextOutputs:
        """Encodes captions (text.encode_tokens) on the device of the text encoders."""
        return encode_tokens(self.te1, self.te2, tokens.to(self.te1.device), zero_cond=self.zero_cond)

    def forward(
        self,
        noisy_latents: Float[Tensor, "k z h w"],
        timesteps: Num[Tensor, " k"],
        text: Tokens | TextOutputs,
        original_size: Int64[Tensor, "k 2"],
        crop_top_left: Int64[Tensor, "k 2"],
        target_size: Int64[Tensor, "k 2"],
    ) -> Float[Tensor, "k z h w"]:
        """The U-Net's prediction in float32 for captions, as tokens or encoded. Sizes are (height, width) in pixels.

        Timesteps and sizes stay integers or float32: the U-Net embeds them in float32 and casts the embedding. In
        bfloat16 1001 would become 1000.
        """
        hidden, pooled = self.encode_text(text) if isinstance(text, Tokens) else text
        # The six numbers of the size conditioning (arXiv 2307.01952, section 2.2), in the order of its embedding.
        sizes = torch.cat([original_size, crop_top_left, target_size], dim=1)
        return self.predict(noisy_latents, timesteps, hidden, pooled, sizes)

    def predict(
        self,
        noisy_latents: Float[Tensor, "k z h w"],
        timesteps: Num[Tensor, " k"],
        hidden: Float[Tensor, "k t c"],
        pooled: Float[Tensor, "k p"],
        sizes: Int64[Tensor, "k 6"],
    ) -> Float[Tensor, "k z h w"]:
        """The U-Net's prediction for encoded text. Sampling encodes a prompt once for many predictions."""
        dtype = self.unet.dtype
        # The VAE's latents are in channels_last. Then, on a CPU, torch 2.13's backward pass of a GroupNorm writes to a
        # null pointer if its weight has a gradient and its input has none, as in the first block that block_lr trains.
        return self.unet(
            noisy_latents.to(dtype, memory_format=torch.contiguous_format),
            timesteps,
            encoder_hidden_states=hidden.to(dtype),
            added_cond_kwargs={"text_embeds": pooled.to(dtype), "time_ids": sizes},
            return_dict=False,
        )[0].float()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Turns off dropout and gradient checkpointing within the context. Each module then gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
