"""Warnings about the images of an index that are allowed but may surprise the user.

`table` has one row for each image, with the columns name, caption and subset.
"""

import logging
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute

from sdxl_finetune.config.dataset import Subset

logger = logging.getLogger(__name__)


def remark_on_captions(table: pa.Table, subsets: Sequence[Subset]) -> None:
    """Warns of images without a caption, and of captions of which only the first line is used."""
    if uncaptioned := pa.compute.sum(pa.compute.equal(table["caption"], "")).as_py():
        logger.warning("%d of %d images have no caption file, or an empty one", uncaptioned, table.num_rows)
    # The column stays in its chunks and is not copied.
    has_lines = pa.compute.match_substring(table["caption"], "\n").to_numpy()
    uses_first = ~np.array([subset.enable_wildcard for subset in subsets])[table["subset"].to_numpy()]
    if lines := int((has_lines & uses_first).sum()):
        remedy = "enable_wildcard = true draws one of the lines each time"
        logger.warning(
            "%d of %d captions have several lines, and only the first is used: %s", lines, len(table), remedy
        )


def remark_on_faces(table: pa.Table, subsets: Sequence[Subset]) -> None:
    """Warns of images without a face in their names, which `face_crop_aug_range` leaves as they are."""
    for number, subset in enumerate(subsets):
        if subset.face_crop_aug_range:
            names = table.filter(pa.compute.equal(table["subset"], number))["name"]
            named = pa.compute.sum(pa.compute.match_substring_regex(names, r"._\d+_\d+_\d+_\d+\.[^.]*$")).as_py() or 0
            if named < len(names):
                message = (
                    "%s: %d of %d images have no face in their names (name_X_Y_W_H): face_crop_aug_range has no effect"
                )
                logger.warning(f"{message} on them", subset.image_dir, len(names) - named, len(names))
