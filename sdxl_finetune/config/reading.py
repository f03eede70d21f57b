"""Reads the two sources of options, a TOML file and the command line, into plain values with their places.

Reading judges nothing but syntax. The schema judges which names there are and which values they take.
"""

import argparse
import contextlib
import difflib
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import toml

from sdxl_finetune import __version__
from sdxl_finetune.config.fields import Shown, expected, kinds, plain
from sdxl_finetune.config.options import GROUPS, SECRETS, Config
from sdxl_finetune.config.unsupported import FOREIGN, REFERENCE
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.parsing import parse_toml_text
from sdxl_finetune.storage import Location, read

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

logger = logging.getLogger(__name__)

COMMAND_LINE = "command line"
SWITCHES = {"true": "--", "false": "--no-"}
"""Start of the switch that stands for each value of an option that is true or false."""
COMMANDS = ("config_file", "print_config", "output_config")
"""Words of the command line that are no options of a run: the name of the config file, and what to do with it."""


@dataclass(frozen=True)
class Given:
    """The value of an option, and the place where the user gave it."""

    value: Any
    place: str


def problem(message: str, name: str, given: Mapping[str, Given], file: str | None = None) -> Problem:
    """Returns a problem that shows the option's value and its place. A secret stays hidden, also under a misspelt name.

    The place is `file` if the option is not given.
    """
    if name not in given:
        return Problem(message, name, file=file)
    is_secret = name in SECRETS or difflib.get_close_matches(name, SECRETS, n=1, cutoff=0.75)
    return Problem(message, name, None if is_secret else given[name].value, given[name].place)


def config_path(name: str) -> Path:
    """Returns the path of a config file. Its ending `.toml` may be left out.

    Raises UserError for a .json file, in which GUIs keep their settings under names of their own.
    """
    if name.lower().endswith(".json"):
        message = "a config file is TOML. A GUI's .json file holds the GUI's own settings: use the .toml file"
        raise UserError(Problem(f"{message} that the GUI writes when it trains or prints the command", file=name))
    return Path(name if name.lower().endswith(".toml") else f"{name}.toml")


def read_file(name: str) -> tuple[dict[str, Given], list[Problem], list[Problem]]:
    """Returns the options of a config file, the problems, and what is worth a warning.

    Tables only group options. If an option is given twice, the later value wins.
    Raises UserError if the file cannot be read.
    """
    path = config_path(name)
    if not path.exists() and path != Path(name) and Path(name).exists():
        kind = "folder: name a file in it" if Path(name).is_dir() else "file of another kind: name a .toml file"
        raise UserError(Problem(f"a config is a TOML file whose name ends in .toml, and this is a {kind}", file=name))
    tables, text = parse_toml(path)
    lines = _line_numbers(text)
    given: dict[str, Given] = {}
    problems, remarks = [], []
    groups = {key for key, value in tables.items() if isinstance(value, dict) and not _takes_table(key)}
    entries = [("", key, value) for key, value in tables.items() if key not in groups]
    for table in (key for key in tables if key in groups):
        entries += [(table, key, value) for key, value in tables[table].items()]
    for table, key, value in entries:
        place = f"{path}:{lines[table, key]}" if (table, key) in lines else str(path)
        parts = value if isinstance(value, list) else [value]
        if any(isinstance(part, dict) for part in parts) and not _takes_table(key):
            message = "a table inside a table is not allowed: write its options one level higher"
            problems.append(Problem(message, key, file=place))
            continue
        earlier = given.get(key)
        given[key] = Given(_typed(key, value), place)
        if isinstance(value, str) and not isinstance(given[key].value, str):
            remarks.append(problem("the quotes around the value are ignored", key, given))
        if earlier and earlier.value != value:
            remarks.append(problem(f"given twice; this value is used, not the one at {earlier.place}", key, given))
    return given, problems, remarks


def _takes_table(name: str) -> bool:
    """True for an option whose value may be a table. Every other table of a config file only groups options."""
    return name in Config.model_fields and any(
        isinstance(kind, Shown) and kind.is_table for kind in kinds(Config.model_fields[name])
    )


def parse_toml(path: Location) -> tuple[dict[str, Any], str]:
    """Returns the content of a TOML file and its text. Raises UserError if the file cannot be read."""
    try:
        text = path.read_text(encoding="utf-8-sig") if isinstance(path, Path) else read(path).decode("utf-8-sig")
        return parse_toml_text(text), text
    except tomllib.TOMLDecodeError as error:
        with contextlib.suppress(Exception):  # the reference's parser reads numbers as 1.e-5, which are not valid TOML
            content = toml.loads(text)
            logger.warning("%s: not valid TOML, but read as in the reference: %s", path, error)
            return content, text
        message, _, place = str(error).partition(" (at ")
        numbers = "".join(f":{number}" for number in re.findall(r"\d+", place))
        line = text.split("\n")[int(numbers[1:].partition(":")[0]) - 1] if numbers else ""
        if re.search(r'"[^"]*\\', line):
            message += ". In double quotes a backslash begins an escape: put a Windows path into single quotes"
        elif re.match(r"(Illegal|Found invalid) character '\\n'|Unterminated string|Expected \"'\"", message):
            message += ". Is the closing quote missing?"
        raise UserError(Problem(f"not valid TOML: {message}", file=f"{path}{numbers}")) from None
    except UnicodeDecodeError:
        raise UserError(Problem("not a UTF-8 text file: save it as UTF-8", file=str(path))) from None
    except ValueError as error:  # a number of thousands of digits, or thousands of brackets in one another
        raise UserError(Problem(f"not valid TOML: {error}", file=str(path))) from None
    except OSError as error:
        raise UserError(Problem(f"cannot be read: {_reason(error)}", file=str(path))) from None


def _reason(error: OSError) -> str:
    return "it is a folder, and a file is needed" if isinstance(error, IsADirectoryError) else str(error.strerror)


def _line_numbers(text: str) -> dict[tuple[str, str], int]:
    """Returns the line of each (table, key). A search finds them, because tomllib does not tell; messages need them."""
    numbers: dict[tuple[str, str], int] = {}
    table = ""
    for number, line in enumerate(text.split("\n"), start=1):
        if header := re.match(r"\s*\[+\s*[\"']?([^\[\]\"']+?)[\"']?\s*\]", line):
            table = header[1]
        elif entry := re.match(r"\s*[\"']?([\w-]+)[\"']?\s*=", line):
            numbers.setdefault((table, entry[1]), number)
    return numbers


def read_command_line(arguments: Sequence[str], program: str) -> tuple[dict[str, Given], argparse.Namespace]:
    """Returns the typed options, unknown ones included, and a namespace of COMMANDS.

    `--help` and `--version` print and exit. Raises UserError if the command line cannot be read.
    """
    try:
        parsed, rest = build_parser(program).parse_known_args(_as_switches(arguments))
    except argparse.ArgumentError as error:
        raise UserError(Problem(str(error), file=COMMAND_LINE)) from None
    values = {name: value for name, value in vars(parsed).items() if name not in COMMANDS}
    name = ""
    for word in rest:
        if word.startswith("-"):
            name, _, value = word.lstrip("-").partition("=")
            values[name] = value or None
        else:
            values[name or word] = word if name else None
            name = ""
    return {name: Given(_typed(name, value), COMMAND_LINE) for name, value in values.items()}, parsed


def _as_switches(arguments: Sequence[str]) -> list[str]:
    """Returns the command line with `--name true` and `--name=false` as `--name` and `--no-name`.

    Only options that are true or false are changed. Forks of the reference have options that take such a value.
    """
    words: list[str] = []
    for word in arguments:
        name, _, value = word.partition("=")
        if not value and words and _is_switch(words[-1]) and word.lower() in SWITCHES:
            words[-1] = SWITCHES[word.lower()] + words[-1].removeprefix("--")
        elif _is_switch(name) and value.lower() in SWITCHES:
            words.append(SWITCHES[value.lower()] + name.removeprefix("--"))
        else:
            words.append(word)
    return words


def _is_switch(word: str) -> bool:
    field = Config.model_fields.get(word.removeprefix("--")) if word.startswith("--") else None
    return field is not None and kinds(field) == [bool]


def build_parser(program: str) -> argparse.ArgumentParser:
    """Builds a parser of every option. The schema checks values later, so that all mistakes are reported at once."""
    usage = "%(prog)s --config FILE [--option VALUE ...]"
    parser = argparse.ArgumentParser(program, usage, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--version", action="version", version=f"{program} {__version__}")
    text = "TOML file of options; its ending .toml may be left out. Options of the command line win over the file."
    parser.add_argument("--config", "--config_file", dest="config_file", metavar="FILE", help=text)
    text = "Print all options and their values as TOML, and do nothing else."
    parser.add_argument("--print_config", action="store_true", help=text)
    text = "Write the options of the command line to the new file that --config names, and do nothing else."
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
    for name in (REFERENCE | FOREIGN).keys() - set(COMMANDS):
        parser.add_argument(f"--{name}", **hidden)
    return parser


def _typed(name: str, value: Any) -> Any:
    """Returns the value in the type that the option takes, if value and type agree. Otherwise the schema refuses it.

    Text may hold a number or a boolean. A number may stand for text, a whole float for an int, 0 or 1 for a boolean.
    """
    kind: Any = int
    if name in FOREIGN and FOREIGN[name].outcome == "honoured":
        name = FOREIGN[name].remark
    if name in Config.model_fields:
        (kind,) = kinds(Config.model_fields[name])
        kind = type(get_args(kind)[0]) if get_origin(kind) is Literal else kind
    match value:
        case str() if kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                return value
        case str() if kind is bool and value.lower() in ("true", "false"):
            return value.lower() == "true"
        case bool():
            return value
        case int() | float() if kind is str and name in Config.model_fields:
            return str(value)
        case int() if kind is bool and value in (0, 1):
            return bool(value)
        case float() if kind is int and value.is_integer():
            return int(value)
    return value
