"""The histogram of the timesteps that were drawn, which shows whether a run trains where its options ask for."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from sdxl_finetune.batch import TIMESTEPS

EDGES = np.linspace(0, TIMESTEPS, 51)
"""Edges of the bars: 50 ranges of 20 timesteps. TensorBoard draws about 30 bars."""
PERIOD = 100
"""Optimizer steps of one histogram. A single step has too few images for a shape."""


class TimestepCounts:
    """Counts timesteps by range."""

    def __init__(self) -> None:
        self._counts = np.zeros(len(EDGES) - 1, np.int64)

    def add(self, timesteps: Sequence[float]) -> None:
        self._counts += np.histogram(timesteps, EDGES)[0]

    def take(self) -> Int64[np.ndarray, " n"] | None:
        """Returns the counts since the last call, or None if there are none."""
        counts, self._counts = self._counts, np.zeros_like(self._counts)
        return counts if counts.any() else None
