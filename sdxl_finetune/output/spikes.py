"""Loss spikes: steps whose loss is far above the running median.

The loss of an image depends far more on its timestep than on anything else. Each loss is therefore compared with the
losses of the last images that had a timestep in the same range.
"""

from collections.abc import Sequence

import numpy as np

from sdxl_finetune.batch import TIMESTEPS

RANGES = 20
"""Number of equal ranges of timesteps with a median of their own."""
KEPT = 64
"""Images of each range whose median is taken."""
LEAST = 8
"""Images of a range that are needed for a median."""
QUIET = 20
"""Steps after a spike in which no other is reported. A loss that stays high would fill the console."""


class Spikes:
    """Finds spikes, given the losses of one step after the other. A resumed run begins with no losses."""

    def __init__(self, factor: float) -> None:
        """A step is a spike if the mean of its losses, each divided by its median, is above `factor`; 0: never."""
        self._factor = factor
        self._kept = np.full((RANGES, KEPT), np.nan)
        self._counts = np.zeros(RANGES, np.int64)
        self._quiet = 0

    def add(self, timesteps: Sequence[float], losses: Sequence[float]) -> dict[int, float]:
        """Adds the losses of a step's images. Losses that are not above 0 do not count.

        If the step is a spike, returns how often its images exceed their medians by `factor`, the highest first. The
        keys are the places of the images.
        """
        if not (self._factor and len(losses)):
            return {}
        values = np.asarray(losses, np.float64)
        ranges = np.minimum(np.asarray(timesteps) * RANGES // TIMESTEPS, RANGES - 1).astype(np.int64)
        self._quiet = max(0, self._quiet - 1)
        counts = values > 0
        known = counts & (self._counts[ranges] >= LEAST)
        found: dict[int, float] = {}
        if known.any() and not self._quiet:
            touched, place = np.unique(ranges[known], return_inverse=True)
            ratios = values[known] / np.nanmedian(self._kept[touched], axis=1)[place]
            if ratios.mean() > self._factor:
                places = np.flatnonzero(known)
                found = {int(places[at]): float(ratios[at]) for at in np.argsort(-ratios) if ratios[at] > self._factor}
                self._quiet = QUIET
        for at, value in zip(ranges[counts], values[counts], strict=True):
            self._kept[at, self._counts[at] % KEPT] = value
            self._counts[at] += 1
        return found
