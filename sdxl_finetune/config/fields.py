"""The kinds of value that options take, and the base class of the option groups.

A config file and the command line give plain values: text, numbers, booleans and lists of text. The kinds turn plain
values into typed ones, and `plain` turns typed values back. `plain` of a value loads as the same value again.
`expected` describes in words what an option takes, for help, documentation and error messages.
"""

import ast
import json
import math
import re
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    InstanceOf,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo

from sdxl_finetune.parsing import parse_json
from sdxl_finetune.storage import Address, parse_location

ScheduleName: TypeAlias = Literal[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "warmup_stable_decay",
    "piecewise_constant",
]
LARGEST = 2**31 - 1
"""Largest value of an option that is an integer. Counts and sizes are kept in 32 bits."""
LR_SCHEDULES: dict[str, tuple[str, ...]] = {
    "constant": (),
    "constant_with_warmup": (),
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": (),
    "polynomial": ("lr_end",),
    "inverse_sqrt": (),
    "cosine_with_min_lr": ("min_lr",),
    "warmup_stable_decay": ("warmup_type", "decay_type"),
    "piecewise_constant": ("step_rules",),
}
"""Names of the learning-rate schedules, each with the arguments that `lr_scheduler_args` may hold."""


class Options(BaseModel):
    """Base class of an option group: each field is one option, documented on the line below it."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _off(cls, value: object, info: ValidationInfo) -> object:
        """An empty text gives an option that is not text its default. 0 unsets a number that starts above 0.

        `false` gives a number its default. The reference reads all three as "off". GUIs write them for every option
        that the user has left alone.
        """
        field = cls.model_fields[info.field_name or ""]
        if (value == "" and kinds(field) != [str]) or (value is False and kinds(field) in ([int], [float])):
            return field.get_default(call_default_factory=True)
        if field.default is None and (
            value == "" or (type(value) in (int, float) and value == 0 and _is_positive(field))
        ):
            return None
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _bounded(cls, value: object, info: ValidationInfo) -> object:
        """Refuses integers that no 32-bit number holds, unless the field is a seed or has a bound of its own."""
        name = info.field_name or ""
        has_bound = any(hasattr(note, "le") for note in cls.model_fields[name].metadata)
        numbers = value if isinstance(value, tuple) else (value,)
        if not has_bound and not name.endswith("seed"):
            for number in numbers:
                if type(number) is int and abs(number) > LARGEST:
                    raise Refused(f"{number} does not fit into 32 bits")
        return value


def _is_positive(field: FieldInfo) -> bool:
    return any(getattr(note, "ge", None) == 1 for note in field.metadata)


@dataclass(frozen=True)
class OnlyWith:
    """Marks an option that has an effect only if one of other options is on."""

    options: str
    """Names of the other options, separated by spaces."""
    values: tuple[object, ...] = ()
    """Values of the other options that count as on. Default: all but false, 0, the empty text and unset."""
    unless: bool = False
    """True turns the condition round: the option has an effect only if none of the others is on."""

    def holds(self, config: Any) -> bool:
        """True if the option has an effect with these values of the other options."""
        given = [getattr(config, name) for name in self.options.split()]
        given = [value.partition(":")[0] if isinstance(value, str) else value for value in given]
        is_on = any(value in self.values if self.values else bool(value) for value in given)
        return is_on != self.unless

    def remark(self) -> str:
        """Says why an option without effect has none."""
        names = " or ".join(self.options.split())
        if self.values:
            return f"has no effect {'if' if self.unless else 'unless'} {names} is {' or '.join(map(str, self.values))}"
        return f"has no effect {'with' if self.unless else 'without'} {names}"


class Refused(ValueError):
    """A value is refused, for a reason that is shown to the user."""


def reasons(error: ValidationError) -> dict[str, str]:
    """Returns the names of the refused options, each with the reason, empty if `expected` says it all."""
    found: dict[str, str] = {}
    for mistake in error.errors():
        cause = mistake.get("ctx", {}).get("error")
        name = str(mistake["loc"][0])
        found[name] = found.get(name) or (str(cause) if isinstance(cause, Refused) else "")
    return found


@dataclass(frozen=True)
class Shown:
    """Describes a kind of value in words."""

    text: str
    is_table: bool = False
    """True if a config file may give the value as a table."""


def _resolution(value: object) -> object:
    """Returns (width, height) in pixels of a number, two numbers, or text of one or two numbers."""
    if isinstance(value, str):
        value = [int(side) if side.strip().isdecimal() else None for side in value.split(",")]
    sides = list(value) if isinstance(value, list | tuple) else [value]
    if len(sides) not in (1, 2) or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError
    return sides[0], sides[-1]


def _steps_or_share(value: Any) -> Any:
    """Returns an int, which counts steps, or a float from 0 to 1, which is a share of all steps."""
    if isinstance(value, str):
        value = float(value[:-1]) / 100 if value.endswith("%") else ast.literal_eval(value)
    if isinstance(value, float) and value > 1 and value.is_integer():
        value = int(value)
    if type(value) not in (int, float) or value < 0 or (isinstance(value, float) and not value <= 1):
        raise ValueError
    return value


def _face_range(value: Any) -> Any:
    """Returns (low, high) of two numbers, or of text of two numbers."""
    low, high = (float(part) for part in (value.split(",") if isinstance(value, str) else value))
    if not 0 < low <= high < math.inf:
        raise ValueError
    return low, high


NEXT_ARGUMENT = re.compile(r"[\s,]+(?=[A-Za-z_]\w*\s*=)")
"""White space or commas before the next of several arguments in one text, as in `weight_decay=0.1,betas=0.9,0.99`."""


def _arguments(value: object) -> object:
    """Returns a dictionary of texts `name=value`. Each value is a Python literal, as in the reference.

    One text may hold several arguments, separated by spaces or commas. The reference fails on such a text. A text may
    also be a Python dictionary, as in `edm2_loss_weighting_optimizer_args` of forks.
    """
    if isinstance(value, dict):
        return value
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list):
        raise ValueError
    if len(texts) == 1 and texts[0].lstrip().startswith("{"):
        return ast.literal_eval(texts[0].strip())
    arguments = {}
    items = [item for text in texts for item in NEXT_ARGUMENT.split(text.strip(" ,")) if item]
    for name, sign, text in (item.partition("=") for item in items):
        if not name.strip() or not sign:
            raise Refused(f"{name + sign + text!r} is not name=value")
        try:
            arguments[name.strip()] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            raise Refused(f"{text.strip()!r} is no number, and text needs quotes") from None
    return arguments


def _block_rates(value: object) -> object:
    """Returns a number for each block. Whether the U-Net has as many blocks is known only when it is loaded."""
    rates = value.split(",") if isinstance(value, str) else value
    if not isinstance(rates, list | tuple) or not rates:
        raise ValueError
    numbers = tuple(float(rate) for rate in rates)
    if not all(number >= 0 and math.isfinite(number) for number in numbers):
        raise ValueError
    return numbers


def _block_numbers(value: object) -> object:
    """Returns numbers from 0 in ascending order. How many blocks the U-Net has is known only when it is loaded."""
    texts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    numbers = sorted({int(str(text)) for text in texts if str(text).strip()})
    if not numbers or numbers[0] < 0:
        raise ValueError
    return tuple(numbers)


def _patterns(value: object) -> object:
    """Returns patterns of names, of a text of several or of a list."""
    texts = value.split(",") if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ValueError
    patterns = tuple(text.strip() for text in texts if text.strip())
    if not patterns:
        raise ValueError
    return patterns


METADATA = ("path", "caption", "tags", "score", "image_size", "width", "height", "train_resolution")
"""Values that columns of a metadata file hold."""


def _metadata_columns(value: object) -> object:
    """Returns texts `what=name`, of a text of several or of a list."""
    texts = value.split(",") if isinstance(value, str) else value
    pairs = [text.partition("=") for text in texts]  # type: ignore[attr-defined]
    columns = {what.strip(): name.strip() for what, _, name in pairs}
    if unknown := [what for what in columns if what not in METADATA]:
        raise Refused(f"{unknown[0]!r} is none of the names before the equals sign")
    if unnamed := [what for what, name in columns.items() if not name]:
        raise Refused(f"{unnamed[0]} has no name after it")
    if not columns or len(columns) < len(pairs):
        raise Refused("one of them is given twice")
    return tuple(f"{what}={name}" for what, name in columns.items())


def _tag_groups(value: object) -> object:
    """Returns the path or address of a file, or the JSON text of a table of lists of tags by tag."""
    if isinstance(value, Path | Address) or (isinstance(value, str) and not value.lstrip().startswith("{")):
        return _location(value)
    groups = parse_json(value) if isinstance(value, str) else value
    if not isinstance(groups, dict):
        raise ValueError
    if wrong := [tag for tag, tags in groups.items() if not _are_tags(tags)]:
        raise Refused(f"what {wrong[0]!r} stands for is neither a text nor a list of texts")
    return json.dumps(groups, ensure_ascii=False)


def _are_tags(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(tag, str) for tag in value))


def _schedule(value: Any) -> Any:
    name, colon, rate = value.partition(":")
    is_adafactor = name == "adafactor" and (not colon or 0 <= float(rate) < math.inf)
    if value not in LR_SCHEDULES and not is_adafactor:
        raise ValueError
    return value


def parsed(parse: Callable[[Any], Any]) -> BeforeValidator:
    """Returns a validator that refuses a value if `parse` fails in any way. It passes on the reason of Refused."""

    def check(value: object) -> object:
        try:
            return parse(value)
        except Refused:
            raise
        except Exception:
            raise ValueError from None

    return BeforeValidator(check)


def _path(value: object) -> object:
    if isinstance(value, str) and any(ord(letter) < 32 for letter in value):  # "C:\train" holds a tab
        raise Refused("in double quotes a backslash begins an escape: use single quotes, or /")
    return Path(value) if isinstance(value, str) else value


def _location(value: object) -> object:
    path = _path(value)
    if not isinstance(path, Path | Address):
        raise ValueError
    try:
        return parse_location(value) if isinstance(value, str) else path
    except ValueError as error:
        raise Refused(str(error)) from None


FilePath = Annotated[Path, BeforeValidator(_path), Shown("a path")]
Resolution = Annotated[tuple[int, int], parsed(_resolution), Shown('pixels, as 1024 or "1024,768"')]
FaceRange = Annotated[
    tuple[float, float], parsed(_face_range), Shown('two numbers above 0, the smaller one first, as "2.0,4.0"')
]
StepsOrShare = Annotated[
    int | float, parsed(_steps_or_share), Shown('a whole number of steps, or a share of all steps as 0.1 or "10%"')
]
FileLocation = Annotated[
    Path | InstanceOf[Address], BeforeValidator(_location), Shown("a path, or an address as s3://bucket/folder")
]
MetadataColumns = Annotated[
    tuple[str, ...], parsed(_metadata_columns), Shown(f'pairs as "path=key,score=aesthetic", of {", ".join(METADATA)}')
]
Arguments = Annotated[dict[str, Any], parsed(_arguments), Shown('a list as ["betas=0.9,0.99", "eps=1e-8"]')]
BlockRates = Annotated[
    tuple[float, ...], parsed(_block_rates), Shown('a learning rate for each block, as "1e-5,1e-5,..."')
]
BlockNumbers = Annotated[tuple[int, ...], parsed(_block_numbers), Shown('numbers of blocks, as "0,1,22"')]
Patterns = Annotated[tuple[str, ...], parsed(_patterns), Shown('names with wildcards, as "*.attn2.*,label_emb.*"')]
TagGroups = Annotated[
    Path | InstanceOf[Address] | str,
    parsed(_tag_groups),
    Shown("""a path, an address, or a table as {"hatsune miku" = ["aqua hair", "twintails"]}""", is_table=True),
]
Scheduler = Annotated[
    str, parsed(_schedule), Shown("one of " + ", ".join(LR_SCHEDULES) + ", adafactor, adafactor:RATE")
]
ChunkTokens = BeforeValidator(
    lambda value: 75 if value is None else value - value % 75 if type(value) is int and value > 75 else value
)
"""The reference reads whole chunks of 75 tokens, 255 as 225, and an unset length as one chunk."""
FLOAT_NAMES = {"fp32": "float", "float32": "float", "no": None}
"""Names of float32 that configs use in place of `float`. The reference reads `no` as an unset precision."""
Precision = BeforeValidator(lambda value: FLOAT_NAMES.get(value, value) if isinstance(value, str) else value)
Backend = BeforeValidator(lambda value: "inductor" if isinstance(value, str) and value.lower() == "no" else value)
"""GUIs write "no" for what they pass to a launcher. `torch_compile` alone decides if anything is compiled."""
ZeroIsOne = BeforeValidator(lambda value: 1 if type(value) is int and value == 0 else value)
"""GUIs write 0 for a batch size that the user has left alone."""
Period = BeforeValidator(lambda value: None if type(value) is int and value <= 0 else value)
"""The reference reads a preview period of 0 or less as "never"."""


def kinds(field: FieldInfo) -> list[Any]:
    """Returns the types of an option's value without None. A kind of this module is given as its `Shown`."""

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
    """Describes in words what an option takes, for example "a whole number of at least 1"."""
    (kind,) = kinds(field)
    if isinstance(kind, Shown):
        return kind.text
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(kind))
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}[kind]
    limits = {type(note).__name__.lower(): note for note in field.metadata}
    least, above, most, below = (getattr(limits.get(name), name, None) for name in ("ge", "gt", "le", "lt"))
    if below is not None:
        return f"{words} from {least} to below {below}"
    if most is not None:
        return f"{words} above {above}, at most {most}" if least is None else f"{words} from {least} to {most}"
    if least is not None or above is not None:
        return f"{words} above {above}" if least is None else f"{words} of at least {least}"
    return f"{words} that is not empty" if "minlen" in limits else words


def plain(value: Any) -> Any:
    """Returns an option's value as a config file holds it, in a form that the reference reads as well."""
    match value:
        case Path() | Address():
            return str(value)
        case dict():
            return [f"{name}={argument!r}" for name, argument in value.items()]
        case tuple():
            return ",".join(str(part) for part in value)
    return value
