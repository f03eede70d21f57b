"""Weights of saved checkpoints whose average approximates an EMA of the training run, after the fact.

An EMA is the integral of the weights over the time of training, times a profile p(t). Only some times are saved.
Between two saved checkpoints the weights are taken to move on a straight line, and before the first one to stand still.
The integral is then an average of the checkpoints, exact for such a path. Karras et al. (arXiv 2312.02696, section 3)
combine saved EMAs instead, which is exact for any path: plain checkpoints cannot give what they do not hold.

Two profiles are known: the power function of Karras et al., whose length grows with the run, and the exponential
profile of a usual EMA with a constant decay.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Moments = Callable[[float], tuple[float, float]]
"""Integrals of p(s) and s p(s) over all times s up to t."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A profile as weights of checkpoints."""

    weights: tuple[float, ...]
    """Weight of each checkpoint. The sum is 1."""
    before: float
    """Share of the profile that lies before the first checkpoint, which stands for it."""


def power_profile(steps: Sequence[int], length: float) -> Profile:
    """The EMA with the power function t^gamma that ends at the last of the increasing `steps`.

    `length` is its relative standard deviation sigma_rel, above 0 and at most 0.28 (arXiv 2312.02696, equations 3, 4
    and 126).
    """
    gamma = power_exponent(length)
    end = float(steps[-1])

    def moments(t: float) -> tuple[float, float]:
        share = t / end
        return share ** (gamma + 1), (gamma + 1) / (gamma + 2) * end * share ** (gamma + 2)

    return _profile(steps, moments)


def exponential_profile(steps: Sequence[int], half_life: float) -> Profile:
    """The EMA with a half-life in optimizer steps that ends at the last of the increasing `steps`."""
    rate, end = math.log(2) / half_life, float(steps[-1])

    def moments(t: float) -> tuple[float, float]:
        share = math.exp(-rate * (end - t))
        return share, (t - 1 / rate) * share

    return _profile(steps, moments)


def power_exponent(length: float) -> float:
    """The exponent gamma of the power function with relative standard deviation `length`.

    It is the largest root of length^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), arXiv 2312.02696, equation 126.
    """
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def _profile(steps: Sequence[int], moments: Moments) -> Profile:
    """Integrates the profile times the piecewise linear functions that are 1 at one step and 0 at the others."""
    weights = [0.0] * len(steps)
    before = weights[0] = moments(float(steps[0]))[0]
    for number, (start, end) in enumerate(itertools.pairwise(steps)):
        (mass, moment), (mass_before, moment_before) = moments(float(end)), moments(float(start))
        mass, moment = mass - mass_before, moment - moment_before
        upper = (moment - start * mass) / (end - start)
        weights[number] += mass - upper
        weights[number + 1] += upper
    return Profile(weights=tuple(weights), before=before)
