"""Chooses what a report measures: images, captions and the other tags that compete with the right one.

A tag competes with tags that have at least half as many images. A much rarer tag is hardly trained. It then means
little of its own, and the model may draw the frequent tag's style for it, which is no fault of the frequent tag.

The choice is a function of the images, the tags and the options. It does not depend on the model, so that reports on
several checkpoints measure the same.
"""

import hashlib
import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from jaxtyping import Bool

from sdxl_finetune.config.tag_options import TagReportOptions
from sdxl_finetune.data.index import Index
from sdxl_finetune.data.tag_columns import TagPatterns
from sdxl_finetune.data.tags import comparable
from sdxl_finetune.data.unchanged import image_id
from sdxl_finetune.errors import SHOWN, Problem, UserError, counted
from sdxl_finetune.errors import listed as shown
from sdxl_finetune.printable import encodable
from sdxl_finetune.seeding import position_rng
from sdxl_finetune.tag_report.listing import Listed, list_tags
from sdxl_finetune.tag_report.wording import Wording, trained_options, wordings

logger = logging.getLogger(__name__)

DEFAULT_OTHERS = 3
RARER = 0.5
"""Images of a competing tag at least, as a share of the tag's images."""


@dataclass(frozen=True)
class Worded:
    """An image that has a tag, with the captions to measure."""

    row: int
    whole: str
    without: str
    others: tuple[str, ...]
    """The caption with each of the other tags in the place of the tag."""


@dataclass(frozen=True)
class Unit:
    """The forward passes of one image: each of its captions at each timestep."""

    row: int
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Pair:
    """A tag measured on an image. The numbers are places among the captions of the image's unit."""

    tag: int
    unit: int
    whole: int
    without: int
    others: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Everything that a report measures."""

    listed: Listed
    units: tuple[Unit, ...]
    pairs: tuple[Pair, ...]
    timesteps: tuple[int, ...]
    others: int
    """Other tags that compete with the right one, at most."""
    images: int
    """Images for each tag at most."""

    @property
    def passes(self) -> int:
        """Forward passes: one for each timestep and caption of each image."""
        return len(self.timesteps) * sum(len(unit.captions) for unit in self.units)

    def others_of(self, tag: int) -> int:
        """Other tags that compete with this tag."""
        return min(self.others, int(compete_with(self.listed, tag).sum()))

    def describe(self) -> str:
        """The cost of a report, in words."""
        against = f"{'up to ' * (self.others > 1)}{counted(self.others, 'other')}"
        return (
            f"{counted(len(self.listed.names), 'tag')} on {counted(len(self.units), 'image')}, each tag against"
            f" {against}, {counted(len(self.timesteps), 'timestep')}: {self.passes:,} forward passes"
        )

    def facts(self, index: Index) -> dict[str, object]:
        """The options of the measurement, and digests of tags and images. Figures compare where these are equal."""
        images = hashlib.blake2b(digest_size=8)
        for unit in self.units:
            images.update(f"{image_name(index, unit.row)!r} {unit.captions!r}".encode())
        return {
            "timesteps": list(self.timesteps),
            "others": self.others,
            "images": self.images,
            "tags": hashlib.blake2b(repr(self.listed.names).encode(), digest_size=8).hexdigest(),
            "measured": images.hexdigest(),
        }


def choose(options: TagReportOptions, index: Index) -> Choice:
    """Chooses the images and captions of a report. The budget lowers the images of each tag evenly.

    Raises UserError for tags that cannot be measured, too many other tags and too small a budget.
    """
    listed = list_tags(options, index)
    others = _number_of_others(options, len(listed.names))
    worded = _word(options, index, listed, others)
    while options.tag_report_others is None and others > 1 and not all(worded):
        others -= 1  # images that have most tags of the list leave few others
        worded = _word(options, index, listed, others)
    _check_all_are_measured(listed, worded, others)
    images = options.tag_report_images
    if budget := options.tag_report_budget:
        images = _within(budget, worded, images, len(options.tag_report_timesteps))
    units, pairs = _group(worded, images)
    return Choice(
        listed=listed,
        units=units,
        pairs=pairs,
        timesteps=options.tag_report_timesteps,
        others=others,
        images=images,
    )


def compete_with(listed: Listed, tag: int) -> Bool[np.ndarray, " tags"]:
    """True for the tags that may compete with a tag."""
    rivals: np.ndarray = listed.images >= RARER * listed.images[tag]
    rivals[tag] = False
    return rivals


def image_name(index: Index, row: int) -> str:
    """The folder and the name of an image, joined by a /."""
    entry = index[row]
    name = entry.path.relative_to(entry.subset.image_dir).as_posix()
    return encodable(f"{entry.subset.image_dir.name}/{name}")


def _number_of_others(options: TagReportOptions, tags: int) -> int:
    others = options.tag_report_others
    if others is None:
        return min(DEFAULT_OTHERS, tags - 1)
    if others > tags - 1:
        message = f"the list has {tags} {'tag' if tags == 1 else 'tags'}, so at most {tags - 1} others can compete:"
        raise UserError(Problem(f"{message} lower it, or list more tags", "tag_report_others", others))
    return others


def _word(options: TagReportOptions, index: Index, listed: Listed, others: int) -> list[list[Worded]]:
    """The images of each tag, in the order in which they are measured, with their captions.

    A tag has no image if their captions hold too many tags of the list, or if another source or line of each image
    became the caption.
    """
    patterns, subsets = TagPatterns(listed.names, exact=True), [trained_options(subset) for subset in index.subsets]
    known: dict[int, list[Wording]] = {}
    worded: list[list[Worded]] = []
    for tag, rows in enumerate(listed.candidates):
        found: list[Worded] = []
        rivals = compete_with(listed, tag)
        for row in rows.tolist():
            if len(found) == options.tag_report_images:
                break
            if row not in known:
                known[row] = list(wordings(index[row], subsets[index.subset[row]], patterns))
            if one := _worded(index, row, tag, known[row], listed, rivals, others):
                found.append(one)
        worded.append(found)
    return worded


def _check_all_are_measured(listed: Listed, worded: Sequence[Sequence[Worded]], others: int) -> None:
    """Raises UserError if a tag has no image."""
    if missing := [listed.names[tag] for tag, found in enumerate(worded) if not found]:
        names = shown(map(repr, missing), SHOWN)
        message = f"no image to measure {names} on: in each, another line or source is the caption, or its other tags"
        message += f" leave fewer than {others} of the list to compete. Lower it, or remove these tags from the list"
        raise UserError(Problem(message, "tag_report_others", others))


def _worded(
    index: Index, row: int, tag: int, captions: Sequence[Wording], listed: Listed, rivals: np.ndarray, others: int
) -> Worded | None:
    """The captions of an image for a tag; None if no caption has the tag, or too few other tags are left.

    The other tags are drawn from the rivals by the names of image and tag. The image has none of them, in none of its
    captions.
    """
    wording = next((one for one in captions if tag in one.places), None)
    own = {number for one in captions for number in one.places}
    all_rivals = int(rivals.sum())
    others = min(others, all_rivals)
    if wording is None or all_rivals - int(rivals[list(own)].sum()) < others:
        return None
    identity = zlib.crc32(comparable(listed.names[tag]).encode())
    order = position_rng(0, "other tags", *image_id(index[row]), identity).permutation(len(listed.names)).tolist()
    drawn = list(islice((number for number in order if rivals[number] and number not in own), others))
    return Worded(
        row,
        wording.whole(),
        wording.without(tag),
        tuple(wording.replaced(tag, listed.names[number]) for number in drawn),
    )


def _group(worded: Sequence[Sequence[Worded]], images: int) -> tuple[tuple[Unit, ...], tuple[Pair, ...]]:
    """The units and pairs if each tag has at most `images` images. Captions that several tags share are used once."""
    captions: dict[int, dict[str, int]] = {}
    found: list[tuple[int, int, list[int]]] = []
    for tag, own in enumerate(worded):
        for one in own[:images]:
            of_image = captions.setdefault(one.row, {})
            places = [of_image.setdefault(text, len(of_image)) for text in (one.whole, one.without, *one.others)]
            found.append((tag, one.row, places))
    numbers: Mapping[int, int] = {row: number for number, row in enumerate(sorted(captions))}
    units = tuple(Unit(row, tuple(captions[row])) for row in numbers)
    pairs = (Pair(tag, numbers[row], places[0], places[1], tuple(places[2:])) for tag, row, places in found)
    return units, tuple(pairs)


def _within(budget: int, worded: Sequence[Sequence[Worded]], images: int, timesteps: int) -> int:
    """The most images for each tag whose forward passes the budget allows. Raises UserError if one is too many."""

    def passes(count: int) -> int:
        return timesteps * sum(len(unit.captions) for unit in _group(worded, count)[0])

    if (least := passes(1)) > budget:
        message = f"one image for each tag takes {least} forward passes: raise it, or list fewer tags"
        raise UserError(Problem(message, "tag_report_budget", budget))
    low, high = 1, images
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if passes(middle) <= budget else (low, middle - 1)
    if low < images:
        logger.info("tag_report_budget = %d: each tag is measured on %d images at most, not on %d", budget, low, images)
    return low
