"""Warnings about the images of an index: files that cannot be used, and what is allowed but may surprise the user.

`table` has one row for each image, with the columns name, captions and subset.
"""

import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute

from sdxl_finetune.config.dataset import Subset
from sdxl_finetune.data.tables import one_chunk
from sdxl_finetune.errors import Tally, UserError, counted
from sdxl_finetune.storage import Location

EXAMPLES = 3
"""Images that a warning names."""
logger = logging.getLogger(__name__)


def count_captions(table: pa.Table, subsets: Sequence[Subset]) -> dict[str, list[int]]:
    """Counts images, images without a caption and captions of several lines, for each subset.

    "first without" has the first rows of images without a caption.
    """
    captions = one_chunk(table["captions"])
    texts, row = captions.flatten(), pa.compute.list_parent_indices(captions).to_numpy()
    is_text, has_lines = np.zeros(len(captions), bool), np.zeros(len(captions), bool)
    is_text[row[pa.compute.not_equal(texts, "").fill_null(False).to_numpy(zero_copy_only=False)]] = True
    has_lines[row[pa.compute.match_substring(texts, "\n").fill_null(False).to_numpy(zero_copy_only=False)]] = True
    subset = table["subset"].to_numpy()
    masks = {"images": np.ones(len(captions), bool), "without caption": ~is_text, "of several lines": has_lines}
    counts = {name: np.bincount(subset[mask], minlength=len(subsets)).tolist() for name, mask in masks.items()}
    return {**counts, "first without": np.flatnonzero(~is_text)[:EXAMPLES].tolist()}


def remark_on_captions(
    counts: Mapping[str, Sequence[int]], subsets: Sequence[Subset], path_of: Callable[[int], Location]
) -> None:
    """Warns of images without a caption, and of captions of which only the first line is used.

    `counts` is the result of `count_captions`, and `path_of` gives the path of the image in a row.
    """
    total = sum(counts["images"])
    if uncaptioned := sum(counts["without caption"]):
        first = ", ".join(str(path_of(row)) for row in counts.get("first without", ()))
        logger.warning(
            "%d of %d images have no caption, or an empty one, and are trained without a text%s: %s",
            uncaptioned,
            total,
            first and f", for example {first}",
            _remedy_for_captions([one for one, count in zip(subsets, counts["without caption"], strict=True) if count]),
        )
    by_subset = zip(counts["of several lines"], subsets, strict=True)
    if lines := sum(count for count, subset in by_subset if not subset.enable_wildcard):
        remedy = "enable_wildcard = true draws one of the lines each time"
        logger.warning("%d of %d captions have several lines, and only the first is used: %s", lines, total, remedy)


def _remedy_for_captions(subsets: Sequence[Subset]) -> str:
    """Says what to do about images without a caption in these subsets."""
    if any(subset.caption_sources for subset in subsets):
        return "write one of the texts that caption_sources names"
    remedies = []
    if any(subset.metadata_file for subset in subsets):
        remedies.append(
            'fill caption or tags in the metadata file, or name other columns as metadata_columns = "tags=NAME"'
        )
    if endings := {"." + one.caption_extension.removeprefix(".") for one in subsets if not one.metadata_file}:
        ending = sorted(endings)[0]
        remedies.append(f"write files as cat{ending} for cat.png, or set caption_extension to the ending of yours")
    return ", ".join(remedies)


def remark_on_sources(table: pa.Table, subsets: Sequence[Subset]) -> None:
    """Logs how many images have each of the caption sources. Warns of a source that no image has."""
    if not any(subset.caption_sources for subset in subsets):
        return
    starts = np.searchsorted(table["subset"].to_numpy(), np.arange(len(subsets) + 1)).tolist()
    captions = one_chunk(table["captions"])
    for subset, start, end in zip(subsets, starts, starts[1:], strict=False):
        if subset.caption_sources:
            texts = captions.slice(start, end - start).flatten()  # no copy: there may be millions
            is_there = texts.is_valid().to_numpy(zero_copy_only=False).reshape(-1, len(subset.caption_sources))
            counts = dict(zip((one.name for one in subset.caption_sources), is_there.sum(axis=0).tolist(), strict=True))
            logger.info(
                "%s: %d images; caption source %s, none in %d",
                subset.image_dir,
                end - start,
                ", ".join(f"{name} in {count}" for name, count in counts.items()),
                int((~is_there.any(axis=1)).sum()),
            )
            if missing := [name for name, count in counts.items() if not count]:
                message = "caption_sources: no image of %s has %s: check the name of the key or the ending of the file"
                logger.warning(message, subset.metadata_file or subset.image_dir, " or ".join(missing))


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


def report_bad_images(problems: Tally, on_bad_image: str) -> None:
    """Raises UserError with the problems if `on_bad_image` is "stop", or names them in one warning if it is "skip".

    Before the error, a warning names the other choice.
    """
    if problems and on_bad_image == "stop":
        logger.warning('on_bad_image = "skip" would train without the files that cannot be used')
        raise UserError(problems.problems())
    if problems:
        lines = "\n".join(str(problem) for problem in problems.problems())
        verb = "is" if len(problems) == 1 else "are"
        logger.warning("%s %s skipped (on_bad_image = skip):\n%s", counted(len(problems), "file"), verb, lines)
