"""The two places that options come from: a TOML file and the command line, each read into plain values.

Nothing is judged here but syntax: which names there are and what values they take is the schema's affair.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from sdxl_finetune import __version__
from sdxl_finetune.config.fields import expected, kinds, plain
from sdxl_finetune.config.options import GROUPS, SECRETS, Config
from sdxl_finetune.config.unsupported import FOREIGN, REFERENCE
from sdxl_finetune.errors import Problem, UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

COMMAND_LINE = "command line"
ORDERS = ("config_file", "print_config", "output_config")
"""What only the command line says: where the config is, and what to do with it."""


@dataclass(frozen=True)
class Given:
    """The value of an option, and the place that says so."""

    value: Any
    place: str


def config_path(name: str) -> Path:
    return Path(name if name.lower().endswith(".toml") else f"{name}.toml")


def read_file(name: str) -> tuple[dict[str, Given], list[Problem], list[Problem]]:
    """The options of a config file, what is wrong with it, and what is worth a warning.

    The ending `.toml` may be left out. Tables only group options; a later one overrides an earlier one.
    Raises UserError when the file cannot be read at all.
    """
    path = config_path(name)
    tables, text = parse_toml(path)
    lines = _line_numbers(text)
    given: dict[str, Given] = {}
    problems, remarks = [], []
    entries = [("", key, value) for key, value in tables.items() if not isinstance(value, dict)]
    for table, content in tables.items():
        entries += [(table, key, value) for key, value in content.items()] if isinstance(content, dict) else []
    for table, key, value in entries:
        place = f"{path}:{lines[table, key]}" if (table, key) in lines else str(path)
        parts = value if isinstance(value, list) else [value]
        if any(isinstance(part, dict) for part in parts):
            problems.append(Problem("tables go one level deep and hold options only", key, file=place))
            continue
        if key in given and given[key].value != value:
            shown = None if key in SECRETS else value
            remarks.append(Problem(f"wins over the value at {given[key].place}", key, shown, place))
        given[key] = Given(value, place)
    return given, problems, remarks


def parse_toml(path: Path) -> tuple[dict[str, Any], str]:
    """The content of a TOML file, and its text. Raises UserError when it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        return tomllib.loads(text), text
    except tomllib.TOMLDecodeError as error:
        message, _, place = str(error).partition(" (at ")
        numbers = "".join(f":{number}" for number in re.findall(r"\d+", place))
        raise UserError(Problem(f"not valid TOML: {message}", file=f"{path}{numbers}")) from None
    except UnicodeDecodeError:
        raise UserError(Problem("not a UTF-8 text file", file=str(path))) from None
    except OSError as error:
        raise UserError(Problem(f"cannot be read: {error.strerror}", file=str(path))) from None


def _line_numbers(text: str) -> dict[tuple[str, str], int]:
    """(table, key) to line, found by their looks: tomllib does not tell. Good enough for messages."""
    numbers: dict[tuple[str, str], int] = {}
    table = ""
    for number, line in enumerate(text.split("\n"), start=1):
        if header := re.match(r"\s*\[+\s*[\"']?([^\[\]\"']+?)[\"']?\s*\]", line):
            table = header[1]
        elif entry := re.match(r"\s*[\"']?([\w-]+)[\"']?\s*=", line):
            numbers.setdefault((table, entry[1]), number)
    return numbers


def read_command_line(arguments: Sequence[str], program: str) -> tuple[dict[str, Given], argparse.Namespace]:
    """The typed options, unknown ones included, and `config_file`, `print_config` and `output_config`.

    `--help` and `--version` print and exit. Raises UserError for what cannot be read at all.
    """
    try:
        orders, rest = build_parser(program).parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(Problem(str(error), file=COMMAND_LINE)) from None
    values = {name: value for name, value in vars(orders).items() if name not in ORDERS}
    name = ""
    for word in rest:
        if word.startswith("-"):
            name, _, value = word.lstrip("-").partition("=")
            values[name] = value or None
        else:
            values[name or word] = word if name else None
            name = ""
    return {name: Given(_typed(name, value), COMMAND_LINE) for name, value in values.items()}, orders


def build_parser(program: str) -> argparse.ArgumentParser:
    """A parser of every option; it leaves types to the schema, so that all mistakes are found in one go."""
    usage = "%(prog)s --config FILE [--option VALUE ...]"
    parser = argparse.ArgumentParser(program, usage, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--version", action="version", version=f"{program} {__version__}")
    text = "TOML file of options, its ending may be left out; what is typed wins over it."
    parser.add_argument("--config", "--config_file", dest="config_file", metavar="FILE", help=text)
    text = "Print all options with their values as TOML, and train nothing."
    parser.add_argument("--print_config", action="store_true", help=text)
    text = "Write the typed options to the file named by --config, which must be new, and train nothing."
    parser.add_argument("--output_config", action="store_true", help=text)
    for group in GROUPS:
        section = parser.add_argument_group(str(group.__doc__))
        for name, field in group.model_fields.items():
            settings: dict[str, Any] = {"metavar": "VALUE"}
            if kinds(field) == [bool]:
                settings = {"action": argparse.BooleanOptionalAction}
            elif field.annotation == dict[str, Any]:
                settings["nargs"] = "*"
            default = plain(field.get_default(call_default_factory=True))
            shown = f"; default {default}" if default else ""
            text = f"{field.description} [{expected(field)}{shown}]".replace("%", "%%")
            section.add_argument(f"--{name}", help=text, default=argparse.SUPPRESS, **settings)
    hidden: dict[str, Any] = {"nargs": "?", "const": True, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    for name in (REFERENCE | FOREIGN).keys() - set(ORDERS):
        parser.add_argument(f"--{name}", **hidden)
    return parser


def _typed(name: str, value: Any) -> Any:
    """Numbers out of text where the option wants them; text that is none stays, for the schema to refuse."""
    kind: Any = int
    if name in Config.model_fields:
        (kind,) = kinds(Config.model_fields[name])
        kind = type(get_args(kind)[0]) if get_origin(kind) is Literal else kind
    if kind in (int, float) and isinstance(value, str):
        try:
            return kind(value)
        except ValueError:
            return value
    return value
