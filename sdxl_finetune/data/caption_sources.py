"""The texts that may become an image's caption: reading them, and choosing one.

Without `caption_sources` an image has one text, from its caption file or metadata entry. With `caption_sources` it has
one text for each source, in the option's order. The text of a source that the image lacks is None. An empty text counts
as lacking.
"""

import bisect
import itertools
import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdxl_finetune.config.caption_sources import CaptionSource
from sdxl_finetune.config.dataset import Subset
from sdxl_finetune.data.faces import FACE_NAME
from sdxl_finetune.errors import Problem, UserError

Texts = Sequence[str | None]
"""The text of each source, or of the only source; None for a source that the image lacks."""


def choose_text(options: Subset, texts: Texts, draw: Callable[[], float]) -> str:
    """Chooses the text that becomes the caption. `draw` gives a number from 0 to 1, and is called only for a choice.

    The weights of the sources that the image has are scaled to a sum of 1. If `draws_source` is off, the heaviest
    source wins, and the first of several. An image without any text has its `class_tokens`, or "".
    """
    found = [place for place, text in enumerate(texts) if text is not None]
    if not found:
        return options.class_tokens or ""
    chosen = found[0]
    if len(found) > 1:
        assert options.caption_sources is not None
        weights = [options.caption_sources[place].weight for place in found]
        if options.draws_source:
            ends = list(itertools.accumulate(weights))
            chosen = found[min(bisect.bisect_right(ends, draw() * ends[-1]), len(found) - 1)]
        else:
            chosen = found[weights.index(max(weights))]
    text = texts[chosen]
    assert text is not None
    return text


def draw_text(options: Subset, texts: Texts, rng: random.Random) -> str:
    """Draws one of the texts. An image with one text draws no number, as before there were several."""
    return choose_text(options, texts, rng.random)


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


def read_texts(image: Path, options: Subset, described: Texts | None = None) -> Texts:
    """Reads the text of each caption source of an image, from the files beside the image.

    `described` holds the texts of the sources that a metadata entry gives. Without `caption_sources` the only text is
    that of the caption file. Raises UserError for a file that cannot be read.
    """
    if not options.caption_sources:
        return described or (read_caption(image, options),)

    def load(ending: str) -> tuple[str, bytes] | None:
        for path in _paths(str(image), ending):
            if (content := _read_file(path)) is not None:
                return path, content
        return None

    return texts_of_files(options.caption_sources, load, described)


def texts_of_files(
    sources: Sequence[CaptionSource], load: Callable[[str], tuple[str, bytes] | None], described: Texts | None = None
) -> Texts:
    """Returns the text of each source, of the files that `load` finds by their ending, as `.txt`.

    `load` returns a file's name and content, or None. Each file is loaded once. The other sources keep their text in
    `described`. Raises UserError for a file that is not UTF-8 or not JSON.
    """
    files = {source.ending: load(source.ending) for source in sources if source.is_file}
    contents: dict[str, Any] = {}
    texts: list[str | None] = []
    for place, source in enumerate(sources):
        if not source.is_file:
            texts.append(described[place] if described else None)
        elif (file := files[source.ending]) is None:
            texts.append(None)
        elif not source.key:
            texts.append(clean_lines(_decode(file[1], file[0])) or None)
        else:
            if source.ending not in contents:
                contents[source.ending] = _parse_json(file[1], file[0])
            texts.append(_text_of_key(contents[source.ending], source.key, file[0]))
    return tuple(texts)


def texts_of_entry(options: Subset, entry: Mapping[str, Any]) -> Texts:
    """Returns the text of each source in an entry of a metadata file. Sources that are files have None.

    A list of texts becomes one text, joined by the separator of tags. Raises ValueError for a value that is no text.
    """
    sources = options.caption_sources or ()
    separator = f"{options.caption_separator.rstrip()} "
    return tuple(
        None if source.is_file else text_of_value(entry.get(source.name), source.name, separator) for source in sources
    )


def text_of_value(value: object, key: str, separator: str = ", ") -> str | None:
    """Returns the text of a value of an entry: a text, a list of texts, or None. Raises ValueError for other values."""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = separator.join(value)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{key} must be a text or a list of texts")
    text = clean_lines(value or "")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{key} is no valid Unicode: it holds half of a surrogate pair") from None
    return text or None


def clean_lines(text: str) -> str:
    """The lines of a text, stripped, without empty lines."""
    return "\n".join(stripped for line in text.replace("\r", "\n").split("\n") if (stripped := line.strip()))


def _read_file(path: str) -> bytes | None:
    try:
        return Path(path).read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        return None
    except OSError as error:
        message = f"the caption file cannot be read ({error}): check its permissions"
        raise UserError(Problem(message, file=path)) from error


def _decode(content: bytes, path: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"the caption is not UTF-8 (byte {error.start}): save it as UTF-8"
        raise UserError(Problem(message, file=path)) from error


def _parse_json(content: bytes, path: str) -> Any:
    try:
        return json.loads(_decode(content, path))
    except ValueError as error:
        raise UserError(Problem(f"the caption file is not valid JSON ({error}): correct it", file=path)) from None


def _text_of_key(content: Any, key: str, path: str) -> str | None:
    if not isinstance(content, dict):
        raise UserError(Problem("the caption file must hold one JSON object: correct it", file=path))
    try:
        return text_of_value(content.get(key), key)
    except ValueError as error:
        raise UserError(Problem(f"{error}: correct the file", file=path)) from None
