"""Names the option at whose address something failed, which the code that reads the address does not know."""

from collections.abc import Iterator, Sequence

from sdxl_finetune.config.dataset import split_tars
from sdxl_finetune.config.options import Config
from sdxl_finetune.errors import Problem
from sdxl_finetune.storage import Address, parse_location

REMEDIES = {"does not exist": "does not exist: check the address"}
"""Messages without a remedy, each with what is printed in its place."""


def with_options(problems: Sequence[Problem], config: Config) -> list[Problem]:
    """Returns the problems, each with the option that holds its address or a folder above it.

    A problem that has an option, or whose file is no address of the config, stays as it is. An address in a
    `dataset_config` file is named with that option.
    """
    return [_with_option(problem, config) for problem in problems]


def _with_option(problem: Problem, config: Config) -> Problem:
    try:
        place = parse_location(problem.file or "") if problem.key is None else None
    except ValueError:
        return problem
    if not isinstance(place, Address):
        return problem
    found = max(_options_at(place, config), default=None)
    if found is None and config.dataset_config is None:
        return problem
    _, option, value = found or (0, "dataset_config", str(config.dataset_config))
    message = REMEDIES.get(problem.message, problem.message)
    return Problem(message, option, value, None if problem.file == value else problem.file)


def _options_at(place: Address, config: Config) -> Iterator[tuple[int, str, str]]:
    """Yields the options whose address is `place` or a folder above it: its number of parts, option and value."""
    for option, value in config:
        if isinstance(value, Address):
            folder, _ = split_tars(value)
            if place.is_relative_to(folder):
                yield len(folder.parts), option, str(value)
