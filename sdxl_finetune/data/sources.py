"""Reads metadata files: names, captions and tags of images, in the format of the reference's `in_json`.

    {"cat.jpg": {"caption": "a cat", "tags": "1cat, sitting"}, ...}                     .json
    {"image_path": "cat.jpg", "caption": "a cat", "tags": "1cat, sitting"}              .jsonl, a line each

Names are absolute paths or paths below the subset's folder, with or without the file's ending. An entry may hold two
sizes, each [width, height] in pixels. `image_size` is the size of the image, which then need not be opened to place it
in a bucket. `train_resolution` is the size of its bucket, which is used if `resolution` is not set.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sdxl_finetune.config.dataset import Subset, is_picture
from sdxl_finetune.data.images import image_extensions
from sdxl_finetune.errors import Problem, UserError

SHOWN = 20
"""Mistakes of one metadata file that are listed; more would hide the other messages."""


class Described(NamedTuple):
    """Caption and sizes of one image in a metadata file. Sizes are (width, height) in pixels, or None."""

    caption: str
    size: tuple[int, int] | None = None
    bucket: tuple[int, int] | None = None


def read_metadata(subset: Subset) -> dict[str, Described]:
    """Returns what the metadata file of a subset says of its images, by file name.

    Raises UserError for a file that cannot be read, for malformed entries, and for names that fit no image or several.
    """
    path = subset.metadata_file
    assert path is not None
    problems: list[str] = []
    described: dict[str, Described] = {}
    stems: dict[Path, dict[str, list[str]]] = {}
    endings = image_extensions()
    try:
        for place, name, entry in _entries(path):
            try:
                described[_file_name(subset, name, endings, stems)] = _described(subset, entry)
            except ValueError as error:  # noqa: PERF203 (all mistakes are reported together)
                problems.append(f"{place}: {error}")
    except UnicodeDecodeError as error:
        message = f"not a UTF-8 text file (byte {error.start}): save it as UTF-8"
        raise UserError(Problem(message, file=str(path))) from None
    except json.JSONDecodeError as error:
        raise UserError(Problem(f"not valid JSON ({error}): correct the file", file=str(path))) from None
    except OSError as error:
        raise UserError(Problem(f"the file cannot be read: {error.strerror}", file=str(path))) from None
    if not described and not problems:
        problems.append("the file names no images: give one with entries")
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise UserError([Problem(problem, file=str(path)) for problem in [*problems[:SHOWN], *more]])
    return described


def _entries(path: Path) -> Iterator[tuple[str, Any, Any]]:
    """Yields the place of each entry for messages, the name of its image, and the entry."""
    if path.suffix.lower() == ".jsonl":
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    entry = json.loads(line)
                    yield f"line {number}", entry.get("image_path") if isinstance(entry, dict) else None, entry
        return
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(content, dict):
        raise UserError(
            Problem(
                "the top level must be an object of images by name; a list of lines needs the ending .jsonl",
                file=str(path),
            )
        )
    for name, entry in content.items():
        yield repr(name), name, entry


def _file_name(subset: Subset, name: Any, endings: tuple[str, ...], stems: dict[Path, dict[str, list[str]]]) -> str:
    """The image's file name with its ending. Raises ValueError."""
    if not isinstance(name, str) or not name:
        raise ValueError("the entry has no image_path")
    try:
        if b"\0" in os.fsencode(name):
            raise ValueError("a file name cannot hold a null character")
    except UnicodeEncodeError:
        raise ValueError("the name cannot be a file name, because it is no valid Unicode") from None
    if name.lower().endswith(endings):
        return name
    full = subset.image_dir / name
    if full.parent not in stems:
        stems[full.parent] = _stems(full.parent, endings)
    found = stems[full.parent].get(full.name, [])
    if len(found) != 1:
        raise ValueError(f"no image {full}.*" if not found else f"several images {full}.*: {', '.join(found)}")
    return str(Path(name).with_name(found[0]))


def _stems(folder: Path, endings: tuple[str, ...]) -> dict[str, list[str]]:
    """The image files of a folder, by their names without ending."""
    found = defaultdict(list)
    if folder.is_dir():
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_picture(entry, endings):
                    found[os.path.splitext(entry.name)[0]].append(entry.name)  # noqa: PTH122 (millions)
    return found


def _described(subset: Subset, entry: Any) -> Described:
    """Raises ValueError for an entry that is malformed."""
    if not isinstance(entry, dict):
        raise ValueError("the entry must be an object with caption or tags")
    caption, tags = (entry.get(key) or "" for key in ("caption", "tags"))
    if not isinstance(caption, str) or not isinstance(tags, str):
        raise ValueError("caption and tags must be texts")
    text = _caption(subset, caption, tags)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("caption or tags are no valid Unicode: they hold half of a surrogate pair") from None
    return Described(text, *(_sides(entry, key) for key in ("image_size", "train_resolution")))


def _sides(entry: dict[str, Any], key: str) -> tuple[int, int] | None:
    sides = entry.get(key)
    if sides is None:
        return None
    if not isinstance(sides, list) or len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError(f"{key} must be [width, height] in pixels")
    return sides[0], sides[1]


def _caption(subset: Subset, caption: str, tags: str) -> str:
    """The caption, then the tags. With enable_wildcard the tags follow each line of the caption.

    The reference's code is `FineTuningDataset.__init__`. There, tags without a caption are lost with enable_wildcard.
    """
    if not tags:
        return caption
    if not subset.enable_wildcard:
        return f"{caption}{subset.caption_separator}{tags}" if caption else tags
    tags = tags.replace("\n", subset.caption_separator)
    lines = [line for line in caption.split("\n") if line.strip()]
    return "\n".join(f"{line}{subset.caption_separator}{tags}" for line in lines) or tags
