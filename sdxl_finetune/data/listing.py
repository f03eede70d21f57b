"""Lists the images of each subset, from its folder or its metadata file, and says what else lies in the folder.

Every source of images gives one table with the columns of LISTED. A folder is only searched for names here, because it
may hold millions of files. The scan opens images and captions later.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from sdxl_finetune.config.dataset import (
    OPTIONAL_SUFFIXES,
    TAR_SUFFIX,
    UNREAD_SUFFIXES,
    Subset,
    holds_tars,
    unread_pictures,
)
from sdxl_finetune.data.images import image_extensions
from sdxl_finetune.data.sources.joining import joined
from sdxl_finetune.data.sources.listed import Listing, listed_table
from sdxl_finetune.data.sources.metadata import load_entries, read_metadata
from sdxl_finetune.data.sources.names import search_folder
from sdxl_finetune.data.sources.objects import read_objects
from sdxl_finetune.data.sources.tars import read_tars
from sdxl_finetune.errors import Problem, UserError

logger = logging.getLogger(__name__)

CAPTION_SUFFIXES = (".txt", ".caption")
"""Usual endings of caption files."""
COMPRESSED = (".gz", ".tgz")
"""Endings of compressed tar files, in which no image can be read by itself."""


def list_all(subsets: Sequence[Subset], cache_dir: Path) -> list[Listing]:
    """Lists the images of all subsets. Raises UserError with the problems of all folders and metadata files."""
    listed = []
    problems: list[Problem] = []
    for subset in subsets:
        try:
            listed.append(_list(subset, cache_dir))
        except UserError as error:  # noqa: PERF203 (all problems are reported together)
            problems += error.problems
    if problems:
        raise UserError(problems)
    return listed


def _list(subset: Subset, cache_dir: Path) -> Listing:
    folder = subset.image_dir
    if isinstance(folder, Path) and not subset.tar_files and not _is_folder_of_tars(subset, folder):
        if subset.metadata_file:
            return read_metadata(subset, folder)
        names, others = search_folder(folder, image_extensions())
        listing = Listing(listed_table({"name": names}), others)
        _check_found(subset, listing)
        return listing
    entries = load_entries(subset, beside=True) if subset.metadata_file else None
    if isinstance(folder, Path) or subset.tar_files:
        listing = read_tars(subset, cache_dir)
    else:
        with_texts = entries is None or entries.table["captions"].null_count > 0
        listing = read_objects(subset, folder, cache_dir, with_texts=with_texts)
        if not len(listing.table) and listing.others[TAR_SUFFIX]:
            listing = read_tars(subset, cache_dir)
    _check_found(subset, listing)
    return joined(subset, listing, entries) if entries else listing


def _is_folder_of_tars(subset: Subset, folder: Path) -> bool:
    """True for a folder of tar files without images. A metadata file may name images in folders beside tar files."""
    if subset.metadata_file:
        return folder != Path() and holds_tars(folder, without_folders=True)
    return holds_tars(folder)


def _check_found(subset: Subset, listing: Listing) -> None:
    """Raises UserError for a listing without images. Warns of pictures and tar files that are not read."""
    endings, others = image_extensions(), listing.others
    remarks = [unread_pictures({ending: others[ending] for ending in _unread(endings) if others[ending]})]
    if compressed := sum(others[ending] for ending in COMPRESSED):
        remarks.append(
            f"{compressed} compressed files ({' '.join(COMPRESSED)}) are not read: unpack tar files with gunzip"
        )
    if len(listing.table) and others[TAR_SUFFIX]:
        remarks.append(
            f"{others[TAR_SUFFIX]} .tar files are not read, because there are images: name them in image_dir"
        )
    remark = "; ".join(filter(None, remarks))
    if not len(listing.table) and not listing.problems:
        message = f"the folder holds no images ({' '.join(endings)}): put images there or remove it from the config"
        raise UserError(Problem(message + (remark and f"; {remark}"), file=str(subset.image_dir)))
    if remark:
        logger.warning("%s: %s", subset.image_dir, remark)


def _unread(endings: Sequence[str]) -> list[str]:
    return [ending for ending in (*UNREAD_SUFFIXES, *OPTIONAL_SUFFIXES) if ending not in endings]


def say_missing_captions(subset: Subset, listing: Listing, missing: int) -> None:
    """Warns about images without a caption file, if the folder has caption files for some of them.

    The files may have another ending than `caption_extension`. A folder without caption files has its name as the
    caption of all its images, which the reference's users do on purpose.
    """
    if subset.caption_sources:  # remarks.remark_on_sources counts each of them
        return
    own = "." + subset.caption_extension.removeprefix(".")
    there = {ending: listing.others[ending] for ending in CAPTION_SUFFIXES if ending != own and listing.others[ending]}
    if not missing or not (there or (subset.class_tokens and missing < listing.table.num_rows)):
        return
    instead = f"have the caption {subset.class_tokens!r}" if subset.class_tokens else "have no caption"
    remedies = [f'{count} {ending} files are there (caption_extension = "{ending}")' for ending, count in there.items()]
    message = f"{missing} of {listing.table.num_rows} images have no {own} file and {instead}"
    logger.warning("%s: %s", subset.image_dir, "; ".join([message, *remedies]))
