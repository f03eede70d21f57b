"""Texts that stand beside an image: in a tar file, members of the same name; in an object store, objects.

A text is named as in `caption_sources`: `.txt` is a file as a whole, `.json#key` the text under a key of a JSON file. A
JSON file may also hold a score and the image's size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute

from sdxl_finetune.config.dataset import Subset
from sdxl_finetune.data.caption_sources import LARGEST_TEXT, clean_lines
from sdxl_finetune.data.sources.chunks import as_lists, column_names, joined_captions, without_empty
from sdxl_finetune.data.sources.entries import score_of
from sdxl_finetune.parsing import parse_json

USUAL_TEXTS = (".txt", ".caption", ".json#caption", ".json#tags")
"""Texts of a WebDataset tar file that may be the caption."""


@dataclass(frozen=True)
class Wanted:
    """Which texts and values of the files beside an image are read."""

    texts: tuple[str, ...]
    score: str = "score"
    """Key of a JSON file."""
    image_size: str = "image_size"
    """Key of a JSON file, [width, height]. `width` and `height` are read as well."""

    @property
    def endings(self) -> frozenset[str]:
        """Endings of the files, in lower case."""
        return frozenset(text.partition("#")[0].lower() for text in self.texts)

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the JSON file whose texts are read."""
        return tuple(text.partition("#")[2] for text in self.texts if "#" in text)


@dataclass
class Texts:
    """Texts and values from the files beside one image."""

    texts: dict[str, str] = field(default_factory=dict)
    score: float | None = None
    size: tuple[int, int] | None = None


def wanted_of(subset: Subset, *, in_tars: bool) -> Wanted:
    """Returns the texts and values that a subset needs of the files beside its images."""
    given = column_names(subset)
    texts = dict.fromkeys(_names(subset, in_tars=in_tars))
    return Wanted(tuple(texts), given.get("score", "score"), given.get("image_size", "image_size"))


def _names(subset: Subset, *, in_tars: bool) -> list[str]:
    """The name of the text of each caption source. Without caption sources: of each text that may be the caption."""
    given = column_names(subset)
    if subset.caption_sources:
        names = [source.name if source.is_file else f".json#{source.name}" for source in subset.caption_sources]
    else:
        names = ["." + subset.caption_extension.removeprefix("."), *(USUAL_TEXTS if in_tars else ())]
    parts = (name.partition("#") for name in names)
    return [f"{ending}#{given.get(key, key)}" if key else ending for ending, _, key in parts]


def captions_of(subset: Subset, texts: Mapping[str, pa.Array]) -> pa.LargeListArray:
    """The captions of images by the texts beside them, which are named as in `wanted_of`.

    Without caption sources an image has the first text that is there, else the subset's class_tokens.
    """
    if subset.caption_sources:
        return as_lists([without_empty(texts[name]) for name in _names(subset, in_tars=False)])
    choices = [column for name, column in texts.items() if "#" not in name]
    if in_json := [column for name, column in texts.items() if "#" in name]:
        caption, tags = in_json
        is_there = pa.compute.or_(caption.is_valid(), tags.is_valid())
        choices.append(pa.compute.if_else(is_there, joined_captions(subset, caption, tags), None))
    return as_lists([pa.compute.coalesce(*choices, pa.scalar(subset.class_tokens or "", pa.large_string()))])


def read_text(ending: str, data: bytes, wanted: Wanted, beside: Texts) -> None:
    """Adds what a file of this ending holds. Raises ValueError for a file that cannot be used."""
    if len(data) > LARGEST_TEXT:
        raise ValueError(f"the text has {len(data)} bytes, more than {LARGEST_TEXT}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the caption is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    if ending != ".json":
        beside.texts[ending] = clean_lines(text)
        return
    try:
        entry = parse_json(text)
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error})") from None
    if not isinstance(entry, dict):
        raise ValueError("the JSON must be an object with caption or tags")
    for key in wanted.keys:
        if (value := _text(entry, key)) is not None:
            beside.texts[f".json#{key}"] = value
    beside.score = score_of(entry, wanted.score)
    beside.size = _size(entry, wanted.image_size)


def _text(entry: dict[str, Any], key: str) -> str | None:
    value = entry.get(key)
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = ", ".join(value)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{key} must be a text")
    try:
        (value or "").encode()
    except UnicodeEncodeError:
        raise ValueError(f"{key} is no valid Unicode: it holds half of a surrogate pair") from None
    return value


def _size(entry: dict[str, Any], key: str) -> tuple[int, int] | None:
    """The image's size. Sizes that are no numbers of pixels are not used, because the image itself has one."""
    sides = entry.get(key) or [entry.get("width"), entry.get("height")]
    fits = isinstance(sides, list) and len(sides) == 2 and all(type(side) is int and 0 < side < 2**31 for side in sides)
    return (sides[0], sides[1]) if fits else None
