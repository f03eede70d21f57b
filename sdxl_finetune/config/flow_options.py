"""Options of the timestep distribution, which work with every objective. Their names are those of forks' flows."""

from typing import Annotated, Literal

from pydantic import Field

from sdxl_finetune.config.fields import OnlyWith, Options

DISTRIBUTION = "flow_timestep_distribution"


class FlowOptions(Options):
    """Flow and timestep distribution"""

    flow_timestep_distribution: Literal["uniform", "logit_normal", "beta", "cosmap", "laplace"] | None = None
    """Distribution of timesteps. Default: logit_normal with `flow_model`, else uniform. Of forks of sd-scripts."""
    flow_logit_mean: Annotated[float, OnlyWith(DISTRIBUTION, ("logit_normal",))] = 0.0
    """Mean of the logit of t = timestep / 1000. Above 0: more noise. Of forks of sd-scripts."""
    flow_logit_std: Annotated[float, OnlyWith(DISTRIBUTION, ("logit_normal",))] = Field(1.0, gt=0)
    """Standard deviation of the logit of t. Of forks of sd-scripts."""
    flow_beta_alpha: Annotated[float, OnlyWith(DISTRIBUTION, ("beta",))] = Field(1.5, gt=0)
    """First parameter of the beta distribution. Higher: more noise. Not in sd-scripts."""
    flow_beta_beta: Annotated[float, OnlyWith(DISTRIBUTION, ("beta",))] = Field(1.0, gt=0)
    """Second parameter of the beta distribution. Higher: less noise. Not in sd-scripts."""
    laplace_timestep_sampling_mu: Annotated[float | None, OnlyWith(DISTRIBUTION, ("laplace",))] = None
    """Logarithm of the signal-to-noise ratio that is drawn most often. Of forks of sd-scripts."""
    laplace_timestep_sampling_b: Annotated[float | None, OnlyWith(DISTRIBUTION, ("laplace",))] = Field(None, gt=0)
    """Width of the Laplace distribution around that logarithm. Of forks of sd-scripts."""
    flow_uniform_static_ratio: float | None = Field(None, gt=0)
    """Shift of any distribution: t becomes r t / (1 + (r - 1) t). Above 1: more noise. Of forks of sd-scripts."""
    flow_uniform_shift: Annotated[bool, OnlyWith("flow_uniform_static_ratio", unless=True)] = False
    """Shift by resolution: r is the root of pixels / `flow_uniform_base_pixels`. Of forks of sd-scripts."""
    flow_uniform_base_pixels: Annotated[float, OnlyWith("flow_uniform_shift")] = Field(1048576.0, gt=0)
    """Pixels of an image that `flow_uniform_shift` does not shift. Of forks of sd-scripts."""
    stratified_timesteps: bool = False
    """Spread the timesteps of each optimizer step evenly over the distribution. Not in sd-scripts."""


def shift_ratio(options: FlowOptions, pixels: int) -> float:
    """The ratio r of the shift: `flow_uniform_static_ratio`, or the root of pixels / base pixels, or 1 for no shift.

    Source: Esser et al., arXiv 2403.03206, section 5.3.2, where r is the root of m / n. A static ratio wins over the
    shift by resolution, as in forks.
    """
    if options.flow_uniform_static_ratio is not None:
        return options.flow_uniform_static_ratio
    return (pixels / options.flow_uniform_base_pixels) ** 0.5 if options.flow_uniform_shift else 1.0


def fixed_shift(options: FlowOptions) -> float | None:
    """The ratio of the shift of every image; None if it follows from the image's pixels."""
    by_resolution = options.flow_uniform_shift and options.flow_uniform_static_ratio is None
    return None if by_resolution else shift_ratio(options, 1)
