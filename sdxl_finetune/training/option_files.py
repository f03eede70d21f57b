"""Digests of the files that options name. A training state saves them, so that a resumed run can say what has changed.

Files whose effect the index knows, such as images, captions and `image_weights`, are compared by the index.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdxl_finetune.config import Config
from sdxl_finetune.config.reading import parse_toml
from sdxl_finetune.errors import UserError
from sdxl_finetune.output.metadata import shareable
from sdxl_finetune.parsing import parse_json
from sdxl_finetune.storage import Address, Location, parse_location, read

TAG_RULES = ("protected_tags_file", "caption_tag_dropout_groups")
"""Options of a config or of a subset that name a file of tag rules."""


def saved_options(config: Config) -> dict[str, Any]:
    """The options that a training state saves: without secrets and paths, and with a digest of each file."""
    return shareable(config) | {f"content of {name}": digest for name, digest in _digests(config)}


def _digests(config: Config) -> Iterator[tuple[str, str]]:
    """Yields each option that names a file, and a digest of the file. Other checks report a missing file."""
    for name in ("dataset_config", *TAG_RULES):
        path = getattr(config, name)
        if isinstance(path, Address) or (isinstance(path, Path) and path.is_file()):
            files = [path, *(_named_in(path) if isinstance(path, Path) and name == "dataset_config" else ())]
            content = b"\0".join(read(file) for file in files)
            yield name, hashlib.blake2b(content, digest_size=4).hexdigest()


def _named_in(path: Path) -> Iterator[Location]:
    """Yields the files of tag rules that a `dataset_config` file names, in order."""
    try:
        content = parse_json(path.read_bytes()) if path.suffix.lower() == ".json" else parse_toml(path)[0]
    except (ValueError, UserError):
        return
    tables = [content] if isinstance(content, dict) else []
    while tables:
        for name, value in tables.pop().items():
            tables += [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, dict)]
            if name in TAG_RULES and isinstance(value, str) and not value.lstrip().startswith("{"):
                place = parse_location(value)
                if isinstance(place, Address) or place.is_file():
                    yield place
