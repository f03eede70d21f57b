"""Gradient checkpointing and the attention kernel, which decide most about the memory of a step.

Both are functions of diffusers and transformers, switched on in the modules of an SDXL.
"""

import logging
from typing import Literal

from sdxl_finetune.model.sdxl import SDXL

logger = logging.getLogger(__name__)

Attention = Literal["sdpa", "xformers"]


def enable_gradient_checkpointing(model: SDXL) -> None:
    """Keeps only the inputs of U-Net blocks and encoder layers, and computes other activations again in backward.

    The text encoders do this only in training mode (`model.train()`). That mode changes nothing else, because there is
    no dropout.
    """
    model.unet.enable_gradient_checkpointing()
    for encoder in (model.te1, model.te2):
        if hasattr(encoder, "activation_checkpointing_enable"):  # its name since transformers 5.22, the only one in 6
            encoder.activation_checkpointing_enable({"use_reentrant": False})
        else:
            encoder.gradient_checkpointing_enable({"use_reentrant": False})
        # transformers made the embeddings require gradients, for adapters. A frozen encoder would then be
        # differentiated for nothing.
        encoder.disable_input_require_grads()


def use_attention(model: SDXL, wanted: Attention) -> Attention:
    """Sets the U-Net's attention kernel and returns the kernel that is used.

    "sdpa" is PyTorch's scaled_dot_product_attention, the default of the modules. "xformers" is used only if it is
    installed and works on this machine; otherwise a warning says why not.
    """
    if wanted == "sdpa":
        return wanted
    try:
        # diffusers tries the kernel on this machine before it changes the modules.
        model.unet.enable_xformers_memory_efficient_attention()
    except ModuleNotFoundError:
        reason = "xformers is not installed"
    except (ImportError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
    else:
        return wanted
    logger.warning("xformers cannot be used (%s): attention is PyTorch's (sdpa)", reason)
    return "sdpa"
