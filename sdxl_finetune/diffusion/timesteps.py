"""The timestep of each image: a random function of seed, step, micro-batch and slot (see seeding.py)."""

import torch
from jaxtyping import Num
from torch import Tensor

from sdxl_finetune.batch import TIMESTEPS, Position
from sdxl_finetune.config import NoiseOptions
from sdxl_finetune.config.training_options import ObjectiveKind
from sdxl_finetune.seeding import position_rng


def draw_timesteps(
    options: NoiseOptions, objective: ObjectiveKind, seed: int, position: Position, images: int
) -> Num[Tensor, " k"]:
    """Draws a timestep for each of k images: uniform over `min_timestep` (0) <= t < `max_timestep` (1000).

    Timesteps are whole numbers (int64), but those of a flow are float32 and above `min_timestep`, up to `max_timestep`
    itself. An empty range gives `max_timestep` for every image, as in the reference. Image i has the same timestep
    whatever k is. The reference draws from one generator that is seeded alike on every rank.
    """
    low = options.min_timestep or 0
    high = TIMESTEPS if options.max_timestep is None else options.max_timestep
    assert low < high or high < TIMESTEPS, f"no timestep in {low}..{high}"
    if low >= high:
        return torch.full((images,), high)
    rngs = (position_rng(seed, "timestep", position.step, position.micro_batch, slot) for slot in range(images))
    if objective == "flow":
        return torch.tensor([high - (high - low) * rng.random() for rng in rngs], dtype=torch.float32)
    return torch.tensor([int(rng.integers(low, high)) for rng in rngs])
