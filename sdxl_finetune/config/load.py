"""Loading: a config file and the command line become one Config, or all their mistakes one UserError.

As in the reference, tables of the file only group options, and what is typed wins over the file. Unlike there,
an unknown option, a wrong type, an impossible combination and a missing file are mistakes.
"""

import difflib
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import toml
from pydantic import ValidationError

from sdxl_finetune.config.fields import Shown, expected, kinds, plain
from sdxl_finetune.config.options import GROUPS, SECRETS, Config
from sdxl_finetune.config.reading import COMMAND_LINE, Given, config_path, read_command_line, read_file
from sdxl_finetune.config.rules import find_problems, find_remarks
from sdxl_finetune.config.unsupported import FOREIGN, REFERENCE, is_off
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.files import atomic_path

logger = logging.getLogger(__name__)


def load_config(arguments: Sequence[str], *, program: str) -> Config | None:
    """The config that `arguments` ask for; None when they only ask to print or write one, which is then done.

    Raises UserError with everything that is wrong. What is merely worth knowing is logged, once.
    """
    given: dict[str, Given] = {}
    problems: list[Problem] = []
    remarks: list[Problem] = []
    typed, orders = read_command_line(arguments, program)
    if orders.config_file and not orders.output_config:
        given, problems, remarks = read_file(orders.config_file)
    options = _settle({**given, **typed}, problems, remarks)
    config, refused = _validate(options, problems)
    file = str(config_path(orders.config_file)) if orders.config_file else None
    if not (orders.print_config or orders.output_config):
        for names, message in find_problems(config):
            if not refused & set(names.split()):
                problems.append(_problem(message, names.split()[0], options, file))
    if orders.output_config and (file is None or Path(file).exists()):
        message = "a file of this name exists" if file else "needs --config, the file to write"
        problems.append(Problem(message, "output_config", file, COMMAND_LINE))
    if problems:
        raise UserError(problems)
    remarks += [_problem(message, name, options, file) for name, message in find_remarks(config)]
    for remark in remarks:
        logger.warning("%s", remark)
    if orders.output_config and file:
        with atomic_path(Path(file)) as path:
            path.write_text(to_toml(config, changed_only=True), encoding="utf-8")
    elif orders.print_config:
        print(to_toml(config), end="")
    else:
        return config
    return None


def to_toml(config: Config, *, changed_only: bool = False) -> str:
    """A config as a file that loads as the same config, here and by the reference; without secrets."""
    tables: dict[str, dict[str, Any]] = {}
    for group in GROUPS:
        title = re.sub(r"(?<=.)(?=[A-Z])", "_", group.__name__.removesuffix("Options")).lower()
        tables[title] = {
            name: plain(value)
            for name, field in group.model_fields.items()
            if (value := getattr(config, name)) is not None
            and name not in SECRETS
            and not (changed_only and value == field.get_default(call_default_factory=True))
        }
    encoder: Any = toml.TomlEncoder()
    # The library's own writer of text fails on control characters; TOML's text is JSON's but for DEL.
    encoder.dump_funcs[str] = lambda text: json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
    return toml.dumps({title: table for title, table in tables.items() if table}, encoder)


def _settle(given: dict[str, Given], problems: list[Problem], remarks: list[Problem]) -> dict[str, Given]:
    """The options of the schema among those given; what happens to the others goes to `problems` and `remarks`."""
    options = {name: one for name, one in given.items() if name in Config.model_fields}
    for name, one in given.items():
        foreign = (REFERENCE | FOREIGN).get(name)
        if name in options or (foreign and is_off(name, one.value)):
            continue
        if foreign is None:
            problems.append(_problem(f"unknown option; {_nearest(name)}", name, given))
        elif foreign.outcome == "refused":
            problems.append(_problem(foreign.remark, name, given))
        elif foreign.outcome == "honoured" and foreign.remark not in options:
            options[foreign.remark] = one
            remarks.append(_problem(f"is read as {foreign.remark}", name, given))
        else:
            remarks.append(_problem(f"has no effect: {foreign.remark}", name, given))
    if "max_token_length" in options and options["max_token_length"].value == 255:
        message = (
            "is read as 225, as in the reference: captions are cut into 3 chunks of 75 tokens, the rest is dropped"
        )
        remarks.append(_problem(message, "max_token_length", options))
    return options


def _nearest(name: str) -> str:
    if name.endswith(".toml"):
        return f"did you mean --config {name}?"
    near = difflib.get_close_matches(name.lower().replace("-", "_"), Config.model_fields, n=1, cutoff=0.7)
    return f"did you mean {near[0]}?" if near else "--help lists all"


def _validate(options: dict[str, Given], problems: list[Problem]) -> tuple[Config, set[str]]:
    """The config, and the names of options with a value that was refused; those count as not given."""
    try:
        return Config(**{name: one.value for name, one in options.items()}), set()
    except ValidationError as error:
        refused = {str(mistake["loc"][0]) for mistake in error.errors()}
    problems += [_problem(_remedy(name, one), name, options) for name, one in options.items() if name in refused]
    kept = {name: one.value for name, one in options.items() if name not in refused}
    return Config(**kept), refused


def _remedy(name: str, given: Given) -> str:
    field = Config.model_fields[name]
    (kind,) = kinds(field)
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    text = kind is str or kind == Shown("a path") or any(isinstance(choice, str) for choice in choices)
    hint = ""
    if given.place != COMMAND_LINE and (not isinstance(kind, Shown) or text):
        hint = ", in quotes" if text else ", without quotes"
    return f"must be {expected(field)}" + (hint if isinstance(given.value, str) != text else "")


def _problem(message: str, name: str, given: dict[str, Given], file: str | None = None) -> Problem:
    one = given.get(name)
    value = None if one is None or name in SECRETS else one.value
    return Problem(message, name, value, one.place if one else file)
