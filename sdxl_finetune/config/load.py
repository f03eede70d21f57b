"""Loading: turns a config file and the command line into one Config, or all their mistakes into one UserError.

As in the reference, tables of the file only group options, and the command line wins over the file. Unlike in the
reference, an unknown option, a wrong type, an impossible combination and a missing file are mistakes.
"""

import difflib
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from sdxl_finetune.config.fields import Shown, expected, kinds
from sdxl_finetune.config.options import Config, to_toml
from sdxl_finetune.config.reading import COMMAND_LINE, Given, config_path, problem, read_command_line, read_file
from sdxl_finetune.config.rules import find_problems, find_remarks
from sdxl_finetune.config.unsupported import FOREIGN, REFERENCE, is_off
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.files import atomic_path

logger = logging.getLogger(__name__)


def load_config(arguments: Sequence[str], *, program: str) -> Config | None:
    """Returns the config of a command line; None if the command line only asks to print or write the config.

    Logs a warning for each remark. Raises UserError with all problems.
    """
    typed, command = read_command_line(arguments, program)
    path = config_path(command.config_file) if command.config_file else None
    reads_file = path is not None and not command.output_config
    given, problems, remarks = read_file(command.config_file) if reads_file else ({}, [], [])
    given |= typed
    options = {name: option for name, option in given.items() if name in Config.model_fields}
    _sort_out_others(given, options, problems, remarks)
    values = {name: option.value for name, option in options.items()}
    refused = _refused(values)
    problems += [problem(_remedy(name, options[name]), name, options) for name in values if name in refused]
    config = Config(**{name: value for name, value in values.items() if name not in refused})
    file = None if path is None else str(path)
    if command.output_config:
        if path is None or path.exists():
            message = "the file exists: choose a new name" if path else "needs --config, the name of the file to write"
            problems.append(Problem(message, "output_config", file, COMMAND_LINE))
    elif not command.print_config:
        for names, message in find_problems(config):
            if refused.isdisjoint(names.split()):
                problems.append(problem(message, names.split()[0], options, file))
    if problems:
        raise UserError(problems)
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
        if foreign is None:
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
    if "max_token_length" in options and options["max_token_length"].value == 255:
        message = "is read as 225, as in the reference: 3 chunks of 75 tokens are read, longer captions are cut"
        remarks.append(problem(message, "max_token_length", options))


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


def _refused(values: Mapping[str, Any]) -> set[str]:
    """Returns the names of options whose value the schema refuses."""
    try:
        Config(**values)
    except ValidationError as error:
        return {str(mistake["loc"][0]) for mistake in error.errors()}
    return set()


def _remedy(name: str, given: Given) -> str:
    field = Config.model_fields[name]
    (kind,) = kinds(field)
    typed = given.place == COMMAND_LINE
    if kind == Shown("a path") and isinstance(given.value, str):
        return "must be a path. In double quotes a backslash begins an escape: use single quotes, or /"
    if field.annotation == dict[str, Any] and typed:
        return "must be arguments separated by spaces, as betas=0.9,0.99 eps=1e-8"
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    text = kind is str or kind == Shown("a path") or any(isinstance(choice, str) for choice in choices)
    hint = ""
    if not typed and (not isinstance(kind, Shown) or text):
        hint = ", in quotes" if text else ", without quotes"
    return f"must be {expected(field)}" + (hint if isinstance(given.value, str) != text else "")
