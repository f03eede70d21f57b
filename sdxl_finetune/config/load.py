"""Loading: turns a config file and the command line into one Config, or all their mistakes into one UserError.

As in the reference, tables of the file only group options, and the command line wins over the file. Unlike in the
reference, an unknown option, a wrong type, an impossible combination and a missing file are mistakes.
"""

import difflib
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from sdxl_finetune.config.fields import Shown, expected, kinds, reasons
from sdxl_finetune.config.options import Config, to_toml
from sdxl_finetune.config.output_options import Sampler
from sdxl_finetune.config.reading import COMMAND_LINE, Given, config_path, problem, read_command_line, read_file
from sdxl_finetune.config.rules import find_problems, find_remarks
from sdxl_finetune.config.unsupported import FOREIGN, REFERENCE, is_off
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.files import atomic_path

logger = logging.getLogger(__name__)


class FaultyConfig(UserError):
    """The problems of a config, together with what is left of it, for further checks."""

    def __init__(self, problems: Sequence[Problem], config: Config, faulty: frozenset[str]) -> None:
        super().__init__(problems)
        self.config = config
        """The config with the defaults of refused options."""
        self.faulty = faulty
        """Names of the options that the problems are about."""


def load_config(arguments: Sequence[str], *, program: str) -> Config | None:
    """Returns the config of a command line; None if the command line only asks to print or write the config.

    Logs a warning for each remark. Raises UserError with all problems, or FaultyConfig for a run's config.
    """
    typed, command = read_command_line(arguments, program)
    if "reproduce" in typed and not command.config_file:
        command.config_file = f"{typed['reproduce'].value}/config.toml"
    path = config_path(command.config_file) if command.config_file else None
    reads_file = path is not None and not command.output_config
    given, problems, remarks = read_file(command.config_file) if reads_file else ({}, [], [])
    given |= typed
    options = {name: option for name, option in given.items() if name in Config.model_fields}
    _sort_out_others(given, options, problems, remarks)
    _replace_unusable(options, remarks)
    values = {name: option.value for name, option in options.items()}
    refused = _refused(values)
    problems += [problem(_remedy(name, options[name], refused[name]), name, options) for name in refused]
    config = Config(**{name: value for name, value in values.items() if name not in refused})
    file = None if path is None else str(path)
    faulty = {*refused, *(each.key for each in problems if each.key)}
    if command.output_config:
        if path is None or path.exists():
            message = "the file exists: choose a new name" if path else "needs --config, the name of the file to write"
            problems.append(Problem(message, "output_config", file, COMMAND_LINE))
    elif not command.print_config:
        for names, message in find_problems(config):
            if refused.keys().isdisjoint(names.split()):
                problems.append(problem(message, names.split()[0], options, file))
                faulty.update(names.split())
    if problems and (command.output_config or command.print_config):
        raise UserError(problems)
    if problems:
        raise FaultyConfig(problems, config, frozenset(faulty))
    remarks += [problem(message, name, options, file) for name, message in find_remarks(config)]
    for remark in _merged(remarks):
        logger.warning("%s", remark)
    if command.output_config and path:
        with atomic_path(path) as temporary:
            temporary.write_text(to_toml(config, changed_only=True), encoding="utf-8")
    elif command.print_config:
        print(to_toml(config), end="")
    else:
        return config
    return None


def _sort_out_others(
    given: Mapping[str, Given], options: dict[str, Given], problems: list[Problem], remarks: list[Problem]
) -> None:
    """Adds to `problems`, `remarks` and `options` what becomes of the given options that the schema does not have."""
    for name in [name for name in given if name not in options]:
        foreign = (REFERENCE | FOREIGN).get(name)
        if (whole := _whole_name(name)) and given[name].place == COMMAND_LINE:
            options.setdefault(whole, given[name])
            remarks.append(problem(f"is read as {whole}", name, given))
        elif foreign is None:
            problems.append(problem(f"unknown option; {_nearest(name)}", name, given))
        elif is_off(name, given[name].value):
            continue
        elif foreign.outcome == "refused":
            problems.append(problem(foreign.remark, name, given))
        elif foreign.outcome == "no effect":
            remarks.append(problem(f"has no effect: {foreign.remark}", name, given))
        elif foreign.remark in options:
            remarks.append(problem(f"has no effect: {foreign.remark} is set as well", name, given))
        else:
            options[foreign.remark] = given[name]
            remarks.append(problem(f"is read as {foreign.remark}", name, given))


def _replace_unusable(options: dict[str, Given], remarks: list[Problem]) -> None:
    """Replaces values that the reference accepts and that cannot be used as they are. Adds a remark on each."""
    length = options.get("max_token_length")
    if length and type(length.value) is int and length.value > 75 and length.value % 75:
        whole = length.value - length.value % 75
        message = f"is read as {whole}, as in the reference: chunks of 75 tokens are read, longer captions are cut"
        remarks.append(problem(message, "max_token_length", options))
    sampler = options.get("sample_sampler")
    if sampler and sampler.place != COMMAND_LINE and sampler.value not in ("", *get_args(Sampler)):
        message = f"there is no such sampler, so previews use ddim, as in the reference: {', '.join(get_args(Sampler))}"
        remarks.append(problem(message, "sample_sampler", options))
        del options["sample_sampler"]
    tracker = options.get("log_with")
    if tracker and tracker.value in ("wandb", "all") and importlib.util.find_spec("wandb") is None:
        folder = options.get("logging_dir")
        if folder is None and (output := options.get("output_dir")):
            options["logging_dir"] = folder = Given(f"{output.value}/logs", tracker.place)
        message = "the package wandb is not installed, so the run is logged to TensorBoard files"
        where = f" in {folder.value}" if folder else ""
        remarks.append(problem(f"{message}{where}: pip install wandb", "log_with", options))
        options["log_with"] = Given("tensorboard", tracker.place)


def _whole_name(name: str) -> str | None:
    """Returns the only option of the reference that starts with `name`, or None. The reference's parser does so too."""
    if name in Config.model_fields or name in REFERENCE | FOREIGN or len(name) < 4:
        return None
    ours = {option for option, field in Config.model_fields.items() if "Not in sd-scripts" in str(field.description)}
    names = [option for option in {*Config.model_fields, *REFERENCE} - ours if option.startswith(name)]
    return names[0] if len(names) == 1 and names[0] in Config.model_fields else None


def _merged(remarks: Sequence[Problem]) -> list[Problem]:
    """Joins remarks that say the same into one, which names all their options."""
    by_message: dict[str, list[Problem]] = {}
    for remark in remarks:
        by_message.setdefault(remark.message, []).append(remark)
    return [
        same[0] if len(same) == 1 else Problem(message, ", ".join(str(remark.key) for remark in same))
        for message, same in by_message.items()
    ]


def _nearest(name: str) -> str:
    if name.endswith(".toml"):
        return f"did you mean --config {name}?"
    near = difflib.get_close_matches(name.lower().replace("-", "_"), Config.model_fields, n=1, cutoff=0.7)
    return f"did you mean {near[0]}?" if near else "--help lists all options"


def _refused(values: Mapping[str, Any]) -> dict[str, str]:
    """Returns the names of options whose value the schema refuses, each with the reason, in the order of `values`."""
    try:
        Config(**values)
    except ValidationError as error:
        found = reasons(error)
        return {name: found[name] for name in values if name in found}
    return {}


def _remedy(name: str, given: Given, reason: str) -> str:
    """Says why a value is refused, if `reason` says it, and what the option takes."""
    field = Config.model_fields[name]
    (kind,) = kinds(field)
    typed = given.place == COMMAND_LINE
    is_path = isinstance(kind, Shown) and kind.text.startswith("a path")
    if is_path and isinstance(given.value, str):
        return f"must be {expected(field)}; {reason}" if "://" in given.value else f"must be a path; {reason}"
    because = f"{reason}: " if reason else ""
    if field.annotation == dict[str, Any] and typed:
        return f"{because}must be arguments separated by spaces, as betas=0.9,0.99 eps=1e-8"
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    is_table = isinstance(kind, Shown) and kind.is_table
    text = kind is str or (is_path and not is_table) or any(isinstance(choice, str) for choice in choices)
    hint = ""
    if not typed and (not isinstance(kind, Shown) or text):
        hint = ", in quotes" if text else ", without quotes"
    return f"{because}must be {expected(field)}" + (hint if isinstance(given.value, str) != text else "")
