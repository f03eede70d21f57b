"""Reads metadata files: names, captions and tags of images, in the format of the reference's `in_json`.

    {"cat.jpg": {"caption": "a cat", "tags": "1cat, sitting"}, ...}                     .json
    {"image_path": "cat.jpg", "caption": "a cat", "tags": "1cat, sitting"}              .jsonl, a line each

Names are absolute paths or paths below the subset's folder, with or without the file's ending. Sizes in the file
(image_size and train_resolution) are not used, because the size is read from the image's header.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdxl_finetune.config.dataset import Subset
from sdxl_finetune.data.images import image_extensions
from sdxl_finetune.errors import Problem, UserError

SHOWN = 20
"""Mistakes of one metadata file that are listed; more would hide the other messages."""


def read_metadata(subset: Subset) -> dict[str, str]:
    """Returns the captions of a subset's images by file name.

    Raises UserError for a file that cannot be read, for malformed entries, and for names that fit no image or several.
    """
    path = subset.metadata_file
    assert path is not None
    problems: list[str] = []
    captions: dict[str, str] = {}
    stems: dict[Path, dict[str, list[str]]] = {}
    endings = image_extensions()
    try:
        for place, name, entry in _entries(path):
            try:
                captions[_file_name(subset, name, endings, stems)] = _caption(subset, entry)
            except ValueError as error:  # noqa: PERF203 (all mistakes are reported together)
                problems.append(f"{place}: {error}")
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(Problem(f"not valid JSON ({error}): correct the file", file=str(path))) from None
    except OSError as error:
        raise UserError(Problem(f"the file cannot be read: {error.strerror}", file=str(path))) from None
    if not captions and not problems:
        problems.append("the file names no images: give one with entries")
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise UserError([Problem(problem, file=str(path)) for problem in [*problems[:SHOWN], *more]])
    return captions


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
                if entry.name.lower().endswith(endings):
                    found[os.path.splitext(entry.name)[0]].append(entry.name)  # noqa: PTH122 (millions)
    return found


def _caption(subset: Subset, entry: Any) -> str:
    """The caption, then the tags. With enable_wildcard the tags follow each line of the caption.

    The reference's code is `FineTuningDataset.__init__`. There, tags without a caption are lost with enable_wildcard.
    """
    if not isinstance(entry, dict):
        raise ValueError("the entry must be an object with caption or tags")
    caption, tags = (entry.get(key) or "" for key in ("caption", "tags"))
    if not isinstance(caption, str) or not isinstance(tags, str):
        raise ValueError("caption and tags must be texts")
    if not tags:
        return caption
    if not subset.enable_wildcard:
        return f"{caption}{subset.caption_separator}{tags}" if caption else tags
    tags = tags.replace("\n", subset.caption_separator)
    lines = [line for line in caption.split("\n") if line.strip()]
    return "\n".join(f"{line}{subset.caption_separator}{tags}" for line in lines) or tags
