"""Checks of the options that say at which timesteps a model is trained. Findings are those of rules.py."""

from collections.abc import Iterator

from sdxl_finetune.config.options import Config


def timestep_problems(config: Config) -> Iterator[tuple[str, str]]:
    """Yields options with which no timestep could be drawn."""
    for option, example in (("laplace_timestep_sampling_mu", 0), ("laplace_timestep_sampling_b", 3)):
        if config.flow_timestep_distribution == "laplace" and getattr(config, option) is None:
            message = f"is needed with flow_timestep_distribution laplace: set it, as {option} = {example}"
            yield f"{option} flow_timestep_distribution", message
    first, end = config.timestep_range
    if first >= end:
        options = "max_timestep min_timestep" if config.min_timestep is None else "min_timestep max_timestep"
        yield options, f"no timestep is left: min_timestep, now {first}, must be below max_timestep, now {end}"


def timestep_remarks(config: Config) -> Iterator[tuple[str, str]]:
    """Yields options of forks' flows that change the timesteps of a noise or velocity model, as forks do not."""
    used = [name for name in ("flow_uniform_static_ratio", "flow_uniform_shift") if getattr(config, name)]
    if config.flow_timestep_distribution in ("logit_normal", "beta", "cosmap"):
        used.insert(0, "flow_timestep_distribution")
    if used and not config.flow_model:
        message = f"is off, and {' and '.join(used)} changes the timesteps even so, other than in forks"
        yield "flow_model", f"{message}: remove it for the timesteps of sd-scripts"
