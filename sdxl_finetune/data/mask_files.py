"""Finds the mask file of each image in `conditioning_data_dir`, a folder or an address, in columns of the index.

The mask of `cats/a.jpg` is `cats/a.png`, or `a.png` if no other image asks for that file: folders are left out one by
one from the front. A file with the image's whole name comes first, then the first name with its stem, as in the
reference (`glob_images` of library/train_util.py), which knows no folders here.
"""

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
from jaxtyping import Bool, Int64

from sdxl_finetune.config.dataset import Subset
from sdxl_finetune.data.images import image_extensions
from sdxl_finetune.data.sources.names import has_ending, stems
from sdxl_finetune.data.sources.objects import Objects, columns_of
from sdxl_finetune.data.tables import map_table, one_chunk, with_slashes, write_table
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.files import modified
from sdxl_finetune.storage import Address, Found, Location, list_files, naming

logger = logging.getLogger(__name__)

MASKED = ("mask", "mask_bytes", "mask_version")
"""Columns of the index if subsets have mask files: name below the folder, size in bytes, and version of the file."""
COLUMNS = pa.schema({"mask": pa.large_binary(), "mask_bytes": pa.int64(), "mask_version": pa.int64()})
NO_MASK, SHARED = -1, -2
"""`mask_bytes` of an image without a mask file, and of one whose mask would also be that of another image."""
FORMAT = 1
"""Version of the kept columns."""


def add_masks(table: pa.Table, subsets: Sequence[Subset], cache_dir: Path, *, skip_check: bool) -> pa.Table:
    """Adds the columns of MASKED to a table of images, if subsets have mask files.

    The columns are kept in `cache_dir`. With `skip_check` they are those of the last time, if there are any. Raises
    UserError for a folder that cannot be listed or holds no masks.
    """
    folders = [one.conditioning_data_dir for one in subsets]
    if not any(folders):
        return table
    places = [(str(one.image_dir), str(one.conditioning_data_dir)) for one in subsets]
    question = repr((FORMAT, table.schema.metadata[b"digest"], places)).encode("utf-8", "surrogateescape")
    path = cache_dir / "mask_files" / f"{hashlib.blake2b(question, digest_size=12).hexdigest()}.masks"
    found = _load(path, table.num_rows) if skip_check else None
    if found is None:
        found = _find(table, subsets, folders)
        write_table(path, found)
    for name in MASKED:
        table = table.append_column(name, one_chunk(found[name]))
    return table


def _load(path: Path, count: int) -> pa.Table | None:
    with suppress(OSError, pa.ArrowException):
        table = map_table(path, mapped=False)
        if table.schema == COLUMNS and table.num_rows == count:
            return table
    return None


def _find(table: pa.Table, subsets: Sequence[Subset], folders: Sequence[Location | None]) -> pa.Table:
    """The columns of MASKED for all images, from one listing of each folder of masks."""
    subset = one_chunk(table["subset"]).to_numpy()
    sizes, versions = np.full(len(subset), NO_MASK), np.zeros(len(subset), np.int64)
    names, order, no_name = [], [], pa.array([b""], pa.large_binary())
    image_dirs = [one.image_dir for one in subsets]
    for folder in dict.fromkeys(folders):
        rows = np.flatnonzero(np.array([one == folder for one in folders])[subset])
        order.append(rows)
        if folder is None:
            names.append(no_name.take(pa.array(np.zeros(len(rows), np.int64))))
            continue
        masks = list_masks(folder)
        images = one_chunk(table["name"]).take(pa.array(rows))
        place, is_short = find_masks(images, masks.names)
        owner = np.array([image_dirs.index(one) for one in image_dirs])[subset[rows]]
        is_shared = _shared(place, owner, stems(images))
        if (together := _shared(np.where(is_short, -1, place), owner, stems(images))).any():
            _warn_of_shared(folder, masks, place[together])
        chosen = np.where(place < 0, len(masks.names), place)
        names.append(pa.concat_arrays([masks.names, no_name]).take(pa.array(chosen)))
        sizes[rows] = np.where(is_shared & is_short, SHARED, np.append(masks.sizes, NO_MASK)[place])
        versions[rows] = np.append(masks.versions, 0)[place]
    joined = pa.concat_arrays(names).take(pa.array(np.argsort(np.concatenate(order), kind="stable")))
    return pa.table([joined, sizes, versions], COLUMNS)


def _warn_of_shared(folder: Location, masks: Objects, place: Int64[np.ndarray, " k"]) -> None:
    message = "conditioning_data_dir = %s: masks are used for images of the same name in several folders, for example"
    message += " %s (%d in all): give each folder of images a folder of masks of its own"
    several = np.unique(place)
    logger.warning(message, folder, os.fsdecode(masks.names[int(several[0])].as_py()), len(several))


def list_masks(folder: Location) -> Objects:
    """The images in a folder and its subfolders, or below an address, in the order of their names. Raises UserError."""
    with naming("conditioning_data_dir"):
        found = columns_of(list_files(folder) if isinstance(folder, Address) else _walk(folder))
    found = found.where(has_ending(found.names, image_extensions()))
    if not len(found.names):
        message = f"holds no masks: put images ({' '.join(image_extensions())}) there, or correct it"
        raise UserError(Problem(message, key="conditioning_data_dir", value=str(folder)))
    return found.take(pa.compute.sort_indices(found.names).to_numpy().astype(np.int64))


def _walk(folder: Path) -> Iterator[Found]:
    for parent, _, names in os.walk(folder, followlinks=True):
        below = os.path.relpath(parent, folder).replace(os.sep, "/")
        for name in names:
            with suppress(OSError):  # a link to a missing file is no mask
                stat = os.stat(os.path.join(parent, name))  # noqa: PTH116, PTH118 (millions)
                yield Found(stat.st_size, modified(stat), name if below == "." else f"{below}/{name}")


def find_masks(images: pa.Array, masks: pa.Array) -> tuple[Int64[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """The position of each image's mask among the sorted names of masks, -1 without one.

    Also returns True for images whose mask was found after folders were left out.
    """
    place, is_short = np.full(len(images), -1), np.zeros(len(images), bool)
    wanted = pa.compute.replace_substring_regex(with_slashes(images), rb"^(?:\.{0,2}/)+", b"")
    rows, mask_stems, depth = np.arange(len(images)), stems(masks), 0
    while len(rows):
        whole, stem = (
            pa.compute.index_in(names, value_set=there).fill_null(-1).to_numpy()
            for names, there in ((wanted, masks), (stems(wanted), mask_stems))
        )
        place[rows] = np.where(whole >= 0, whole, stem)
        is_short[rows] = depth > 0
        left = (place[rows] < 0) & pa.compute.match_substring(wanted, "/").to_numpy(zero_copy_only=False)
        rows, depth = rows[left], depth + 1
        wanted = pa.compute.replace_substring_regex(wanted.filter(pa.array(left)), rb"^[^/]*/", b"")
    return place, is_short


def _shared(place: Int64[np.ndarray, " n"], folder: Int64[np.ndarray, " n"], stem: pa.Array) -> Bool[np.ndarray, " n"]:
    """True for images whose mask is also that of an image of another name without ending, or in another folder."""
    pairs = np.stack([place, folder, stem.dictionary_encode().indices.to_numpy()], axis=1)
    counts = np.bincount(np.unique(pairs[place >= 0], axis=0)[:, 0], minlength=1)
    return (place >= 0) & (counts[np.maximum(place, 0)] > 1)
