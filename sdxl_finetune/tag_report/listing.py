"""The tags of a report, and the images that have them."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt64

from sdxl_finetune.config.tag_options import TagReportOptions
from sdxl_finetune.data.index import Index
from sdxl_finetune.data.tables import map_table, one_chunk
from sdxl_finetune.data.tag_columns import TagPatterns, find_tags, separators_of
from sdxl_finetune.data.tags import comparable
from sdxl_finetune.errors import SHOWN, Problem, UserError, listed
from sdxl_finetune.progress import track
from sdxl_finetune.report.rows import Rows
from sdxl_finetune.report.tags import TagCounter

SPARE = 4
"""Images that are kept for each tag, as a multiple of those to measure. The caption of some may lack the tag, because
another of its lines or sources was drawn."""
CHOICES = ("tag_report_tags", "tag_report_tags_file", "tag_report_min_images")
"""Options that name the tags of a report; one of them is needed."""


@dataclass(frozen=True)
class Listed:
    """The tags of a report, by number."""

    names: tuple[str, ...]
    """Each tag as most captions write it, in alphabetical order."""
    per_epoch: Int64[np.ndarray, " tags"]
    """Images with the tag that an epoch trains on, with repeats."""
    images: Int64[np.ndarray, " tags"]
    """Images with the tag, held out or trained on, without repeats."""
    own_repeats: Int64[np.ndarray, " tags"]
    """Sum of `num_repeats` of the images with the tag that are trained on: `per_epoch` without `image_weights`."""
    candidates: tuple[Int64[np.ndarray, " k"], ...]
    """Rows of images with each tag in the order in which they are measured. A long list is cut."""


def list_tags(options: TagReportOptions, index: Index) -> Listed:
    """Finds the tags that the options name, and images that have them.

    Raises UserError for tags and patterns that no image has, and if the options name no tags.
    """
    names = _names(options, index)
    return _find_images(index, names, SPARE * options.tag_report_images)


def read_tags_file(path: Path) -> list[str]:
    """The tags and patterns of a file, one on a line. Lines that begin with # are comments. Raises UserError."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(Problem("not a UTF-8 text file: save it as UTF-8", file=str(path))) from None
    except OSError as error:
        raise UserError(Problem(f"cannot be read ({error.strerror}): check the path", file=str(path))) from None
    tags = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not tags:
        raise UserError(Problem("the file holds no tags: write one on each line", file=str(path)))
    return tags


def _names(options: TagReportOptions, index: Index) -> list[str]:
    """The tags that the options name, each as most captions write it."""
    counter = TagCounter()
    rows = np.flatnonzero(index.used)
    with track("counting tags", len(rows), "images") as progress:
        for tags in Rows(index).tags(rows):
            counter.add(tags)
            progress.update(len(tags))
    counts = counter.result()
    forms: dict[str, str] = {}
    images: dict[str, int] = {}
    for name, count in zip(counts.names, counts.images.tolist(), strict=True):
        key = comparable(name)
        forms.setdefault(key, name)  # the most frequent form comes first
        images[key] = images.get(key, 0) + count
    if least := options.tag_report_min_images:
        chosen = [key for key, count in images.items() if key and count >= least]
        if not chosen:
            most = max(images.values(), default=0)
            message = f"no tag is in so many images; the most frequent one is in {most}. Lower the number"
            raise UserError(Problem(message, "tag_report_min_images", least))
    else:
        chosen = _matching(options, images)
    return sorted(forms[key] for key in chosen)


def _matching(options: TagReportOptions, tags: Iterator[str] | dict[str, int]) -> list[str]:
    """Those of the tags that the options name, by patterns or as they are."""
    if path := options.tag_report_tags_file:
        patterns, where = read_tags_file(path), {"file": str(path)}
    elif options.tag_report_tags:
        patterns = [tag.strip() for tag in options.tag_report_tags.split(",") if tag.strip()]
        where = {"key": "tag_report_tags", "value": options.tag_report_tags}
    else:
        message = f"names no tags: set {CHOICES[0]}, {CHOICES[1]} or {CHOICES[2]}"
        raise UserError(Problem(message, "tag_report_every_n_epochs"))
    matcher = TagPatterns(patterns)
    found = [(tag, matcher.match(tag)) for tag in tags]
    unknown = sorted(set(range(len(patterns))) - {number for _, numbers in found for number in numbers})
    if unknown:
        names = listed((repr(patterns[number]) for number in unknown), SHOWN)
        message = f"no caption has {names}: correct the spelling, or remove what no image has"
        raise UserError(Problem(message, **where))
    return [tag for tag, numbers in found if numbers]


def _find_images(index: Index, names: Sequence[str], most: int) -> Listed:
    """Finds at most `most` images for each tag: held-out images first, and within both kinds by a hash of their names.

    The order of an image does not depend on the other images.
    """
    patterns, captions = TagPatterns(names, exact=True), one_chunk(map_table(index.path, checked=False)["captions"])
    used, own = np.flatnonzero(index.used), [separators_of(one) for one in index.subsets]
    per_epoch, images, own_repeats = np.zeros((3, len(names)), np.int64)
    num_repeats = np.array([subset.num_repeats for subset in index.subsets])
    numbers, orders, rows = np.zeros(0, np.int64), np.zeros(0, np.uint64), np.zeros(0, np.int64)
    for separators in dict.fromkeys(own):
        these = used[np.array([one == separators for one in own])[index.subset[used]]]
        for places, found in find_tags(captions, these, separators, patterns):
            here = these[places]
            per_epoch += np.bincount(found, index.repeats[here], len(names)).astype(np.int64)
            images += np.bincount(found, minlength=len(names))
            trained = num_repeats[index.subset[here]] * ~index.held_out[here]
            own_repeats += np.bincount(found, trained, len(names)).astype(np.int64)
            numbers, rows = np.append(numbers, found), np.append(rows, here)
            orders = np.append(orders, _order(index, here))
            order = np.lexsort((rows, orders, numbers))
            first = np.searchsorted(numbers[order], numbers[order])  # the place of the tag's first image
            kept = order[np.arange(len(order)) - first < most]
            numbers, orders, rows = numbers[kept], orders[kept], rows[kept]
    ends = np.searchsorted(numbers, np.arange(1, len(names)))
    return Listed(tuple(names), per_epoch, images, own_repeats, tuple(np.split(rows, ends)))


def _order(index: Index, rows: Int64[np.ndarray, " k"]) -> UInt64[np.ndarray, " k"]:
    """Numbers by which images are ordered: below 2**63 for held-out images."""
    distinct, place = np.unique(rows, return_inverse=True)
    folders = [os.fsencode(subset.image_dir.name) for subset in index.subsets]
    names = zip(index.subset[distinct].tolist(), index.names.take(distinct).to_pylist(), strict=True)
    digests = b"".join(hashlib.blake2b(folders[own] + b"/" + name, digest_size=8).digest() for own, name in names)
    hashes = np.frombuffer(digests, np.uint64) >> np.uint64(1)
    return np.where(index.held_out[distinct], hashes, hashes | np.uint64(1 << 63))[place]
