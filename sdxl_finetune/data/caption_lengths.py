"""Counts the captions that `max_token_length` cuts off, and the tokens that they lose.

A large set is sampled, because five million captions would take minutes. Each caption is counted whole and in order:
with prefix, suffix and quality tag, from a source and a line drawn for it, and without dropout.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sdxl_finetune.config.dataset import Subset
from sdxl_finetune.data.caption_sources import choose_text
from sdxl_finetune.data.captions import AS_WRITTEN, BREAK_WORD, caption
from sdxl_finetune.data.index import Index
from sdxl_finetune.data.tokens import CHUNK, Tokenizer
from sdxl_finetune.seeding import draw_sample, position_random

SAMPLE = 10_000
"""Captions that are counted at most: about one second. Shares are then known to about 1 percentage point."""
ENOUGH = 0.99
"""Share of captions that a suggested `max_token_length` reads to the end, if not all."""
MOST_CHUNKS = 8
"""Most chunks of 75 tokens that are suggested. Longer captions are rather shortened."""


@dataclass(frozen=True)
class CaptionLengths:
    """How `max_token_length` fits the captions of a run."""

    captions: int
    """Captions in use."""
    counted: int
    """Captions that were counted: all of them, or a random sample."""
    cut: int
    """Counted captions that are cut off."""
    tokens: int
    """Tokens of the counted captions."""
    lost: int
    """Tokens of the counted captions that are cut off."""
    longest: int
    """Tokens of the longest counted caption."""
    max_token_length: int
    enough: int | None
    """A larger `max_token_length` that reads nearly all captions to the end. None: there is no sensible one."""
    breaks: int
    """Counted captions with the word BREAK, if it is read as a word."""

    def describe(self) -> Iterator[str]:
        """Sentences for the log. The first one counts; the others say what to do."""
        where = f"all {self.captions:,} captions"
        if self.counted < self.captions:
            where = f"a random sample of {self.counted:,} of {self.captions:,} captions"
        mean = self.tokens / max(1, self.counted)
        length = f"{mean:.0f} tokens on average and {self.longest:,} at most"
        if not self.cut:
            yield f"max_token_length = {self.max_token_length} cuts off none of {where}, which have {length}"
        else:
            yield (
                f"max_token_length = {self.max_token_length} cuts off {self.cut:,} ({self.cut / self.counted:.1%}) of"
                f" {where}, which have {length}: {self.lost:,} tokens ({self.lost / self.tokens:.1%}) are not read"
            )
            if self.enough:
                yield f"max_token_length = {self.enough} would read at least {ENOUGH:.0%} of the captions to the end"
            else:
                yield f"shorten the captions: more than {MOST_CHUNKS * CHUNK} tokens are hardly of use"
        if self.breaks:
            yield (
                f"{self.breaks:,} of them hold the word BREAK, which is read as a word, as in sd-scripts:"
                f" caption_break = true starts a new chunk of {CHUNK} tokens there"
            )


@dataclass(frozen=True)
class WholeCaptions:
    """Captions as the model is given them, whole, in order and with the quality tag.

    Source, line and wildcards are drawn as a function of the row and of `label`.
    """

    index: Index
    label: str

    def text(self, row: int) -> str:
        """The caption of this row."""
        subset, rng = self._options[self.index.subset[row]], position_random(0, self.label, row)
        source = choose_text(subset, self.index.captions(row, row + 1)[0], rng.random)
        quality = self.index.quality_tag(row)
        return caption(subset, source.text, rng, epoch=0, step=0, max_steps=1, whole=source.whole, quality=quality)

    @cached_property
    def _options(self) -> list[Subset]:
        return [subset.model_copy(update=AS_WRITTEN | {"draws_source": True}) for subset in self.index.subsets]


def measure_captions(index: Index, tokenizer: Tokenizer, sample: int = SAMPLE) -> CaptionLengths:
    """Counts the captions that are trained on or validated, or a random sample of `sample` of them."""
    rows = np.flatnonzero(index.used)
    chosen = draw_sample(rows, sample, "caption lengths")
    whole = WholeCaptions(index, "caption lengths")
    counts, chunks, breaks = [], np.zeros(len(chosen), np.int64), 0
    for place, row in enumerate(chosen.tolist()):
        text = whole.text(row)
        count = tokenizer.count(text)
        counts.append((count.tokens, count.lost))
        chunks[place] = count.chunks
        breaks += not tokenizer.breaks and BREAK_WORD.search(text) is not None
    tokens, lost = np.array(counts, np.int64).reshape(-1, 2).T
    return CaptionLengths(
        captions=len(rows),
        counted=len(chosen),
        cut=int((lost > 0).sum()),
        tokens=int(tokens.sum()),
        lost=int(lost.sum()),
        longest=int(tokens.max(initial=0)),
        max_token_length=tokenizer.chunks * CHUNK,
        enough=_enough(chunks, tokenizer.chunks),
        breaks=breaks,
    )


def _enough(chunks: np.ndarray, read: int) -> int | None:
    """The next number of tokens that reads enough captions to the end. `chunks` are those that each caption needs."""
    for number in range(read + 1, MOST_CHUNKS + 1):
        if (chunks <= number).mean() >= ENOUGH:
            return number * CHUNK
    return None
