"""Options that choose which noise each image is trained with."""

from collections.abc import Mapping

from pydantic import Field

from sdxl_finetune.config.fields import Options

WITH_LATENTS = {"flow_use_ot": 0, "immiscible_noise": 0, "knn_noise_k": 1, "contrastive_flow_matching": 0}
"""Options for which the data loader reads the latents of all images of a micro-batch, with their largest value that
means "off". They turn on `cache_latents`."""


class PairingOptions(Options):
    """Pairing of noise and images"""

    flow_use_ot: bool = False
    """Pair noise and images by optimal transport. Turns on `cache_latents`. Of forks of sd-scripts."""
    immiscible_noise: int | None = Field(None, ge=0)
    """Noises to draw for a micro-batch and to pair by distance. Turns on `cache_latents`. Of forks of sd-scripts."""
    knn_noise_k: int = Field(1, ge=0)
    """Noises to draw for each image, which takes the nearest. Turns on `cache_latents`. Of forks of sd-scripts."""

    @property
    def pairings(self) -> list[str]:
        """Names of the options that pair noise and images and are on. A run has one of them at most."""
        return [name for name in with_latents(vars(self)) if name in PairingOptions.model_fields]


def with_latents(values: Mapping[str, object]) -> list[str]:
    """Names of the options WITH_LATENTS that are on, by the values of all options."""
    return [name for name, off in WITH_LATENTS.items() if isinstance(value := values.get(name), int) and value > off]
