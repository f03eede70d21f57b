"""Pictures for the page: a tag's images, beside two pictures that the model draws with the tag and without it.

Both pictures have the caption of one image, its size and one seed, so that they differ by the tag alone. The image and
the seed do not depend on the model. Thus pictures of several checkpoints compare.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute
import torch
from PIL import Image

from sdxl_finetune.model.sdxl import evaluating
from sdxl_finetune.output.previews import PreviewModel, draw_latents, moved_to, to_image
from sdxl_finetune.output.prompts import Prompt
from sdxl_finetune.pages.thumbnails import picture_url, thumbnail
from sdxl_finetune.progress import track
from sdxl_finetune.tag_report.schema import STATES, Report
from sdxl_finetune.tag_report.tables import TagRow, tag_rows

logger = logging.getLogger(__name__)

MOST_SHOWN = 60
"""Tags whose images are on the page."""
IMAGES = 4
"""Images of a tag on the page: those with the highest gain and those with the lowest."""
SIDE = 224
"""Pixels of the longest side of a picture on the page."""
WORST_FIRST = ("underfitted", "contradictory", "unclear", "learned")
"""States in the order in which a reader has to look at their tags."""
assert set(WORST_FIRST) == set(STATES)


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """How pictures are drawn with a tag and without it."""

    tags: int = 16
    """Tags that pictures are drawn for. Each takes two pictures. 0: none."""
    steps: int = 28
    scale: float = 5.0
    """Strength of classifier-free guidance."""
    sampler: str = "euler_a"
    seed: int = 0
    negative_prompt: str | None = None


@dataclass(frozen=True, kw_only=True)
class Example:
    """An image of the dataset with a tag."""

    caption: str
    """The caption with the tag."""
    without: str
    """The caption without the tag."""
    width: int
    """Pixels of the image's bucket, a multiple of 8."""
    height: int
    read: Callable[[], bytes]
    """Returns the content of the image file. Raises OSError."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """An image of a tag on the page."""

    url: str | None
    """Data URL; None if the image cannot be decoded."""
    name: str
    gain: float
    held_out: bool


@dataclass(frozen=True, kw_only=True)
class Exhibit:
    """The pictures of one tag."""

    tag: str
    images: Sequence[Shown]
    """Highest gain first."""
    drawn: tuple[str, str] | None = None
    """Data URLs of the pictures that were drawn with the tag and without it."""
    prompt: str = ""
    """The caption with which the first of them was drawn."""

    @property
    def bytes(self) -> int:
        """Size on the page."""
        return sum(len(url) for url in (*(image.url or "" for image in self.images), *(self.drawn or ())))


def tags_to_show(report: Report, options: DrawOptions) -> list[tuple[str, bool]]:
    """The tags whose images the page shows, and whether pictures are drawn for them.

    Tags that are not learned come first. A quarter of the tags that pictures are drawn for are learned ones, to compare
    with.
    """
    rows = sorted(tag_rows(report.tags), key=worst_first)
    learned = [row.tag for row in rows if row.state == "learned"][::-1]
    others = [row.tag for row in rows if row.state != "learned"]
    kept = min(len(learned), max(options.tags // 4, options.tags - len(others)))
    drawn = others[: options.tags - kept] + learned[:kept]
    rest = [tag for tag in others + learned if tag not in set(drawn)]
    return [(tag, tag in drawn) for tag in (drawn + rest)[: max(MOST_SHOWN, len(drawn))]]


def worst_first(row: TagRow) -> tuple[int, float]:
    """Sorts tags by state, those that a reader has to look at first, and by what the model knows of them."""
    return WORST_FIRST.index(row.state), row.accuracy + row.gain


def make_exhibits(
    tags: Sequence[tuple[str, bool]],
    report: Report,
    example_of: Callable[[str, str], Example | None],
    model: PreviewModel | None,
    options: DrawOptions,
) -> list[Exhibit]:
    """Reads the images of these tags, and draws the pictures.

    Several processes may make a share of the tags each. `example_of` finds an image by tag and by its name in the
    images table. Without a model nothing is drawn. A picture that cannot be drawn is named in a warning.
    """
    own = pa.array([tag for tag, _ in tags], pa.string())
    images: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in report.images.filter(pa.compute.is_in(report.images["tag"], own)).to_pylist():
        images[row["tag"]].append(row)
    exhibits = []
    with track("pictures", len(tags), "tags") as progress:
        for tag, is_drawn in tags:
            rows = sorted(images[tag], key=lambda row: (-row["gain"], row["image"]))
            half = IMAGES // 2
            chosen = rows if len(rows) <= IMAGES else rows[:half] + rows[-half:]
            shown = [image for row in chosen if (image := _shown(row, example_of(tag, row["image"])))]
            drawn, prompt = None, ""
            if model and is_drawn and (example := _example(tag, rows, example_of)):
                drawn, prompt = _draw_pair(model, example, options, tag), example.caption
            exhibits.append(Exhibit(tag=tag, images=shown, drawn=drawn, prompt=prompt))
            progress.update(1)
    return exhibits


def _shown(row: Mapping[str, Any], example: Example | None) -> Shown | None:
    if example is None:
        return None
    return Shown(url=thumbnail(example.read, SIDE), name=row["image"], gain=row["gain"], held_out=row["held_out"])


def _example(
    tag: str, rows: Sequence[Mapping[str, Any]], example_of: Callable[[str, str], Example | None]
) -> Example | None:
    """The image whose caption is drawn: the first by name, of the held out ones if there are some."""
    for row in sorted(rows, key=lambda row: (not row["held_out"], row["image"])):
        if example := example_of(tag, row["image"]):
            return example
    return None


def _draw_pair(model: PreviewModel, example: Example, options: DrawOptions, tag: str) -> tuple[str, str] | None:
    """Draws the caption with the tag and without it, and returns the pictures as data URLs; None if this fails."""
    try:
        with_tag, without = (_draw(model, text, example, options) for text in (example.caption, example.without))
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        logger.warning("no pictures were drawn of the tag %s: %s: %s", tag, type(error).__name__, reason)
        return None
    return picture_url(with_tag, SIDE), picture_url(without, SIDE)


def _draw(model: PreviewModel, text: str, example: Example, options: DrawOptions) -> Image.Image:
    prompt = Prompt(
        prompt=text,
        negative_prompt=options.negative_prompt,
        width=example.width,
        height=example.height,
        steps=options.steps,
        scale=options.scale,
    )
    with torch.no_grad(), evaluating(model.sdxl):
        with model.autocast():
            latents = draw_latents(model, options.sampler, [prompt], [options.seed])
        with moved_to(model.device, model.vae):
            return to_image(model.vae, latents)
