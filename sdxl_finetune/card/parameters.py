"""The training parameters as TOML: the lines of the config file as they stand there, without paths and secrets.

The model's metadata say which values the run had. A line whose value the run did not have gives way to the run's value,
and options of the command line are added. Comments are left out, because they may name people and machines.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

import toml

from sdxl_finetune.config import Config, HubOptions, MetadataOptions
from sdxl_finetune.config.fields import plain
from sdxl_finetune.config.options import SECRETS
from sdxl_finetune.output.metadata import TEXT_PATHS
from sdxl_finetune.parsing import parse_toml_text
from sdxl_finetune.storage import Address

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRIVATE = frozenset(
    {*SECRETS, *TEXT_PATHS, *HubOptions.model_fields, *MetadataOptions.model_fields}
    | {"log_tracker_name", "log_prefix", "wandb_run_name", "resume"}
)
"""Options that are left out besides all paths: they name people, or stand elsewhere on the page."""


def parameters_toml(text: str | None, config: Config, recorded: Mapping[str, Any]) -> str:
    """Returns the parameters of a run as TOML.

    `text` is the config file, and `config` what it says. `recorded` are the options in the model's metadata, empty if
    the model does not say them. Without `text` they are all that is known.
    """
    defaults = {
        name: plain(field.get_default(call_default_factory=True)) for name, field in Config.model_fields.items()
    }
    lines, shown = [], set()
    for name, statement in _statements(text or ""):
        if name is None:
            lines.append(statement)
        elif (value := _shown_value(name, statement, config)) is not None:
            shown.add(name)
            run = recorded.get(name, defaults.get(name)) if recorded and name in Config.model_fields else value
            lines.append(statement if run == value else assignment(name, run) if run is not None else "")
    hidden = PRIVATE | shown
    others = {name: value for name, value in recorded.items() if name not in hidden and _is_option(name, value)}
    added = [assignment(name, value) for name, value in others.items() if value != defaults.get(name)]
    # Options after the heading of a table belong to that table, which makes no difference: tables only group options.
    return "\n".join([*filter(None, lines), *sorted(added)]) + "\n"


def assignment(name: str, value: Any) -> str:
    """A line of TOML that sets an option."""
    return str(toml.dumps({name: value})).rstrip("\n")


def _is_option(name: str, value: Any) -> bool:
    """True for a name and a value that an option can have. The metadata of a foreign file may hold anything."""
    values = value if isinstance(value, list) else [value]
    return bool(re.fullmatch(r"\w+", name)) and all(isinstance(one, (str, bool, int, float)) for one in values)


def _shown_value(name: str, statement: str, config: Config) -> Any:
    """The value of a statement of the file, as a file holds it; None for one that does not belong on the page.

    Of options that this program does not have, only numbers and true or false are shown.
    """
    if name in Config.model_fields:
        value = getattr(config, name)
        return None if name in PRIVATE or isinstance(value, (PurePath, Address)) else plain(value)
    value = parse_toml_text(statement)[name]
    return value if isinstance(value, (bool, int, float)) else None


def _statements(text: str) -> Iterator[tuple[str | None, str]]:
    """Yields the options of a TOML text with their lines, without comments. The heading of a table has no name."""
    pending = ""
    for line in text.removeprefix("\ufeff").splitlines():
        pending = f"{pending}\n{line}" if pending else line.strip()
        if not pending or pending.startswith("#"):
            pending = ""
            continue
        values = _parse(pending)
        if values is None:  # a list or a text that ends on a later line
            continue
        if pending.startswith("["):
            yield None, _without_comment(pending)
        else:
            yield from ((name, _without_comment(pending)) for name in values)
        pending = ""


def _without_comment(statement: str) -> str:
    """The statement without a comment at its end. A # inside of a text stays."""
    values = parse_toml_text(statement)
    if "\n" in statement and "#" in statement:  # a comment may stand on any of the lines
        return "\n".join(assignment(name, value) for name, value in values.items())
    marks = (place for place, letter in enumerate(statement) if letter == "#")
    return next((statement[:place].rstrip() for place in marks if _parse(statement[:place]) == values), statement)


def _parse(statement: str) -> dict[str, Any] | None:
    """The values of a TOML text; None if it is not complete."""
    try:
        return parse_toml_text(statement)
    except tomllib.TOMLDecodeError:
        return None
