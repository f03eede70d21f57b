"""What decides how much memory a step takes: gradient checkpointing and how attention is computed.

Both are the libraries' own facilities, set on the modules of an SDXL.
"""

import logging
from typing import Literal

from sdxl_finetune.model.sdxl import SDXL

logger = logging.getLogger(__name__)

Attention = Literal["sdpa", "xformers"]


def enable_gradient_checkpointing(model: SDXL) -> None:
    """Keeps only the inputs of blocks (U-Net) and layers (encoders) and computes the rest again for the gradient.

    The encoders do so only in training mode (`model.train()`), which changes nothing else: there is no dropout.
    """
    model.unet.enable_gradient_checkpointing()
    for encoder in (model.te1, model.te2):
        if hasattr(encoder, "activation_checkpointing_enable"):  # its name since transformers 5.22, the only one in 6
            encoder.activation_checkpointing_enable({"use_reentrant": False})
        else:
            encoder.gradient_checkpointing_enable({"use_reentrant": False})
        # Makes embeddings require gradients, for adapters: a frozen encoder would be differentiated for nothing.
        encoder.disable_input_require_grads()


def use_attention(model: SDXL, wanted: Attention) -> Attention:
    """Sets how the U-Net computes attention and says which way it is: PyTorch's scaled dot product attention
    ("sdpa", the modules' default) or xformers', where that is installed and works on this machine.
    """
    if wanted == "sdpa":
        return wanted
    try:
        # Tries the kernel on this machine before it changes anything.
        model.unet.enable_xformers_memory_efficient_attention()
    except ModuleNotFoundError:
        reason = "xformers is not installed"
    except (ImportError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
    else:
        return wanted
    logger.warning("attention is PyTorch's (sdpa) instead of xformers': %s", reason)
    return "sdpa"
