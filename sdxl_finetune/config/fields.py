"""What kinds of value options take, and the base of every group of options.

A config file and the command line give plain values (text, numbers, booleans, lists of text); what turns them
into typed ones stands here, and `plain` turns them back: `plain` of a value loads as that value again.
`expected` says in words what an option takes, for help, documentation and error messages alike.
"""

import ast
import math
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

LR_SCHEDULERS = (
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial",
    "inverse_sqrt", "cosine_with_min_lr", "warmup_stable_decay", "piecewise_constant",
)  # fmt: skip


class Options(BaseModel):
    """A group of options: one field is one option, its documentation the line below it."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _unset_by_empty_text(cls, value: object, info: ValidationInfo) -> object:
        """An empty text unsets an option that may be unset, in a file and on the command line."""
        return None if value == "" and cls.model_fields[info.field_name or ""].default is None else value


@dataclass(frozen=True)
class Shown:
    """What an option of this kind takes, in words."""

    text: str


def _path(value: object) -> object:
    return Path(value) if isinstance(value, str) else value


def _resolution(value: object) -> object:
    if isinstance(value, str):
        value = [int(side) if side.strip().isdecimal() else None for side in value.split(",")]
    sides = list(value) if isinstance(value, list | tuple) else [value]
    if len(sides) not in (1, 2) or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError
    return sides[0], sides[-1]


def _steps_or_share(value: Any) -> Any:
    """An int counts steps; a float, or a text in percent, is a share of all steps."""
    if isinstance(value, str):
        value = float(value[:-1]) / 100 if value.endswith("%") else ast.literal_eval(value)
    if type(value) not in (int, float) or value < 0 or (isinstance(value, float) and not value <= 1):
        raise ValueError
    return value


def _arguments(value: object) -> object:
    """Each value is a Python literal, as in the reference; a text without `=` is a mistake."""
    if isinstance(value, dict):
        return value
    if not isinstance(value, list):
        raise ValueError
    arguments = {}
    for name, _, text in (item.partition("=") for item in value):
        if not name.strip():
            raise ValueError
        arguments[name.strip()] = ast.literal_eval(text.strip())
    return arguments


def _block_rates(value: object) -> object:
    rates = value.split(",") if isinstance(value, str) else value
    if not isinstance(rates, list | tuple) or len(rates) != 23:
        raise ValueError
    numbers = tuple(float(rate) for rate in rates)
    if not all(number >= 0 and math.isfinite(number) for number in numbers):
        raise ValueError
    return numbers


def _chunk_tokens(value: object) -> object:
    """255 is read as 225, which is what the reference makes of it; nothing given is one chunk."""
    return 75 if value in (None, "") else 225 if value == 255 else value


def _backend(value: object) -> object:
    """GUIs write "no" for what they pass to a launcher; whether anything is compiled, torch_compile says."""
    return "inductor" if value == "no" else value


def _period(value: object) -> object:
    """The reference takes a preview period of 0 or less as "never"."""
    return None if type(value) is int and value <= 0 else value


def _scheduler(value: Any) -> Any:
    if value not in LR_SCHEDULERS and not (value.startswith("adafactor:") and float(value[10:]) >= 0):
        raise ValueError
    return value


def _parsed(parse: Any) -> BeforeValidator:
    """`parse`, any of whose failures means that the value is not what `Shown` says."""

    def check(value: object) -> object:
        try:
            return parse(value)
        except Exception:
            raise ValueError from None

    return BeforeValidator(check)


FilePath = Annotated[Path, BeforeValidator(_path), Shown("a path")]
Resolution = Annotated[tuple[int, int], _parsed(_resolution), Shown('pixels, as 1024 or "1024,768"')]
StepsOrShare = Annotated[
    int | float, _parsed(_steps_or_share), Shown('steps as a whole number, or a share of all as 0.1 or "10%"')
]
Arguments = Annotated[
    dict[str, Any],
    _parsed(_arguments),
    Shown('a list as ["weight_decay=0.1", "betas=0.9,0.99"], Python values'),
]
BlockRates = Annotated[tuple[float, ...], _parsed(_block_rates), Shown('23 learning rates, as "1e-5,1e-5,..."')]
Scheduler = Annotated[str, _parsed(_scheduler), Shown("one of " + ", ".join(LR_SCHEDULERS) + ", adafactor:RATE")]
ChunkTokens = BeforeValidator(_chunk_tokens)
Backend = BeforeValidator(_backend)
Period = BeforeValidator(_period)


def kinds(field: FieldInfo) -> list[Any]:
    """What a value may be: types, a Literal, or `Shown` for the kinds above; without None."""

    def unfold(annotation: Any) -> Iterator[Any]:
        if get_origin(annotation) is Annotated:
            yield next(note for note in get_args(annotation) if isinstance(note, Shown))
        elif get_origin(annotation) in (Union, types.UnionType):
            for part in get_args(annotation):
                yield from unfold(part)
        elif annotation is not type(None):
            yield annotation

    shown = [note for note in field.metadata if isinstance(note, Shown)]
    return list(shown or unfold(field.annotation))


def expected(field: FieldInfo) -> str:
    """What an option takes, in words: "a whole number of at least 1"."""
    (kind,) = kinds(field)
    if isinstance(kind, Shown):
        return kind.text
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(kind))
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
    limits = {type(note).__name__.lower(): note for note in field.metadata}
    least, above, most = (getattr(limits.get(name), name, None) for name in ("ge", "gt", "le"))
    if most is not None:
        return f"{words} from {least} to {most}"
    if least is not None or above is not None:
        return f"{words} above {above}" if least is None else f"{words} of at least {least}"
    return f"{words} that is not empty" if "minlen" in limits else words


def plain(value: Any) -> Any:
    """An option's value as a config file holds it, in the form that the reference reads as well."""
    match value:
        case Path():
            return str(value)
        case dict():
            return [f"{name}={argument!r}" for name, argument in value.items()]
        case tuple():
            return ",".join(str(part) for part in value)
    return value
