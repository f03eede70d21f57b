"""Says what users set in each user interface, so that an empty prompt means what it meant in training.

A model learns its unconditional prediction on empty captions. Their embeddings are either the encoded empty text or
zeros (`use_zero_cond`). No interface reads a marker for this choice. What the interfaces do was read in their sources:

- AUTOMATIC1111 and reForge: `get_learned_conditioning` in modules/sd_models_xl.py
- Forge: `get_learned_conditioning` in backend/diffusion_engine/sdxl.py
- ComfyUI: `CLIPTextEncode` and `ConditioningZeroOut` in nodes.py
- diffusers: `encode_prompt` of StableDiffusionXLPipeline
"""

from collections.abc import Iterator

WEB_UIS = "AUTOMATIC1111, Forge and reForge"


def describe_unconditional(zero_cond: bool | None) -> Iterator[str]:
    """Yields lines on empty prompts, for a model that says how it was trained; nothing for other models (None)."""
    if zero_cond is None:
        return
    if zero_cond:
        yield "an empty caption was trained as zeros (use_zero_cond)"
        yield f"{WEB_UIS} use zeros for an empty negative prompt: leave it empty, or write a negative prompt"
        yield "ComfyUI encodes an empty negative prompt: put the node ConditioningZeroOut behind it"
        yield "diffusers uses zeros if negative_prompt is left out: leave it out, or write a negative prompt"
    else:
        yield "an empty caption was trained as the encoded empty text"
        yield f"{WEB_UIS} use zeros for an empty negative prompt: write a negative prompt"
        yield "ComfyUI encodes an empty negative prompt: leave it empty, or write a negative prompt"
        yield 'diffusers uses zeros if negative_prompt is left out: give negative_prompt = ""'
