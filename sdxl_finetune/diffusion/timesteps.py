"""The timestep of each image: a random function of seed, step, micro-batch and slot (see seeding.py)."""

import torch
from jaxtyping import Int64
from torch import Tensor

from sdxl_finetune.batch import TIMESTEPS, Position
from sdxl_finetune.config import NoiseOptions
from sdxl_finetune.seeding import position_rng


def draw_timesteps(options: NoiseOptions, seed: int, position: Position, images: int) -> Int64[Tensor, " k"]:
    """Draws a timestep for each of k images: uniform over `min_timestep` (0) <= t < `max_timestep` (1000).

    An empty range gives `max_timestep` for every image, as in the reference. Image i has the same timestep whatever k
    is. The reference draws from one generator that is seeded alike on every rank.
    """
    low = options.min_timestep or 0
    high = TIMESTEPS if options.max_timestep is None else options.max_timestep
    assert low < high or high < TIMESTEPS, f"no timestep in {low}..{high}"
    if low >= high:
        return torch.full((images,), high)
    rngs = (position_rng(seed, "timestep", position.step, position.micro_batch, slot) for slot in range(images))
    return torch.tensor([int(rng.integers(low, high)) for rng in rngs])
