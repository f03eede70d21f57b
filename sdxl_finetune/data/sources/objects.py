"""The images directly below an address in an object store, with the captions that stand beside them.

One listing gives names, sizes in bytes and versions of all objects. Of each image only the first kilobytes are read, for
its size in pixels. Both, and the texts, are kept in `cache_dir`, and read again only for objects that have changed.
Threads wait for the answers, because a store answers many requests at once, each after some milliseconds.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
from jaxtyping import Bool, Int64

from sdxl_finetune.config.dataset import Subset
from sdxl_finetune.data.images import ImageError, image_extensions, image_size
from sdxl_finetune.data.sources.beside import Texts, Wanted, captions_of, read_text, wanted_of
from sdxl_finetune.data.sources.listed import LISTED
from sdxl_finetune.data.sources.names import stems
from sdxl_finetune.data.sources.tars import Tars
from sdxl_finetune.data.tables import map_table, write_table
from sdxl_finetune.errors import Problem, Tally
from sdxl_finetune.progress import track
from sdxl_finetune.storage import Address, StorageError, list_files, read

FORMAT = 1
"""Version of the files of objects in `cache_dir`. Files of another version are not found."""
THREADS = 64
"""Images of which something is read at once."""
CHUNK = 1 << 13
"""Images that are Python objects at once."""
HEAD = 1 << 15
"""Bytes of an image that are read for its size. The whole image is read if they are not enough."""


@dataclass(frozen=True)
class Objects:
    """Some objects below an address, in columns."""

    names: pa.Array
    sizes: Int64[np.ndarray, " n"]
    """Bytes."""
    versions: Int64[np.ndarray, " n"]
    """Numbers that change with the content."""

    def where(self, rows: Bool[np.ndarray, " n"]) -> "Objects":
        return Objects(self.names.filter(pa.array(rows)), self.sizes[rows], self.versions[rows])


def read_objects(subset: Subset, cache_dir: Path) -> Tars:
    """Lists the images directly below the address of a subset. With a metadata file no texts beside them are read."""
    folder = subset.image_dir
    assert isinstance(folder, Address)
    wanted = Wanted(()) if subset.metadata_file else wanted_of(subset, in_tars=False)
    everything = list_objects(folder)
    endings = pa.compute.utf8_lower(_endings(everything.names))
    is_image = pa.compute.is_in(endings, value_set=pa.array(image_extensions())).to_numpy(zero_copy_only=False)
    images = everything.where(is_image)
    ...
