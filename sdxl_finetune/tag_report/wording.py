"""A caption as the model is trained with it, and the same caption without one of its tags or with another in its place.

The caption is whole and in order: with prefix, suffix and quality tag, and joined as shuffled captions are. A wildcard
{a|b} becomes one of its options, chosen by the name of the image file.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sdxl_finetune.config import Subset
from sdxl_finetune.data.captions import caption
from sdxl_finetune.data.index import Entry
from sdxl_finetune.data.quality_text import split_line, without_places
from sdxl_finetune.data.tag_columns import TagPatterns
from sdxl_finetune.data.tags import WEIGHTED
from sdxl_finetune.data.unchanged import UNCHANGED, image_id
from sdxl_finetune.seeding import position_random

WARMED_UP = {"token_warmup_step": 1e-9}
"""Tag warm-up that ends before the first step. It makes `caption` split and join tags, and draws no random number."""


def trained_options(subset: Subset) -> Subset:
    """The options with which `caption` writes a whole caption in the form that training gives it."""
    draws_tags = subset.shuffle_caption or subset.token_warmup_step > 0 or subset.caption_tag_dropout_rate > 0
    return subset.model_copy(update=UNCHANGED | (WARMED_UP if draws_tags else {}))


@dataclass(frozen=True)
class Wording:
    """A caption, split at its tags."""

    options: Subset
    parts: Sequence[str]
    """Tags at even places, and between them the separators."""
    places: Mapping[int, Sequence[int]]
    """Places of the listed tags in the caption, by their number."""

    def whole(self) -> str:
        """The caption as it is trained."""
        return "".join(self.parts)

    def without(self, tag: int) -> str:
        """The caption without this tag and without a separator beside it."""
        return without_places(self.options, list(self.parts), list(self.places[tag]))

    def replaced(self, tag: int, other: str) -> str:
        """The caption with another tag at the place of this one. White space and brackets of weights stay."""
        parts = list(self.parts)
        for place in self.places[tag]:
            old = parts[place]
            bare = old.strip()
            start = old.index(bare)
            if weighted := WEIGHTED.fullmatch(bare):
                start, bare = start + weighted.start(1), weighted.group(1)
            parts[place] = old[:start] + other + old[start + len(bare) :]
        return "".join(parts)


def wordings(entry: Entry, options: Subset, listed: TagPatterns) -> Iterator[Wording]:
    """Yields the captions that an image may be trained with, one for each source that is a list of tags.

    The caption of the heaviest source comes first. `options` are those of `trained_options`.
    """
    sources = options.caption_sources
    order = sorted(range(len(entry.captions)), key=lambda at: -sources[at].weight if sources else at)
    for at in order:
        text = entry.captions[at]
        if text is None or (sources and sources[at].whole):
            continue
        rng = position_random(0, "tag report", *image_id(entry))
        text = caption(options, text, rng, epoch=0, step=0, max_steps=1, quality=entry.quality)
        parts = split_line(options, text)
        places: dict[int, list[int]] = {}
        for place in range(0, len(parts), 2):
            for tag in listed.match(parts[place].strip()):
                places.setdefault(tag, []).append(place)
        yield Wording(options, parts, places)
