"""Statistics of captions: their length in tokens, what is cut off, and captions that are equal.

Lengths are those of the captions as the model is given them, with prefix and suffix, whole and in order. They are
counted in a random sample of the images, because a caption takes a tenth of a millisecond.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int64

from sdxl_finetune.data.tokens import CHUNK, Tokenizer

LIMITS = (75, 150, 225)
"""Values of max_token_length that captions are compared with, besides the configured one."""
SAMPLE = 20_000
"""Captions whose tokens are counted; all captions if there are fewer. A share is then within 0.7 % of the truth."""
SEARCHED = 2000
"""Cut captions at most in which the tags that are cut off are looked for."""
EXAMPLES = 20
"""Most frequent tags among those that are cut off."""


@dataclass(frozen=True)
class Limit:
    """A value of max_token_length, and how much it cuts off in the sample."""

    tokens: int
    configured: bool
    cut: int
    """Captions that are longer."""
    lost: int
    """Tokens beyond the limit, in all these captions."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Lengths of captions in tokens, in a sample."""

    rows: Int64[np.ndarray, " k"]
    """Rows of the sample."""
    lengths: Int64[np.ndarray, " k"]
    lost: Int64[np.ndarray, " k"]
    """Tokens of each caption that the configured limit cuts off."""
    limits: Sequence[Limit]
    lost_tags: Sequence[tuple[str, int]]
    """Tags that are most often beyond the configured limit, and the number of captions in which they are."""
    searched: int
    """Cut captions in which the tags were looked for."""

    @property
    def configured(self) -> Limit:
        return next(limit for limit in self.limits if limit.configured)

    @property
    def median(self) -> int:
        return int(np.median(self.lengths))

    @property
    def longest(self) -> int:
        return int(self.lengths.max())


def measure_lengths(
    rows: Int64[np.ndarray, " k"],
    text_of: Callable[[int], str],
    separator_of: Callable[[int], str],
    tokenizer: Tokenizer,
) -> Lengths:
    """Counts the tokens of the captions of these rows. `text_of` gives the caption of a row as it is trained."""
    configured = tokenizer.chunks * CHUNK
    tokenizers = [replace(tokenizer, max_token_length=limit) for limit in sorted({*LIMITS, configured})]
    texts = map(text_of, rows.tolist())
    # Counts of all limits, because a limit that is read in chunks between BREAKs does not follow from the length.
    counts = [[(count.tokens, count.lost) for count in (one.count(text) for one in tokenizers)] for text in texts]
    found = np.array(counts, np.int64).reshape(len(rows), len(tokenizers), 2)
    lengths = found[:, 0, 0]
    beyond = {one.chunks * CHUNK: found[:, place, 1] for place, one in enumerate(tokenizers)}
    limits = [
        Limit(limit, limit == configured, int((lost > 0).sum()), int(lost.sum())) for limit, lost in beyond.items()
    ]
    cut = rows[beyond[configured] > 0][:SEARCHED].tolist()
    lost_tags: Counter[str] = Counter()
    for row in cut:
        lost_tags.update(set(_beyond(text_of(row), separator_of(row), tokenizer)))
    most = sorted(lost_tags.items(), key=lambda item: (-item[1], item[0]))[:EXAMPLES]
    lost = beyond[configured]
    return Lengths(rows=rows, lengths=lengths, lost=lost, limits=limits, lost_tags=most, searched=len(cut))


def _beyond(text: str, separator: str, tokenizer: Tokenizer) -> list[str]:
    """The tags of a caption that are at least partly beyond the limit."""
    tags = text.split(separator)
    low, high = 0, len(tags)  # the first `low` tags fit, and the first `high + 1` do not
    while low < high:
        middle = (low + high + 1) // 2
        if not tokenizer.count(separator.join(tags[:middle])).lost:
            low = middle
        else:
            high = middle - 1
    return [tag.strip() for tag in tags[low:] if tag.strip()]
