"""`sdxl-model latent-stats`: measures the mean and the standard deviation of a dataset's latents per channel."""

import argparse
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from accelerate import Accelerator
from jaxtyping import Float64, Int64

from sdxl_finetune.commands.data import load_data_config
from sdxl_finetune.config import Config, VaeOptions, with_local_models
from sdxl_finetune.data.index import Index
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.latents.preparing import prepare
from sdxl_finetune.latents.store import LatentStore
from sdxl_finetune.model.load import load_vae
from sdxl_finetune.output.console import console
from sdxl_finetune.runtime.processes import build_accelerator
from sdxl_finetune.runtime.signals import Interrupt, StopRequest, stop_on_signals
from sdxl_finetune.seeding import position_rng
from sdxl_finetune.training.setup import shared_index
from sdxl_finetune.training.vae_encoder import VaeEncoder

AT_ONCE = 16
"""Latents of one bucket that are read at once."""


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Mean and standard deviation of each of c channels over images that count alike, with their standard errors."""

    mean: Float64[np.ndarray, " c"]
    mean_error: Float64[np.ndarray, " c"]
    deviation: Float64[np.ndarray, " c"]
    deviation_error: Float64[np.ndarray, " c"]

    @property
    def together(self) -> tuple[float, float]:
        """Mean and standard deviation of the values of all channels."""
        mean = self.mean.mean()
        return float(mean), math.sqrt((self.deviation**2 + self.mean**2).mean() - mean**2)


def moments_of(first: Float64[np.ndarray, "n c"], second: Float64[np.ndarray, "n c"]) -> Moments:
    """The moments of latents of which each of n images has these means and means of squares.

    The values of an image depend on one another, so that images are the sample. The error of the deviation follows by
    the delta method: an image changes the variance q - m^2 by its q - 2 m x its mean.
    """
    count, mean = len(first), first.mean(0)
    deviation = np.sqrt(second.mean(0) - mean**2)
    errors = [values.std(0, ddof=1) / math.sqrt(count) for values in (first, second - 2 * mean * first)]
    return Moments(mean=mean, mean_error=errors[0], deviation=deviation, deviation_error=errors[1] / (2 * deviation))


def latent_stats(arguments: argparse.Namespace, options: Sequence[str]) -> int:
    """Measures the latents and prints them. Returns the exit status. Raises UserError."""
    if arguments.images < 2:
        raise UserError(Problem("must be at least 2", key="images", value=arguments.images))
    config = load_data_config(["--config", arguments.config, *options], "sdxl-model latent-stats")
    if config is None:
        return 0
    try:
        with stop_on_signals() as stop, console(config, int(os.environ.get("RANK", 0))):
            _run(config, arguments.images, stop)
    except Interrupt as interrupt:
        return interrupt.exit_status
    return 0


def _run(config: Config, images: int, stop: StopRequest) -> None:
    accelerator = build_accelerator(config)
    config = with_local_models(config)
    index = shared_index(config, accelerator)
    rows = np.flatnonzero(index.used)
    if len(rows) < 2:
        raise UserError(Problem("holds fewer than two images, which have no spread to measure", key="train_data_dir"))
    chosen = position_rng(config.seed or 0, "latent stats").permutation(rows)[:images]
    others = np.ones(len(index), bool)
    others[chosen] = False
    # The scale does not change the latents. Any scale lets a VAE load of which nothing says it.
    scale = VaeOptions(vae_custom_scale=(1.0,), vae_reflection_padding=config.vae_reflection_padding)
    vae = load_vae(config.model_path, config.vae_path, scale)
    encoder, caching = VaeEncoder(vae, accelerator.device), config.model_copy(update={"cache_latents": True})
    index, store = prepare(index.without(np.flatnonzero(others).tolist()), encoder, caching, accelerator, stop)
    _measure(index, store, accelerator)
    accelerator.end_training()


def _measure(index: Index, store: LatentStore, accelerator: Accelerator) -> None:
    if not accelerator.is_main_process:
        return
    sums = [(latents.mean((2, 3)), np.square(latents).mean((2, 3))) for latents in _read(index, store)]
    first, second = (np.concatenate(parts) for parts in zip(*sums, strict=True))
    if len(first) < 2:
        raise UserError("fewer than two images could be encoded, of which no spread can be measured")
    for line in describe(moments_of(first, second), len(first)):
        print(line)


def _read(index: Index, store: LatentStore) -> Iterator[Float64[np.ndarray, "k c h w"]]:
    rows = np.flatnonzero(index.used)
    for bucket in np.unique(index.bucket[rows]).tolist():
        own: Int64[np.ndarray, " m"] = rows[index.bucket[rows] == bucket]
        for start in range(0, len(own), AT_ONCE):
            part = own[start : start + AT_ONCE].tolist()
            yield store.read(part, [False] * len(part)).astype(np.float64)


def describe(moments: Moments, count: int) -> Iterator[str]:
    """Lines with a table of the channels, and the options as TOML."""
    yield f"# latents of {count} images, each with its standard error"
    yield f"# {'channel':>7} {'mean':>20} {'deviation':>20}"
    values = zip(moments.mean, moments.mean_error, moments.deviation, moments.deviation_error, strict=True)
    for channel, (mean, mean_error, deviation, deviation_error) in enumerate(values):
        cells = (f"{value:.4f} +- {error:.4f}" for value, error in ((mean, mean_error), (deviation, deviation_error)))
        yield f"# {channel:>7} " + " ".join(f"{cell:>20}" for cell in cells)
    yield "# one number per channel"
    yield f"vae_custom_shift = [{', '.join(f'{value:.5g}' for value in moments.mean)}]"
    yield f"vae_custom_scale = [{', '.join(f'{1 / value:.5g}' for value in moments.deviation)}]"
    mean, deviation = moments.together
    yield "# or one number for all channels, as most VAEs have"
    yield f"# vae_custom_shift = {mean:.5g}"
    yield f"# vae_custom_scale = {1 / deviation:.5g}"
