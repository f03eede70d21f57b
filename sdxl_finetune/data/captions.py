"""The caption of one image at one step, in the reference's caption grammar.

A caption is a list of tags, or several lines of which one is chosen. `caption` is a function of the options, the text,
epoch, step and a random generator, and keeps no state. It draws random numbers in the order of sd-scripts'
process_caption: caption dropout, line, wildcards from left to right, shuffle, and one number per tag for tag dropout.
`caption_sources` reads the texts beside an image.
"""

import itertools
import math
import random
import re
from collections.abc import Sequence

from sdxl_finetune.config.dataset import Subset
from sdxl_finetune.data.quality_text import in_front, take_quality
from sdxl_finetune.data.tags import BREAK, TagRules, tag_rules

WILDCARD = re.compile(r"\{\{|\}\}|\{((?:\}\}|[^}])+)\}(?!\})")
"""A doubled brace, or {options}. A doubled closing brace within the options is text."""
AS_WRITTEN = {
    "shuffle_caption": False,
    "caption_dropout_rate": 0.0,
    "caption_dropout_every_n_epochs": 0,
    "caption_tag_dropout_rate": 0.0,
    "token_warmup_step": 0,
    "draws_source": False,
}
"""Options of captions that are whole and in order. A wildcard {a|b} still becomes one of its options."""
BREAK_WORD = re.compile(rf"\b{BREAK}\b")


def caption(
    options: Subset,
    text: str,
    rng: random.Random,
    *,
    epoch: int,
    step: int,
    max_steps: int,
    whole: bool = False,
    quality: str | None = None,
) -> str:
    """The caption that the model is given for an image with caption file `text`. A dropped caption is "".

    `epoch` and `step` (optimizer steps) count from 0 at the start of training. `max_steps` is the length of the run; a
    `token_warmup_step` below 1 is a share of it. A `whole` text is no list of tags. `quality` is the quality tag of the
    image. It comes first, or stays where the text has one. It is never shuffled or dropped alone, and counts as one of
    `keep_tokens`.

    The reference's function is process_caption. We differ in two places. Prefix and suffix are added to the line that
    is chosen, and not to the first and the last line. Tags are joined again with `caption_separator` and a space, and
    not always with ", ".
    """
    if is_dropped(options, rng, epoch=epoch):
        return ""
    if "\n" in text:
        lines = text.split("\n")
        text = rng.choice(lines) if options.enable_wildcard else lines[0]
    front = ""
    if quality:
        text, front = take_quality(options, text, quality)
    if options.caption_prefix:
        text = f"{options.caption_prefix} {text}"
    if options.caption_suffix:
        text = f"{text} {options.caption_suffix}"
    if options.enable_wildcard:
        text = draw_wildcards(text, rng)
    if front:
        text = in_front(options, text, front)
    draws_tags = options.shuffle_caption or options.token_warmup_step > 0 or options.caption_tag_dropout_rate > 0
    if draws_tags and not whole:
        least_kept = 1 if quality else 0
        text = draw_tags(options, text, rng, step=step, max_steps=max_steps, least_kept=least_kept)
    if options.secondary_separator:
        text = text.replace(options.secondary_separator, options.caption_separator)
    return text


def draw_tags(options: Subset, text: str, rng: random.Random, *, step: int, max_steps: int, least_kept: int = 0) -> str:
    """Shuffles and drops the tags of a caption, and leaves out those that tag warm-up does not use yet.

    At least the first `least_kept` tags stay first.

    A protected tag keeps its place among the tags, and is always used. With `caption_break` the word BREAK does so too,
    and tags stay on their side of it.
    """
    rules, separator = tag_rules(options), options.caption_separator
    has_break = options.caption_break and BREAK in text
    if has_break:
        text = f"{separator}{BREAK}{separator}".join(_trim(part, separator) for part in BREAK_WORD.split(text))
    first, free, last = split_tags(options, text, least_kept=least_kept)
    fixed = _fixed_tags(options, rules, free) if rules or has_break else frozenset()
    limit = tag_limit(options, len(free) - len(fixed), step=step, max_steps=max_steps)
    if limit < len(free) - len(fixed):
        free, fixed = _first_tags(free, fixed, limit)
    if options.shuffle_caption:
        _shuffle(free, fixed, rng)
    if (rate := options.caption_tag_dropout_rate) > 0:
        kept = [at in fixed or rng.random() >= rate for at in range(len(free))]
        if rules and not all(kept):
            movable = [tag for at, tag in enumerate(free) if at not in fixed]
            drawn = (tag for tag, keep in zip(free, kept, strict=True) if not keep)
            followers = rules.dropped_with(drawn, movable)
            kept = [keep and (at in fixed or free[at] not in followers) for at, keep in enumerate(kept)]
        free = [tag for tag, keep in zip(free, kept, strict=True) if keep]
    # The space after the separator is the reference's, which always joins with ", ".
    glue, tags = f"{separator.rstrip()} ", [*first, *free, *last]
    if not has_break:
        return glue.join(tags)
    walls = [at for at, tag in enumerate(tags) if tag == BREAK]
    sections = itertools.pairwise([-1, *walls, len(tags)])
    return f" {BREAK} ".join(glue.join(tags[start + 1 : end]) for start, end in sections).strip()


def _trim(text: str, separator: str) -> str:
    """The text without white space and separators at its ends."""
    while (shorter := text.strip().removeprefix(separator).removesuffix(separator)) != text:
        text = shorter
    return text


def _fixed_tags(options: Subset, rules: TagRules | None, tags: Sequence[str]) -> frozenset[int]:
    """Places of protected tags, and of the word BREAK with `caption_break`."""
    walls = {at for at, tag in enumerate(tags) if tag == BREAK} if options.caption_break else set()
    return frozenset(walls.union(at for at, tag in enumerate(tags) if rules and rules.protected.holds(tag)))


def _first_tags(tags: Sequence[str], fixed: frozenset[int], limit: int) -> tuple[list[str], frozenset[int]]:
    """The fixed tags and the first `limit` of the others, and the places of the fixed tags among them."""
    movable = [at for at in range(len(tags)) if at not in fixed]
    places = sorted(fixed.union(movable[:limit]))
    return [tags[at] for at in places], frozenset(new for new, old in enumerate(places) if old in fixed)


def _shuffle(tags: list[str], fixed: frozenset[int], rng: random.Random) -> None:
    """Shuffles tags in place. Fixed tags keep their places, and no tag crosses a BREAK."""
    if not fixed:
        rng.shuffle(tags)
        return
    walls = [at for at in sorted(fixed) if tags[at] == BREAK]
    for start, end in itertools.pairwise([0, *walls, len(tags)]):
        places = [at for at in range(start, end) if at not in fixed]
        moved = [tags[at] for at in places]
        rng.shuffle(moved)
        for at, tag in zip(places, moved, strict=True):
            tags[at] = tag


def is_dropped(options: Subset, rng: random.Random, *, epoch: int) -> bool:
    """True if the caption is dropped: at random, or because all captions of this epoch are. The first epoch is 0."""
    if options.caption_dropout_rate > 0 and rng.random() < options.caption_dropout_rate:
        return True
    every = options.caption_dropout_every_n_epochs
    return every > 0 and (epoch + 1) % every == 0


def draw_wildcards(text: str, rng: random.Random) -> str:
    """Replaces each {a|b|c} by one of its options, and doubled braces by single braces. Wildcards do not nest."""

    def replace(match: re.Match[str]) -> str:
        choices = match.group(1)
        if choices is None:
            return match.group()[0]
        return rng.choice(choices.split("|")).replace("{{", "{").replace("}}", "}")

    return WILDCARD.sub(replace, text)


def split_tags(options: Subset, text: str, *, least_kept: int = 0) -> tuple[list[str], list[str], list[str]]:
    """Splits a caption into tags that stay first, free tags, which may be shuffled or dropped, and tags that stay last.

    The first `keep_tokens_separator` in the text ends the first tags, and the second one ends the free tags. A third
    one is text, and empty tags are removed. Without that separator the first `keep_tokens` tags stay, at least
    `least_kept`, and an empty tag counts as a tag.
    """
    mark, separator = options.keep_tokens_separator, options.caption_separator
    if mark and mark in text:
        first, _, rest = text.partition(mark)
        free, _, last = rest.partition(mark)
        parts = ([tag.strip() for tag in part.split(separator)] for part in (first, free, last))
        first_tags, free_tags, last_tags = ([tag for tag in part if tag] for part in parts)
        return first_tags, free_tags, last_tags
    tags = [tag.strip() for tag in text.strip().split(separator)]
    kept = max(options.keep_tokens, least_kept)
    return tags[:kept], tags[kept:], []


def tag_limit(options: Subset, count: int, *, step: int, max_steps: int) -> int:
    """Number of free tags that a caption has at `step`, of `count`.

    The number grows linearly from `token_warmup_min` at step 0 to `count` at `token_warmup_step`.
    """
    end = options.token_warmup_step
    if end < 1:
        end = math.floor(end * max_steps)
    if step >= end:
        return count
    return math.floor(step * ((count - options.token_warmup_min) / end)) + options.token_warmup_min
