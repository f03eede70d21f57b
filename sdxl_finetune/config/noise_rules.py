"""Checks of the options of noise: what goes together, and what needs cached latents."""

from collections.abc import Iterator

from sdxl_finetune.config.options import Config

Findings = Iterator[tuple[str, str]]
"""Pairs as in rules.py: names of options, and what is wrong with the first of them."""


def noise_problems(config: Config) -> Findings:
    """Yields what cannot be used with options of noise, and with the cached latents that some of them need."""
    if config.adaptive_noise_scale and not config.cache_latents:
        message = "needs cache_latents: the noise of a step is drawn before its images are encoded"
        yield "adaptive_noise_scale cache_latents", f"{message}. Set cache_latents, or remove adaptive_noise_scale"
    for option in ("color_aug", "random_crop"):
        if getattr(config, option) and config.cache_latents:
            yield f"{option} {config.cached_for}", f"cannot be used with {config.cached_for}: keep one of them"
    first, *others = config.pairings or [""]
    for other in others:
        message = f"cannot be used with {other}, because each image has one noise: keep one of them"
        yield f"{first} {other}", message
    if config.contrastive_flow_matching and config.objective == "noise":
        message = "needs v_parameterization or flow_model. The noise of another image says nothing about that image, so"
        message += " the contrast would only enlarge a noise prediction. Set one of them, or remove this option"
        yield "contrastive_flow_matching v_parameterization flow_model", message


def noise_remarks(config: Config) -> Findings:
    """Yields what is allowed but may surprise the user."""
    if config.with_latents and not config.cache_latents_to_disk:
        option = config.with_latents[0]
        message = "keeps the latents of all images in memory (cache_latents), because it needs them before each step"
        yield option, f"{message}: cache_latents_to_disk = true keeps them for later runs"
    for option in ("noise_offset", "multires_noise_iterations"):
        if config.flow_model and getattr(config, option):
            message = "makes the flow start from this noise, but previews and interfaces start from plain noise"
            yield option, f"{message}: a flow learns the mean of an image without {option}"
