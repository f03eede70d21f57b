"""Facts that only the author of a model knows, from a TOML file: `sdxl-model card --facts FILE`.

Every text may be written once, or once for each language: `disclaimer = {en = "...", zh = "..."}`.
"""

import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from sdxl_finetune.card.escaping import escape
from sdxl_finetune.config.quality_options import QualityTags
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.output.stages import Stage
from sdxl_finetune.parsing import parse_toml_text

Language = Literal["en", "zh"]


class Table(BaseModel):
    """A table of the file. Unknown keys are mistakes."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class InLanguages(Table):
    """A text in both languages."""

    en: str
    zh: str


def _is_text(value: Any) -> Any:
    if not isinstance(value, (str, dict, InLanguages)):
        raise ValueError('must be text, as "..." or {en = "...", zh = "..."}')
    return value


Text = Annotated[InLanguages | str, BeforeValidator(_is_text)]
"""A text for both languages, or one in each."""
Count = int | InLanguages | str
"""A number, or a text such as "more than 2,000"."""


class BaseFacts(Table):
    """The model that the first stage started from."""

    name: Text | None = None
    author: str | None = None
    license: Text | None = None
    url: str | None = None


class DataFacts(Table):
    """The training data."""

    images: Count | None = None
    style_tags: Count | None = None
    quality_tags: QualityTags | None = None
    """As the option of this name. For quality tags that stood in the caption files already."""
    description: Text | None = None
    """Where the images come from."""


class StageFacts(Table):
    """A stage of training. It corrects a recorded stage, or stands before the recorded ones."""

    name: Text
    recorded: str | None = None
    """Name of the recorded stage that this table is about. Default: the recorded stage of the same name, if any."""
    hardware: Text | None = None
    hours: float | None = Field(None, gt=0)
    images: Count | None = None
    steps: int | None = None
    epochs: float | None = None
    base: Text | None = None
    note: Text | None = None
    at_least: bool = False
    """True if the time of the first steps is not known, so that `hours` is too low."""


class Facts(Table):
    """The author's facts. What stands here wins over what the run recorded."""

    title: Text | None = None
    version: str | None = None
    published: str | None = None
    author: str | None = None
    license: Text | None = None
    description: Text | None = None
    usage_hint: Text | None = None
    guidance: float | None = Field(None, gt=0)
    """Highest guidance scale (CFG) to advise."""
    quality_first: Sequence[str] | None = None
    """Quality tags to put before a prompt."""
    advice: Sequence[Text] = ()
    """Further advice."""
    limits: Sequence[Text] = ()
    """Shortcomings of this version."""
    disclaimer: Text | None = None
    base: BaseFacts = BaseFacts()
    data: DataFacts = DataFacts()
    stages: Sequence[StageFacts] = ()


def load_facts(path: Path | None) -> Facts:
    """Loads the file, or returns no facts without one. Raises UserError with all mistakes in the file."""
    if path is None:
        return Facts()
    try:
        values = parse_toml_text(path.read_text(encoding="utf-8-sig"))
        return Facts.model_validate(values)
    except OSError as error:
        raise UserError(Problem(f"{error.strerror}: check the path", key="facts", value=str(path))) from None
    except ValidationError as error:
        raise UserError([_problem(path, mistake) for mistake in error.errors()]) from None
    except ValueError as error:
        message = f"is no TOML file: {error}. Repair it there"
        raise UserError(Problem(message, key="facts", value=str(path))) from None


def _problem(path: Path, mistake: Any) -> Problem:
    """Says what is wrong with one key of the file, and what to do."""
    places = [str(place) for place in mistake["loc"] if place not in ("InLanguages", "str", "int")]
    key, message = ".".join(places), mistake["msg"].removeprefix("Value error, ")
    if mistake["type"] == "extra_forbidden":
        tables: dict[str, type[Table]] = {"base": BaseFacts, "data": DataFacts, "stages": StageFacts}
        table = tables.get(places[0], Facts) if len(places) > 1 else Facts
        known = list(table.model_fields)
        near = difflib.get_close_matches(places[-1], known, n=1)
        message = f"unknown key: did you mean {near[0]}?" if near else f"unknown key: known are {', '.join(known)}"
    return Problem(message, key=key, file=str(path))


def all_stages(facts: Facts, recorded: Sequence[Stage]) -> list[StageFacts]:
    """The stages of the page in their order: those that only the author knows, then the recorded ones.

    A recorded stage takes the values of the author's stage that names it.
    """
    own = {_names(stage): stage for stage in facts.stages}
    known = [_of_record(stage) for stage in recorded]
    taken = {names for names in own for stage in known if stage.recorded in names}
    stages = [stage for names, stage in own.items() if names not in taken]
    for stage in known:
        said = next((one for names, one in own.items() if stage.recorded in names), None)
        stages.append(stage.model_copy(update=_said(said)) if said else stage)
    return stages


def _names(stage: StageFacts) -> tuple[str, ...]:
    """The names of the recorded stage that the author's stage may be about."""
    if stage.recorded is not None:
        return (stage.recorded,)
    return (stage.name.en, stage.name.zh) if isinstance(stage.name, InLanguages) else (stage.name,)


def _said(stage: StageFacts) -> dict[str, Any]:
    """The values that the author has set. The author's hours are those of the whole stage."""
    said = {name: getattr(stage, name) for name in stage.model_fields_set}
    return {"at_least": False, **said} if "hours" in said else said


def _of_record(stage: Stage) -> StageFacts:
    """The facts of a recorded stage. Its texts come from the file of the model, and are shown letter for letter."""
    seconds = sum(stage.seconds.values())
    hardware, base = ", ".join(filter(None, stage.seconds)), stage.base.name
    return StageFacts(
        name=escape(stage.name or ""),
        recorded=stage.name or "",
        hardware=escape(hardware) or None,
        hours=seconds / 3600 if 0 < seconds < math.inf else None,
        at_least=stage.unrecorded_steps > 0,
        images=stage.images if stage.images is not None else stage.images_with_repeats,
        steps=stage.steps,
        epochs=stage.epochs,
        base=escape(base) if base else None,
    )
