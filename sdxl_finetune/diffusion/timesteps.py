"""The timestep of each image: a random function of seed, step, micro-batch and slot (see seeding.py).

A timestep is drawn in four stages, for every objective:

    p   probability in (0, 1], random for each image, or stratified over the images of an optimizer step
    u   quantile of the distribution at p, in (0, 1]
    t   u shifted towards noise or signal
    s   timestep: low + (high - low) t between `min_timestep` and `max_timestep`

The order of shift and range is that of the reference's trainer for SD3. Timesteps of a flow are s itself. Those of
noise and velocity are whole numbers: s rounded down.
"""

from functools import cache

import numpy as np
import torch
from jaxtyping import Float64, Num
from scipy.special import betaincinv, expit, ndtri
from torch import Tensor
from typing_extensions import assert_never

from sdxl_finetune.batch import TIMESTEPS, Position
from sdxl_finetune.config import Config
from sdxl_finetune.config.flow_options import shift_ratio
from sdxl_finetune.config.training_options import ObjectiveKind
from sdxl_finetune.diffusion.objective import build_objective
from sdxl_finetune.seeding import position_rng

SMALLEST = 1e-6
"""Smallest share t of noise. The signal-to-noise ratio of a flow is infinite at 0."""

Numbers = Float64[np.ndarray, " k"]


def draw_timesteps(config: Config, seed: int, position: Position, images: int, pixels: int) -> Num[Tensor, " k"]:
    """Draws a timestep for each of the k images of a micro-batch over all ranks. `pixels` is the size of each image.

    Timesteps are whole numbers (int64), `min_timestep` (0) <= s < `max_timestep` (1000). Those of a flow are float32,
    above `min_timestep`, up to `max_timestep` itself. An empty range gives `max_timestep` for every image, as in the
    reference. Image i has the same timestep whatever k is, unless `stratified_timesteps` is set. The reference draws
    from one generator that is seeded alike on every rank.
    """
    low, high = config.timestep_range
    assert low < high or high < TIMESTEPS, f"no timestep in {low}..{high}"
    if low >= high:
        return torch.full((images,), high)
    place = position.step, position.micro_batch
    rngs = [position_rng(seed, "timestep", *place, slot) for slot in range(images)]
    is_flow, ratio = config.objective == "flow", shift_ratio(config, pixels)
    is_uniform = config.flow_timestep_distribution in (None, "uniform") and ratio == 1
    if is_uniform and not is_flow and not config.stratified_timesteps:
        return torch.tensor([int(rng.integers(low, high)) for rng in rngs])
    drawn = np.array([rng.random() for rng in rngs])
    if config.stratified_timesteps:
        drawn = stratified(drawn, seed, position)
    t = shifted(quantile(config, 1 - drawn), ratio).clip(SMALLEST, 1)
    timesteps = low + (high - low) * t
    if is_flow:
        return torch.from_numpy(timesteps).float()
    return torch.from_numpy(timesteps).long().clamp(max=high - 1)


def stratified(drawn: Numbers, seed: int, position: Position) -> Numbers:
    """Spreads numbers in [0, 1) of the k images of a micro-batch evenly, so that each is uniform over [0, 1) as before.

    Each of the k equal strata gets one image, in random order. If the optimizer step has several micro-batches, each
    stratum is divided into as many cells, and each micro-batch has its own cell of the stratum. With k images in each
    of m micro-batches, each of the k m equal parts of [0, 1) therefore has one image of the step.

    Source: stratified sampling, Cochran, Sampling Techniques, 1977, chapter 5. Kingma et al., arXiv 2107.00630,
    appendix I.1, spread the timesteps of a batch for the same reason, with one random number for all images.
    """
    images, micro_batches = len(drawn), position.micro_batches_in_step
    strata = position_rng(seed, "timestep strata", position.step, position.micro_batch).permutation(images)
    cells = np.tile(np.arange(micro_batches), (images, 1))
    cells = position_rng(seed, "timestep cells", position.step).permuted(cells, axis=1)[strata, position.micro_batch]
    return (strata + (cells + drawn) / micro_batches) / images


def quantile(config: Config, probabilities: Numbers) -> Numbers:
    """The number in [0, 1] below which lies each share of `flow_timestep_distribution`. 0 is data, and 1 is noise.

        uniform        p
        logit_normal   sigmoid(mean + std N^-1(p)), where N is the standard normal distribution function
        cosmap         1 - 1 / (tan(pi p / 2) + 1), the SNR of the cosine schedule on the path of a flow
        beta           inverse of the regularised incomplete beta function
        laplace        see `laplace_edges`

    Sources: Esser et al., arXiv 2403.03206, section 3.1, and for beta Black et al., arXiv 2410.24164, appendix.
    """
    t: Numbers
    match config.flow_timestep_distribution:
        case None | "uniform":
            t = probabilities
        case "logit_normal":
            t = expit(config.flow_logit_mean + config.flow_logit_std * ndtri(probabilities))
        case "cosmap":
            t = 1 - 1 / (np.tan(np.pi / 2 * probabilities) + 1)
        case "beta":
            t = betaincinv(config.flow_beta_alpha, config.flow_beta_beta, probabilities)
        case "laplace":
            edges = laplace_edges(config)
            t = np.interp(probabilities, edges, np.linspace(0, 1, len(edges)))
        case _:
            assert_never(config.flow_timestep_distribution)
    return t


def laplace_edges(config: Config) -> Float64[np.ndarray, " n"]:
    """Share of the draws below each whole timestep from `min_timestep` to `max_timestep`, from 0 to 1.

    The weight of a timestep is exp(-|log SNR - mu| / b), as in the forks that have `laplace_timestep_sampling_mu` and
    `_b`. Hang et al., arXiv 2407.03297, draw log SNR itself from this distribution. The weight of a timestep would then
    also have the factor |d log SNR / d timestep|. A flow has one weight for the timesteps between two whole numbers.
    """
    mu, b = config.laplace_timestep_sampling_mu, config.laplace_timestep_sampling_b
    assert mu is not None and b is not None, "laplace needs mu and b"
    return _laplace_edges(config.objective, config.zero_terminal_snr, *config.timestep_range, mu, b)


@cache
def _laplace_edges(
    kind: ObjectiveKind, zero_terminal_snr: bool, low: int, high: int, mu: float, b: float
) -> Float64[np.ndarray, " n"]:
    timesteps = torch.arange(low, high)
    snr = build_objective(kind, zero_terminal_snr=zero_terminal_snr).schedule.snr(
        timesteps + 0.5 if kind == "flow" else timesteps
    )
    # A weight of exactly 0 would leave nothing to draw if only the last timestep of zero terminal SNR were trained.
    distance = (snr.double().clamp(min=1e-20).log() - mu).abs() / b
    shares = torch.softmax(-distance, 0).cumsum(0).numpy()
    return np.concatenate([[0.0], shares / shares[-1]])


def shifted(t: Numbers, ratio: float) -> Numbers:
    """r t / (1 + (r - 1) t): the time at which an image of r^2 times the pixels is as noisy as a smaller one at t.

    Source: Esser et al., arXiv 2403.03206, section 5.3.2.
    """
    return ratio * t / (1 + (ratio - 1) * t)
