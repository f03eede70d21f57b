"""Caption sources: the texts of which one becomes the caption each time an image is used, in the option's grammar.

    caption_sources = "tags:0.6, caption_long:0.4"            keys of a metadata entry, columns of a Parquet file
    caption_sources = ".txt:0.7, .json#caption:0.3:whole"     files beside the image

A source that begins with a dot is a file with that ending. `#key` names the key of a JSON file. Any other source is the
name of a key or column. The number is the source's weight, 1 if it is left out. The word `whole` marks sentences, whose
parts between commas are no tags.
"""

import math
from dataclasses import dataclass
from typing import Annotated

from sdxl_finetune.config.fields import Refused, Shown, parsed


@dataclass(frozen=True)
class CaptionSource:
    """One text of a caption set."""

    name: str
    """`.txt`, `.json#key`, or the name of a key or column."""
    weight: float = 1.0
    """Share of the draws, relative to the weights of the other sources of the same image. Above 0."""

    whole: bool = False
    """True if the text is no list of tags: it is never shuffled, and tag dropout and tag warm-up leave it alone."""

    def __str__(self) -> str:
        return f"{self.name}:{self.weight!r}" + (":whole" if self.whole else "")

    @property
    def is_file(self) -> bool:
        """True for a file beside the image, False for a key of a metadata entry or a column."""
        return self.name.startswith(".")

    @property
    def ending(self) -> str:
        """Ending of the file beside the image, as `.txt`."""
        return self.name.partition("#")[0]

    @property
    def key(self) -> str:
        """Key of the JSON file beside the image. Empty for a file that is text as a whole."""
        return self.name.partition("#")[2]


def read_sources(value: object) -> tuple[CaptionSource, ...]:
    """Returns the sources of a text or of a list of texts, in order. Raises ValueError for anything else."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not parts:
        raise ValueError
    sources = tuple(part if isinstance(part, CaptionSource) else _read_source(part) for part in parts)
    names = [source.name for source in sources]
    if twice := [name for name in names if names.count(name) > 1]:
        raise Refused(f"{twice[0]} is named twice")
    return sources


def _read_source(text: str) -> CaptionSource:
    name, *rest = (part.strip() for part in text.split(":"))
    is_whole = rest[-1:] == ["whole"]
    weight, *others = rest[: len(rest) - is_whole] or ["1"]
    try:
        source = CaptionSource(name, float(weight), is_whole)
    except ValueError:
        raise Refused(f"{weight!r} of {text.strip()!r} is no weight") from None
    if others:
        raise Refused(f"{text.strip()!r} has more than a name, a weight and the word whole")
    if not 0 < source.weight < math.inf:
        raise Refused(f"the weight of {name!r} is not above 0")
    if not name.strip("."):
        raise Refused(f"{text.strip()!r} names no source")
    if source.is_file and set(source.ending) & set("/\\"):
        raise Refused(f"{name!r} is a path, and a file beside the image is named by its ending")
    needs_key = source.is_file and source.ending.lower() == ".json"
    if source.is_file and needs_key and not source.key:
        raise Refused(f"{name!r} needs a key, as .json#caption")
    if source.is_file and source.key and not needs_key:
        raise Refused(f"{name!r} has a key, and only .json files have keys")
    return source


CaptionSources = Annotated[
    tuple[CaptionSource, ...],
    parsed(read_sources),
    Shown('sources with weights, as ".txt:0.7, .json#caption:0.3" for files or "tags:0.6, caption:0.4" for keys'),
]
