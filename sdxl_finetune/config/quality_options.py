"""Options of quality tags and of the weights of images."""

import math
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

from pydantic import BeforeValidator, Field

from sdxl_finetune.config.fields import FileLocation, OnlyWith, Options, Refused, Shown

MISSING_RULES = ("none", "skip", "stop")
"""Values of `quality_missing` besides the quality tags themselves."""
CONDITION = re.compile(r"([^<>=%]+?)(?:\s*(>=?)\s*(\S+)|\s+top\s+(\S+?)\s*%)?")
"""A quality tag with its condition: `masterpiece > 0.75`, `masterpiece top 10%`, or the tag alone."""
SHARE_WITHOUT_PERCENT = re.compile(r".*\btop\s*[\d.]+")


@dataclass(frozen=True)
class QualityTag:
    """A quality tag and the scores for which it stands. Without a bound and a share it stands for all other scores."""

    tag: str
    bound: float | None = None
    """The tag stands for scores above this number."""
    includes_bound: bool = False
    """True if the tag also stands for the bound itself."""
    share: float | None = None
    """The tag stands for this share of the images, those with the highest scores, in percent."""

    def __str__(self) -> str:
        if self.bound is not None:
            return f"{self.tag} {'>=' if self.includes_bound else '>'} {_number(self.bound)}"
        return self.tag if self.share is None else f"{self.tag} top {_number(self.share)}%"


def _hint(tag: str) -> str:
    return ": a decimal number has a point" if tag.isdecimal() else ""


def _as_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _number(value: float) -> str:
    return repr(value).removesuffix(".0")


def parse_quality_tags(text: str) -> tuple[QualityTag, ...]:
    """Returns the quality tags of a text such as `masterpiece > 0.75, high quality > 0.6, worst quality`.

    Raises Refused if a condition cannot be read or can never hold after the conditions before it.
    """
    tags = tuple(_parse_tag(part.strip()) for part in text.split(","))
    bounds = [tag.bound for tag in tags if tag.bound is not None]
    shares = [tag.share for tag in tags if tag.share is not None]
    if len({same_tag(tag.tag) for tag in tags}) < len(tags):
        raise Refused("a tag is named twice")
    if free := [tag.tag for tag in tags[:-1] if tag.bound is None and tag.share is None]:
        raise Refused(f"{free[0]!r} has no condition, and only the last tag can do without one{_hint(free[0])}")
    if wrong := [pair for pair in pairwise(bounds) if pair[1] >= pair[0]]:
        raise Refused(f"bounds must fall, and {_number(wrong[0][1])} comes after {_number(wrong[0][0])}")
    if wrong := [pair for pair in pairwise(shares) if pair[1] <= pair[0]]:
        raise Refused(f"shares must rise, and {_number(wrong[0][1])}% comes after {_number(wrong[0][0])}%")
    return tags


def _parse_tag(text: str) -> QualityTag:
    found = CONDITION.fullmatch(text)
    if found is None or SHARE_WITHOUT_PERCENT.fullmatch(text):
        raise Refused(f"{text!r} cannot be read")
    tag, sign, bound, share = found.groups()
    if bound is not None and not math.isfinite(_as_number(bound)):
        raise Refused(f"the bound {bound} is no finite number")
    if share is not None and not 0 < _as_number(share) <= 100:
        raise Refused(f"the share {share}% is not above 0 and at most 100 percent")
    return QualityTag(
        tag,
        bound=None if bound is None else float(bound),
        includes_bound=sign == ">=",
        share=None if share is None else float(share),
    )


def same_tag(tag: str) -> str:
    """Returns the form of a tag in which tags are compared: lower case, with spaces in place of underscores."""
    return " ".join(tag.replace("_", " ").split()).casefold()


def is_ending(scores: str) -> bool:
    """True if `quality_scores` is the ending of a file beside each image, and not the path of a file of scores."""
    return scores.startswith(".") and not set(scores) & set("/\\")


def _quality_tags(value: object) -> object:
    return parse_quality_tags(value) if isinstance(value, str) else value


QualityTags = Annotated[
    tuple[QualityTag, ...],
    BeforeValidator(_quality_tags),
    Shown('different tags, best first: "a > 0.7, b > 0.4, c", or shares of the images as "a top 10%, b top 30%, c"'),
]


class QualityOptions(Options):
    """Quality tags"""

    quality_tags: QualityTags | None = None
    """Tags by the score of an image, best first. The first one whose condition holds is set. Not in sd-scripts."""
    quality_scores: Annotated[str | None, OnlyWith("quality_tags")] = None
    """CSV, JSON, JSON Lines or Parquet file of scores, or ending of a file beside each image. Not in sd-scripts."""
    quality_column: Annotated[str, OnlyWith("quality_scores")] = Field("score", min_length=1)
    """Column or key of the scores in `quality_scores`. Not in sd-scripts."""
    quality_groups: Annotated[str | None, OnlyWith("quality_tags")] = None
    """Tags, as "safe, explicit", or `column:NAME`: shares are those of each group of images. Not in sd-scripts."""
    quality_missing: Annotated[str, OnlyWith("quality_tags")] = Field("none", min_length=1)
    """Images without a score: none (no tag), one of the tags, skip (left out) or stop (an error). Not in sd-scripts."""


class ImageWeightOptions(Options):
    """Weights of images"""

    image_weights: FileLocation | None = None
    """File of repeats and loss weights: rules by tag and path (.toml), or a row an image (.csv). Not in sd-scripts."""
