"""Stages of training: what this run and the runs before it did. Checkpoints and training states carry them.

A model is often trained in several runs, each from the result of the one before. Each run is a stage. A run reads the
earlier stages from the file that it starts from, and adds its own. `sdxl-model card` writes them on the release page.
Nothing here names a machine, a user or a folder.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import PurePath
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from sdxl_finetune.parsing import parse_json

FIELD = "sdxl_finetune.stages"
"""Metadata field of a checkpoint that holds its stages as JSON, the first stage first."""


class BaseModelFacts(BaseModel):
    """The file that a stage started from, as the file itself says."""

    model_config = ConfigDict(frozen=True)

    name: str | None = None
    author: str | None = None
    license: str | None = None


class Stage(BaseModel):
    """One run of training, over all its interruptions. None: not known."""

    model_config = ConfigDict(frozen=True)

    name: str | None = None
    program: str | None = None
    """Name and version of the trainer."""
    base: BaseModelFacts = BaseModelFacts()
    started: str | None = None
    """Date, as 2024-10-05."""
    ended: str | None = None
    """Date of the last step."""
    seconds: Mapping[str, float] = {}
    """Seconds of training by hardware, as {"2 x NVIDIA A40": 7200.0}. Previews, validation and saves count."""
    steps: int | None = None
    """Optimizer steps of this stage."""
    unrecorded_steps: int = 0
    """The first steps of the stage whose time is not known. Older versions of this program recorded no time."""
    epochs: float | None = None
    """Epochs of this stage."""
    images: int | None = None
    """Different images that were trained on."""
    images_with_repeats: int | None = None
    held_out: int | None = None
    """Images that were held out for validation."""
    tags: Mapping[str, int] = {}
    """Number of different tags by the least number of images that have them, as {"1": 48213, "100": 3120}."""
    quality: Mapping[str, int] = {}
    """Images with each quality tag that the option `quality_tags` has set."""


class StageRecord:
    """The stages of a run that is training. The clock of the last stage runs from the construction on."""

    def __init__(
        self, earlier: Sequence[Stage], stage: Stage, hardware: str, count_tags: Callable[[], Mapping[str, int]]
    ) -> None:
        """`stage` is the run's own stage, with the seconds from before a resume. `count_tags` fills `Stage.tags`."""
        self._earlier, self._stage, self._hardware, self._count_tags = earlier, stage, hardware, count_tags
        self._tags_are_counted = False
        self._began = time.monotonic()

    def count_tags(self) -> None:
        """Counts the tags of all captions once. This takes seconds for millions of images."""
        if not self._tags_are_counted:
            self._stage = self._stage.model_copy(update={"tags": self._count_tags()})
            self._tags_are_counted = True

    def stages(self, *, steps: int, epochs: float) -> tuple[Stage, ...]:
        """All stages, the run's own one as it stands after this many steps and epochs."""
        before = self._stage.seconds.get(self._hardware, 0.0)
        seconds = round(before + time.monotonic() - self._began, 3)
        own = self._stage.model_copy(
            update={
                "seconds": {**self._stage.seconds, self._hardware: seconds},
                "steps": steps,
                "epochs": round(epochs, 2),
                "ended": datetime.now().date().isoformat(),
            }
        )
        return *self._earlier, own


def stages_json(stages: Iterable[Stage]) -> list[dict[str, Any]]:
    """The stages as values that JSON can hold. `parse_stages` reads them."""
    return [stage.model_dump(exclude_defaults=True) for stage in stages]


def parse_stages(values: Any) -> tuple[Stage, ...]:
    """Reads stages from what JSON held. What cannot be read gives no stages, because training does not need them."""
    try:
        return tuple(Stage.model_validate(value) for value in values or ())
    except (ValidationError, TypeError):
        return ()


def stages_of(metadata: Mapping[str, str]) -> tuple[Stage, ...]:
    """The stages that a checkpoint's metadata tells.

    Files of older versions of this program, and files with sd-scripts' fields `ss_*`, tell of one stage.
    """
    return recorded_stages(metadata) or _from_older_version(metadata) or _from_reference(metadata)


def recorded_stages(metadata: Mapping[str, str]) -> tuple[Stage, ...]:
    """The stages that this program has written into a checkpoint's metadata; none in other files."""
    try:
        return parse_stages(parse_json(metadata.get(FIELD, "[]")))
    except ValueError:
        return ()


def hardware_name(devices: Iterable[str]) -> str:
    """Names the hardware of a run: `["NVIDIA A40", "NVIDIA A40"]` is "2 x NVIDIA A40"."""
    names = list(devices)
    return ", ".join(
        name if names.count(name) == 1 else f"{names.count(name)} x {name}" for name in dict.fromkeys(names)
    )


def base_facts(metadata: Mapping[str, str], path: PurePath) -> BaseModelFacts:
    """The title, author and licence in a file's metadata. A file without a title has its file name, without folder."""
    title, author, license_ = (metadata.get(f"modelspec.{name}") for name in ("title", "author", "license"))
    return BaseModelFacts(name=title or path.stem, author=author, license=license_)


def _from_older_version(metadata: Mapping[str, str]) -> tuple[Stage, ...]:
    steps, epochs = (_number(metadata.get(f"sdxl_finetune.{name}")) for name in ("step", "epoch"))
    if steps is None:
        return ()
    program = f"sdxl_finetune {metadata.get('sdxl_finetune.version', '')}".rstrip()
    return (Stage(name=metadata.get("modelspec.title"), program=program, steps=int(steps), epochs=epochs),)


def _from_reference(metadata: Mapping[str, str]) -> tuple[Stage, ...]:
    """The run that sd-scripts describes in its fields `ss_*`; none without them.

    sd-scripts writes "None" for what it does not know. Its time runs from the start of the run, without pauses.
    """
    said = {name: value for name, value in metadata.items() if name.startswith("ss_") and value not in ("", "None")}
    began, ended = (_number(said.get(f"ss_training_{moment}_at")) for moment in ("started", "finished"))
    steps, epochs = (_number(said.get(f"ss_{name}")) for name in ("steps", "num_epochs"))
    if not said or (began is None and steps is None):
        return ()
    images, model = _number(said.get("ss_num_train_images")), said.get("ss_sd_model_name")
    return (
        Stage(
            name=said.get("ss_output_name"),
            program="sd-scripts",
            base=BaseModelFacts(name=PurePath(model.replace("\\", "/")).stem if model else None),
            started=_date(began),
            ended=_date(ended),
            seconds={"": ended - began} if began is not None and ended is not None else {},
            steps=None if steps is None else int(steps),
            epochs=epochs,
            images_with_repeats=None if images is None else int(images),
        ),
    )


def _number(text: str | None) -> float | None:
    """The number that a text says; None if it says none, or one that is not finite."""
    try:
        number = math.nan if text is None else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _date(seconds: float | None) -> str | None:
    try:
        return None if seconds is None else datetime.fromtimestamp(seconds, timezone.utc).date().isoformat()
    except (OSError, OverflowError, ValueError):  # beyond the years of a calendar
        return None
