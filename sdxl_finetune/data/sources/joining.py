"""Joins a metadata file with the images in tar files or below an address: each entry finds its image by name.

A name is relative to the subset's folder. The tar file's name and the ending may be left out: the same member is
`data-001.tar/000017.jpg`, `data-001.tar/000017`, `000017.jpg` and `000017`.
"""

import logging
import os
import re
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute
from jaxtyping import Int64

from sdxl_finetune.config.dataset import Subset
from sdxl_finetune.data.sources.chunks import as_lists
from sdxl_finetune.data.sources.listed import LISTED, Listing, listed_table
from sdxl_finetune.data.sources.metadata import Entries, without_repeated
from sdxl_finetune.data.sources.names import stems
from sdxl_finetune.data.tables import one_chunk
from sdxl_finetune.errors import SHOWN, Problem, UserError, listed

logger = logging.getLogger(__name__)

EXAMPLES = 3
"""Entries without an image that a warning names."""
MISSING, SEVERAL = -1, -2
"""Places of names that fit no image, and several."""


def joined(subset: Subset, listing: Listing, entries: Entries) -> Listing:
    """The images that the entries name. Captions, scores and buckets of the entries win over what stands beside them.

    The metadata of all tar files is often used with a part of them. Therefore entries whose image is not in the listing
    are left out, and a warning counts them. A name that fits several images is a problem of the metadata file. Raises
    UserError if no entry names an image.
    """
    names = entries.table["name"].combine_chunks()
    folder = os.fsencode(subset.image_dir.as_posix()) + b"/"
    names = pa.compute.replace_substring_regex(names, rb"^(?:\./)+|^" + re.escape(folder), b"")
    place = find_places(one_chunk(listing.table["name"]), names, in_tars=listing.table["offset"].null_count == 0)
    rows = np.flatnonzero(place == SEVERAL)
    for number, row in enumerate(rows[:SHOWN].tolist()):
        more = len(rows) - SHOWN if number == SHOWN - 1 and len(rows) > SHOWN else 0
        message = f"several images have this name in {subset.image_dir} ({os.fsdecode(names[row].as_py())})"
        entries.add_problem(row, f"{message}: add the name of the tar file", 1 + more)
    _say_missing(subset, listing, entries, names, place)
    kept = place >= 0
    table = entries.table.set_column(
        1, "name", listing.table["name"].combine_chunks().take(pa.array(np.maximum(place, 0)))
    )
    table = table.append_column("place", pa.array(place))
    entries = without_repeated(Entries(entries.path, table, entries.problems).without(~kept))
    images = listing.table.take(one_chunk(entries.table["place"]))
    columns = {name: images[name] for name in LISTED.names}
    columns["captions"] = _captions(entries.table["captions"].combine_chunks(), images["captions"].combine_chunks())
    for name in ("score", "train_width", "train_height"):
        columns[name] = pa.compute.coalesce(entries.table[name].combine_chunks(), images[name].combine_chunks())
    listing.problems.add_all(entries.problems)
    return Listing(listed_table(columns), listing.others, listing.problems)


def _say_missing(
    subset: Subset, listing: Listing, entries: Entries, names: pa.Array, place: Int64[np.ndarray, " n"]
) -> None:
    """Warns of entries without an image, and says how many images have no entry. Raises UserError if none has one."""
    missing = np.flatnonzero(place == MISSING)
    if not len(missing):
        return
    shown = listed(os.fsdecode(name) for name in names.take(pa.array(missing[:EXAMPLES])).to_pylist())
    if len(missing) == len(names) and len(listing.table):
        image = os.fsdecode(listing.table["name"][0].as_py())
        message = (
            f"none of its {len(names):,} entries names an image of {subset.image_dir}. Entries are for example {shown},"
            f' and an image is {image}: correct them, or name the right column, as metadata_columns = "path=NAME"'
        )
        raise UserError(Problem(message, file=str(entries.path)))
    logger.warning(
        "%s: %s of %s entries are left out, because %s does not hold their images, for example %s. %s of %s images"
        " there have an entry and are used",
        entries.path,
        f"{len(missing):,}",
        f"{len(names):,}",
        subset.image_dir / (subset.tar_files or ""),
        shown,
        f"{len(np.unique(place[place >= 0])):,}",
        f"{len(listing.table):,}",
    )


def _captions(own: pa.LargeListArray, beside: pa.LargeListArray) -> pa.LargeListArray:
    """The captions of the entries. A text that an entry lacks is the one beside the image."""
    count = len(own.flatten()) // max(1, len(own) - own.null_count)
    if own.null_count == len(own) or beside.null_count == len(beside):
        return beside if own.null_count == len(own) else own
    texts = ((pa.compute.list_element(lists, place) for lists in (own, beside)) for place in range(count))
    return as_lists([pa.compute.coalesce(*both) for both in texts])


def find_places(images: pa.Array, names: pa.Array, *, in_tars: bool) -> Int64[np.ndarray, " n"]:
    """The place of each name among the images, MISSING or SEVERAL."""
    place = np.full(len(names), MISSING)
    for keys in _keys(images, in_tars=in_tars):
        rows = np.flatnonzero(place == MISSING)
        if len(rows):
            place[rows] = _look_up(keys, names.take(pa.array(rows)))
    return place


def _keys(images: pa.Array, *, in_tars: bool) -> Iterator[pa.Array]:
    """The names by which images are known, the most exact ones first."""
    yield images
    yield stems(images)
    if in_tars:
        members = pa.compute.replace_substring_regex(images, rb"^[^/]*/", b"")
        yield members
        yield stems(members)


def _look_up(keys: pa.Array, wanted: pa.Array) -> Int64[np.ndarray, " k"]:
    encoded = keys.dictionary_encode()
    codes = encoded.indices.to_numpy()
    first, counts = np.zeros(len(encoded.dictionary), np.int64), np.bincount(codes, minlength=len(encoded.dictionary))
    first[codes] = np.arange(len(codes))
    code = pa.compute.index_in(wanted, value_set=encoded.dictionary).fill_null(-1).to_numpy()
    place = np.append(np.where(counts == 1, first, SEVERAL), MISSING)
    return place[code]
