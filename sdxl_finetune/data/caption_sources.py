"""The texts that may become an image's caption: reading them, and choosing one.

Without `caption_sources` an image has one text, from its caption file or metadata entry. With `caption_sources` it has
one text for each source, in the option's order. The text of a source that the image lacks is None. An empty text counts
as lacking.
"""

import bisect
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from sdxl_finetune.config.dataset import Subset
from sdxl_finetune.data.faces import FACE_NAME
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.parsing import parse_json

Texts = Sequence[str | None]
"""The text of each source, or of the only source; None for a source that the image lacks."""

LARGEST_TEXT = 1 << 20
"""Bytes: a larger file is no caption."""


class Chosen(NamedTuple):
    """The text that becomes the caption."""

    text: str
    whole: bool
    """True if the source is no list of tags."""


def choose_text(options: Subset, texts: Texts, draw: Callable[[], float]) -> Chosen:
    """Chooses the text that becomes the caption. `draw` gives a number from 0 to 1, and is called only for a choice.

    The weights of the sources that the image has are scaled to a sum of 1. If `draws_source` is off, the heaviest
    source wins, and the first of several. An image without any text has its `class_tokens`, or "".
    """
    found = [(text, place) for place, text in enumerate(texts) if text is not None]
    if not found:
        return Chosen(options.class_tokens or "", whole=False)
    if options.caption_sources is None:
        return Chosen(found[0][0], whole=False)
    weights = [options.caption_sources[place].weight for _, place in found]
    chosen = weights.index(max(weights))
    if len(found) > 1 and options.draws_source:
        ends = list(itertools.accumulate(weights))
        chosen = min(bisect.bisect_right(ends, draw() * ends[-1]), len(found) - 1)
    text, place = found[chosen]
    return Chosen(text, options.caption_sources[place].whole)


def caption_paths(image: str, options: Subset) -> list[str]:
    """The paths where files with an image's caption may be, in the order in which they are tried.

    Paths are text here, because the scan calls this for millions of images, and Path is ten times slower.
    """
    endings = ["." + options.caption_extension.removeprefix(".")]
    if options.caption_sources:
        endings = list(dict.fromkeys(source.ending for source in options.caption_sources if source.is_file))
    return [path for ending in endings for path in _paths(image, ending)]


def _paths(image: str, ending: str) -> list[str]:
    folder, name = os.path.split(os.path.splitext(image)[0])  # noqa: PTH122
    stems = [name]
    if face := FACE_NAME.fullmatch(name):
        stems.append(face.group(1))
    return [os.path.join(folder, stem + ending) for stem in stems]  # noqa: PTH118


def read_caption(image: Path, options: Subset) -> str:
    """Reads the caption file beside `image`: all its lines, stripped, without empty lines.

    Without a caption file the result is the subset's `class_tokens`, or "". A face cutout
    (`name_100_200_30_40.png`) may share the caption file of `name`. `caption` chooses the line later.

    Raises UserError for a file that cannot be read or is not UTF-8.

    The reference's function is read_caption of DreamBoothDataset. We differ: a byte order mark is not text, an empty
    first line does not make the caption empty, and an empty file is not an error.
    """
    for path in caption_paths(str(image), options):
        if (content := _read_file(path)) is not None:
            return clean_lines(_decode(content, path))
    return options.class_tokens or ""


def read_texts(image: Path, options: Subset) -> Texts:
    """Reads the text of each caption source of an image from the files beside the image. Each file is read once.

    Sources that are keys have no text here. Without `caption_sources` the only text is that of the caption file. Raises
    UserError for a file that cannot be read.
    """
    if not options.caption_sources:
        return (read_caption(image, options),)
    files: dict[str, _CaptionFile | None] = {}
    texts: list[str | None] = []
    for source in options.caption_sources:
        if source.is_file and source.ending not in files:
            found = ((path, _read_file(path)) for path in _paths(str(image), source.ending))
            files[source.ending] = next((_CaptionFile(path, content) for path, content in found if content), None)
        file = files.get(source.ending) if source.is_file else None
        texts.append(None if file is None else file.text_of_key(source.key) if source.key else file.text)
    return tuple(texts)


def clean_lines(text: str) -> str:
    """The lines of a text, stripped, without empty lines."""
    return "\n".join(stripped for line in text.replace("\r", "\n").split("\n") if (stripped := line.strip()))


def _read_file(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:  # noqa: PTH123 (Path is slower, and there may be millions)
            content = file.read(LARGEST_TEXT + 1)
    except (FileNotFoundError, IsADirectoryError):
        return None
    except OSError as error:
        message = f"the caption file cannot be read ({error}): check its permissions"
        raise UserError(Problem(message, file=path)) from error
    if len(content) > LARGEST_TEXT:
        message = f"the file has more than {LARGEST_TEXT} bytes, which no caption has: check caption_extension"
        raise UserError(Problem(message, file=path))
    return content


def _decode(content: bytes, path: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"the caption is not UTF-8 (byte {error.start}): save it as UTF-8"
        raise UserError(Problem(message, file=path)) from error


@dataclass(frozen=True)
class _CaptionFile:
    """A file beside an image that holds texts of a caption set."""

    path: str
    content: bytes

    @property
    def text(self) -> str | None:
        """The whole file as one text."""
        return clean_lines(_decode(self.content, self.path)) or None

    def text_of_key(self, key: str) -> str | None:
        """The text under a key of a JSON file. A list of texts becomes one text, joined by commas."""
        value = self._values.get(key)
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            value = ", ".join(value)
        if value is not None and not isinstance(value, str):
            raise UserError(Problem(f"{key} must be a text or a list of texts: correct the file", file=self.path))
        text = clean_lines(value or "")
        try:
            text.encode()
        except UnicodeEncodeError:
            message = f"{key} is no valid Unicode, it holds half of a surrogate pair: correct the file"
            raise UserError(Problem(message, file=self.path)) from None
        return text or None

    @cached_property
    def _values(self) -> dict[str, Any]:
        try:
            values = parse_json(_decode(self.content, self.path))
        except ValueError as error:
            message = f"the caption file is not valid JSON ({error}): correct it"
            raise UserError(Problem(message, file=self.path)) from None
        if not isinstance(values, dict):
            raise UserError(Problem("the caption file must hold one JSON object: correct it", file=self.path))
        return values
