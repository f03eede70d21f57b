"""Lists the images of each subset, from its folder or its metadata file, and says what else lies in the folder.

Only names are looked at, because a folder may hold millions of files. The scan opens images and captions later.
"""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from sdxl_finetune.config.dataset import OPTIONAL_SUFFIXES, UNREAD_SUFFIXES, Subset, is_picture, unread_pictures
from sdxl_finetune.data.images import image_extensions
from sdxl_finetune.data.sources import Described, read_metadata
from sdxl_finetune.errors import Problem, UserError

logger = logging.getLogger(__name__)

CAPTION_SUFFIXES = (".txt", ".caption")
"""Usual endings of caption files."""


@dataclass(frozen=True)
class Listing:
    """The images of one subset, in order."""

    names: Sequence[str]
    described: Sequence[Described] | None = None
    """Captions and sizes from a metadata file; None if the folder was searched."""
    others: Counter[str] = field(default_factory=Counter)
    """Number of the other files in the folder by ending, in lower case."""


def list_all(subsets: Sequence[Subset]) -> list[Listing]:
    """Lists the images of all subsets. Raises UserError with the problems of all folders and metadata files."""
    listed = []
    problems: list[Problem] = []
    for subset in subsets:
        try:
            listed.append(_list(subset))
        except UserError as error:  # noqa: PERF203 (all problems are reported together)
            problems += error.problems
    if problems:
        raise UserError(problems)
    return listed


def _list(subset: Subset) -> Listing:
    if subset.metadata_file:
        described = dict(sorted(read_metadata(subset).items()))
        return Listing(list(described), list(described.values()))
    endings = image_extensions()
    names: list[str] = []
    others: Counter[str] = Counter()
    try:
        with os.scandir(subset.image_dir) as entries:
            for entry in entries:
                if is_picture(entry, endings):
                    names.append(entry.name)
                elif entry.name[0] != ".":
                    others[entry.name[entry.name.rfind(".") :].lower()] += 1
    except OSError as error:
        raise UserError(Problem(f"the folder cannot be listed: {error.strerror}", file=str(subset.image_dir))) from None
    pictures = unread_pictures({ending: others[ending] for ending in _unread(endings) if others[ending]})
    if not names:
        message = f"the folder holds no images ({' '.join(endings)}): put images there or remove it from the config"
        raise UserError(Problem(message + (pictures and f"; {pictures}"), file=str(subset.image_dir)))
    if pictures:
        logger.warning("%s: %s", subset.image_dir, pictures)
    return Listing(sorted(names), others=others)


def _unread(endings: Sequence[str]) -> list[str]:
    return [ending for ending in (*UNREAD_SUFFIXES, *OPTIONAL_SUFFIXES) if ending not in endings]


def say_missing_captions(subset: Subset, listing: Listing, missing: int) -> None:
    """Warns about images without a caption file, if the folder has caption files for some of them.

    The files may have another ending than `caption_extension`. A folder without caption files has its name as the
    caption of all its images, which the reference's users do on purpose.
    """
    own = "." + subset.caption_extension.removeprefix(".")
    there = {ending: listing.others[ending] for ending in CAPTION_SUFFIXES if ending != own and listing.others[ending]}
    if not missing or not (there or (subset.class_tokens and missing < len(listing.names))):
        return
    instead = f"have the caption {subset.class_tokens!r}" if subset.class_tokens else "have no caption"
    remedies = [f'{count} {ending} files are there (caption_extension = "{ending}")' for ending, count in there.items()]
    message = f"{missing} of {len(listing.names)} images have no {own} file and {instead}"
    logger.warning("%s: %s", subset.image_dir, "; ".join([message, *remedies]))
