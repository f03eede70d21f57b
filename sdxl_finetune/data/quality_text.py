"""The quality tag of one caption: finds quality tags in a text, replaces them, and puts one in front.

A caption holds exactly one quality tag. If the text has some already, the first of them is replaced where it stands and
the others are removed. A text that holds the right tag alone is not changed. Without one, the tag comes first.
"""

import re
from functools import lru_cache

from sdxl_finetune.config.dataset import Subset
from sdxl_finetune.config.quality_options import QualityTag
from sdxl_finetune.data.tags import BREAK, comparable


def with_quality(options: Subset, line: str, tag: str) -> str:
    """The caption line with this quality tag, as it is written into a caption file."""
    parts, places = _find(options, line)
    return _replaced(options, parts, places, tag) if places else in_front(options, line, tag)


def take_quality(options: Subset, line: str, tag: str) -> tuple[str, str]:
    """Sets the quality tag of a caption line that is trained: returns the line, and what to put before its prefix.

    The tag goes to the front if the line has none, and if shuffling or tag dropout could change the place of the one
    that it has. The second result is empty if the tag stays in the line.
    """
    parts, places = _find(options, line)
    if not places:
        return line, tag
    if _stays(options, parts, places[0]):
        return _replaced(options, parts, places, tag), ""
    return without_places(options, parts, places), tag


def in_front(options: Subset, text: str, tag: str) -> str:
    """The text with the tag before it. The separator and space are those that join tags after shuffling."""
    return f"{tag}{options.caption_separator.rstrip()} {text}" if text.strip() else tag


@lru_cache(maxsize=1024)
def _grammar(tags: tuple[QualityTag, ...], separators: tuple[str, ...]) -> tuple[re.Pattern[str], frozenset[str]]:
    """A pattern that splits a caption, longer separators first, and the quality tags as they are compared."""
    longest_first = sorted(separators, key=len, reverse=True)
    marks = [rf"\b{BREAK}\b" if separator == BREAK else re.escape(separator) for separator in longest_first]
    pattern = re.compile(f"({'|'.join(marks)})")
    return pattern, frozenset(comparable(tag.tag) for tag in tags)


def split_line(options: Subset, line: str) -> list[str]:
    """Splits a caption line into tags, at even places, and the separators between them. Joined, they are the line."""
    return _subset_grammar(options)[0].split(line)


def _subset_grammar(options: Subset) -> tuple[re.Pattern[str], frozenset[str]]:
    own = (options.caption_separator, options.keep_tokens_separator, options.secondary_separator or "")
    separators = (*own, BREAK if options.caption_break else "")
    return _grammar(options.quality_tags or (), tuple(filter(None, separators)))


def _find(options: Subset, line: str) -> tuple[list[str], list[int]]:
    """The parts of a line, and the places of its quality tags."""
    parts, (_, names) = split_line(options, line), _subset_grammar(options)
    return parts, [place for place in range(0, len(parts), 2) if comparable(parts[place]) in names]


def _stays(options: Subset, parts: list[str], place: int) -> bool:
    """True if the tag at this place stays there when the caption is shuffled, and drops only with the whole caption."""
    if place == 0:
        return not options.caption_prefix  # the tag comes before a prefix
    if options.enable_wildcard and any("{" in part for part in parts[:place]):
        return False  # the wildcards before the tag may hold separators
    if not (options.shuffle_caption or options.token_warmup_step > 0 or options.caption_tag_dropout_rate > 0):
        return True
    mark, separator = options.keep_tokens_separator, options.caption_separator
    if mark and mark in parts[1::2]:
        return parts[1:place:2].count(mark) != 1  # the free tags are those between the first and the second mark
    before = (options.caption_prefix or "").count(separator) + parts[1:place:2].count(separator)
    before += 2 * parts[1:place:2].count(BREAK)  # the word counts as a tag, and ends the tag before it
    return before < options.keep_tokens


def _replaced(options: Subset, parts: list[str], places: list[int], tag: str) -> str:
    """The line with this tag at the first of the places, and without the tags at the others."""
    first, *others = places
    old = parts[first]
    if comparable(old) != comparable(tag):
        start = len(old) - len(old.lstrip())
        parts = [*parts[:first], old[:start] + tag + old[len(old.rstrip()) :], *parts[first + 1 :]]
    return without_places(options, parts, others)


def without_places(options: Subset, parts: list[str], places: list[int]) -> str:
    """The line without the tags at these places, each removed with a separator beside it.

    `keep_tokens_separator` and BREAK are never removed.
    """
    left, lasting = list(parts), (options.keep_tokens_separator, BREAK)
    for place in reversed(places):
        if place + 1 < len(left) and left[place + 1] not in lasting:
            del left[place : place + 2]
        elif place and left[place - 1] not in lasting:
            left[place - 1 : place + 1] = []
            left[place - 2] += " " * (place < len(left))  # BREAK is a word
        else:
            left[place] = " "
    line = "".join(left)
    line = line.lstrip() if 0 in places else line
    return line.rstrip() if len(parts) - 1 in places else line
