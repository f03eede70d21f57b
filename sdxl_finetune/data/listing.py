"""Lists the images of each subset, from its folder or its metadata file, and says what else lies in the folder.

Every source of images gives one table with the columns of LISTED. A folder is only searched for names here, because it
may hold millions of files. The scan opens images and captions later.
"""

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute

from sdxl_finetune.config.dataset import OPTIONAL_SUFFIXES, UNREAD_SUFFIXES, Subset, is_picture, unread_pictures
from sdxl_finetune.data.images import image_extensions
from sdxl_finetune.data.sources import Described, read_metadata
from sdxl_finetune.errors import Problem, UserError

logger = logging.getLogger(__name__)

CAPTION_SUFFIXES = (".txt", ".caption")
"""Usual endings of caption files."""
CHUNK = 1 << 16
"""Names that are Python objects at once."""
LISTED = pa.schema(
    {
        "name": pa.large_binary(),
        "captions": pa.large_list(pa.large_string()),
        "width": pa.int32(),
        "height": pa.int32(),
        "train_width": pa.int32(),
        "train_height": pa.int32(),
        "score": pa.float32(),
        "offset": pa.int64(),
        "bytes": pa.int64(),
        "mtime": pa.int64(),
    }
)
"""Columns of a listing. Null means that the source does not say.

`name` is relative to the subset's folder, and need not be text. `captions` has one text for each caption source; null
means that caption files beside the image are read. `width` and `height` are the image's size in pixels, and
`train_width` and `train_height` the size of its bucket. `offset` is the position of the image in its container, null
for a file of its own. `bytes` and `mtime` (nanoseconds) are size and modification time of the image's file."""


@dataclass(frozen=True)
class Listing:
    """The images of one subset."""

    table: pa.Table
    """The images, with the columns of LISTED, sorted by name. Each column has one chunk."""
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


def listing(columns: Mapping[str, pa.Array]) -> pa.Table:
    """Returns a table with the columns of LISTED, sorted by name. Columns that are not given are null."""
    size = len(columns["name"])
    arrays = [columns.get(field.name, pa.nulls(size, field.type)).cast(field.type) for field in LISTED]
    table = pa.table(arrays, schema=LISTED)
    order = pa.compute.sort_indices(table["name"]).to_numpy()
    return table if (order == np.arange(size)).all() else table.take(order).combine_chunks()


def _list(subset: Subset) -> Listing:
    if subset.metadata_file:
        return Listing(_described(read_metadata(subset)))
    endings = image_extensions()
    names, others = _search(subset.image_dir, endings)
    pictures = unread_pictures({ending: others[ending] for ending in _unread(endings) if others[ending]})
    if not len(names):
        message = f"the folder holds no images ({' '.join(endings)}): put images there or remove it from the config"
        raise UserError(Problem(message + (pictures and f"; {pictures}"), file=str(subset.image_dir)))
    if pictures:
        logger.warning("%s: %s", subset.image_dir, pictures)
    return Listing(listing({"name": names}), others)


def _search(folder: Path, endings: tuple[str, ...]) -> tuple[pa.LargeBinaryArray, Counter[str]]:
    """The names of the images directly in a folder, and the number of its other files by ending."""
    chunks: list[pa.Array] = []
    names: list[str] = []
    others: Counter[str] = Counter()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_picture(entry, endings):
                    names.append(entry.name)
                    if len(names) == CHUNK:
                        chunks.append(_encoded(names))
                        names = []
                elif entry.name[0] != ".":
                    others[entry.name[entry.name.rfind(".") :].lower()] += 1
    except OSError as error:
        raise UserError(Problem(f"the folder cannot be listed: {error.strerror}", file=str(folder))) from None
    return pa.concat_arrays([*chunks, _encoded(names)]), others


def _encoded(names: list[str]) -> pa.LargeBinaryArray:
    """The names as bytes. Arrow encodes them faster than Python, but refuses those that are not UTF-8."""
    try:
        return pa.array(names, pa.large_string()).cast(pa.large_binary())
    except UnicodeEncodeError:
        return pa.array(map(os.fsencode, names), pa.large_binary())


def _described(described: Mapping[str, Described]) -> pa.Table:
    """The table of the images of a metadata file."""
    entries = described.values()
    sizes = {
        "width": [one.size and one.size[0] for one in entries],
        "height": [one.size and one.size[1] for one in entries],
        "train_width": [one.bucket and one.bucket[0] for one in entries],
        "train_height": [one.bucket and one.bucket[1] for one in entries],
    }
    columns = {name: pa.array(values, pa.int32()) for name, values in sizes.items()}
    columns["name"] = pa.array(map(os.fsencode, described), pa.large_binary())
    columns["captions"] = pa.array([[one.caption] for one in entries], LISTED.field("captions").type)
    return listing(columns)


def _unread(endings: Sequence[str]) -> list[str]:
    return [ending for ending in (*UNREAD_SUFFIXES, *OPTIONAL_SUFFIXES) if ending not in endings]


def say_missing_captions(subset: Subset, listing: Listing, missing: int) -> None:
    """Warns about images without a caption file, if the folder has caption files for some of them.

    The files may have another ending than `caption_extension`. A folder without caption files has its name as the
    caption of all its images, which the reference's users do on purpose.
    """
    own = "." + subset.caption_extension.removeprefix(".")
    there = {ending: listing.others[ending] for ending in CAPTION_SUFFIXES if ending != own and listing.others[ending]}
    if not missing or not (there or (subset.class_tokens and missing < listing.table.num_rows)):
        return
    instead = f"have the caption {subset.class_tokens!r}" if subset.class_tokens else "have no caption"
    remedies = [f'{count} {ending} files are there (caption_extension = "{ending}")' for ending, count in there.items()]
    message = f"{missing} of {listing.table.num_rows} images have no {own} file and {instead}"
    logger.warning("%s: %s", subset.image_dir, "; ".join([message, *remedies]))
