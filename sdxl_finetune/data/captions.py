"""The caption of one image at one step, in the reference's caption grammar.

A caption is a list of tags, or several lines to choose from. `caption` is a function of the rules, the text,
the position (epoch, step) and a generator, and keeps no state. It draws where and in the order in which
sd-scripts' process_caption draws: caption dropout, line, wildcards from left to right, shuffle, one draw per
tag for tag dropout. `read_caption` finds the text beside an image.
"""

import math
import random
import re
from pathlib import Path

from sdxl_finetune.config.dataset import Subset
from sdxl_finetune.errors import Problem, UserError

WILDCARD = re.compile(r"\{\{|\}\}|\{((?:\}\}|[^}])+)\}(?!\})")
"""A doubled brace, or {options}, in which a doubled closing brace is text."""
FACE_NAME = re.compile(r"(.+)(?:_\d+){4}")
"""The name of a picture cut out by a face detector: the name of the original and four numbers."""


def caption(rules: Subset, text: str, rng: random.Random, *, epoch: int, step: int, max_steps: int) -> str:
    """What the model reads for an image whose caption is `text`; a dropped caption is "".

    `epoch` and `step` (optimizer steps) count from 0 at the start of training; `max_steps` is the length of
    the run, of which a `token_warmup_step` below 1 is a share. In the reference: process_caption. We differ
    where a caption has several lines: prefix and suffix belong to whichever line is taken, not to the first
    and the last.
    """
    if rules.caption_dropout_rate > 0 and rng.random() < rules.caption_dropout_rate:
        return ""
    if rules.caption_dropout_every_n_epochs > 0 and (epoch + 1) % rules.caption_dropout_every_n_epochs == 0:
        return ""
    if "\n" in text:
        lines = text.split("\n")
        text = rng.choice(lines) if rules.enable_wildcard else lines[0]
    if rules.caption_prefix:
        text = f"{rules.caption_prefix} {text}"
    if rules.caption_suffix:
        text = f"{text} {rules.caption_suffix}"
    if rules.enable_wildcard:
        text = draw_wildcards(text, rng)
    if rules.shuffle_caption or rules.token_warmup_step > 0 or rules.caption_tag_dropout_rate > 0:
        first, free, last = split_tags(rules, text)
        free = free[: tag_limit(rules, len(free), step=step, max_steps=max_steps)]
        if rules.shuffle_caption:
            rng.shuffle(free)
        if rules.caption_tag_dropout_rate > 0:
            free = [tag for tag in free if rng.random() >= rules.caption_tag_dropout_rate]
        text = ", ".join([*first, *free, *last])
    if rules.secondary_separator:
        text = text.replace(rules.secondary_separator, rules.caption_separator)
    return text


def draw_wildcards(text: str, rng: random.Random) -> str:
    """Replaces each {a|b|c} by one of its options, and doubled braces by single ones. Groups do not nest."""

    def replace(match: re.Match[str]) -> str:
        options = match.group(1)
        if options is None:
            return match.group()[0]
        return rng.choice(options.split("|")).replace("{{", "{").replace("}}", "}")

    return WILDCARD.sub(replace, text)


def split_tags(rules: Subset, text: str) -> tuple[list[str], list[str], list[str]]:
    """The tags that stay first, those that may move or go, and those that stay last.

    Where the text has `keep_tokens_separator`, it divides the first from the free tags and, met again, these
    from the last (a third one is text); empty tags go. Else the first `keep_tokens` tags stay; an empty tag
    counts.
    """
    mark, separator = rules.keep_tokens_separator, rules.caption_separator
    if mark and mark in text:
        first, _, rest = text.partition(mark)
        free, _, last = rest.partition(mark)
        parts = ([tag.strip() for tag in part.split(separator)] for part in (first, free, last))
        first_tags, free_tags, last_tags = ([tag for tag in part if tag] for part in parts)
        return first_tags, free_tags, last_tags
    tags = [tag.strip() for tag in text.strip().split(separator)]
    return tags[: rules.keep_tokens], tags[rules.keep_tokens :], []


def tag_limit(rules: Subset, count: int, *, step: int, max_steps: int) -> int:
    """How many of `count` free tags a caption has at `step`: from `token_warmup_min` at step 0 in a straight
    line to all of them at `token_warmup_step`."""
    end = rules.token_warmup_step
    if end < 1:
        end = math.floor(end * max_steps)
    if step >= end:
        return count
    return math.floor(step * ((count - rules.token_warmup_min) / end)) + rules.token_warmup_min


def caption_paths(image: Path, rules: Subset) -> list[Path]:
    """The files in which the caption of an image is looked for, in this order."""
    extension = "." + rules.caption_extension.removeprefix(".")
    names = [image.stem]
    if face := FACE_NAME.fullmatch(image.stem):
        names.append(face.group(1))
    return [image.with_name(name + extension) for name in names]


def read_caption(image: Path, rules: Subset) -> str:
    """The text of the caption file beside `image`: its lines, stripped, without the empty ones.

    Without a file it is the subset's `class_tokens`, else ""; a face cutout (`name_100_200_30_40.png`) may
    share the file of `name`. All lines are kept whatever the rules are: `caption` picks. Raises UserError for
    a file that cannot be read or is not UTF-8. In the reference: read_caption of DreamBoothDataset; unlike
    there a byte order mark is not text, an empty first line does not empty the caption, and an empty file is
    no error.
    """
    for path in caption_paths(image, rules):
        try:
            lines = path.read_bytes().decode("utf-8-sig").replace("\r", "\n").split("\n")
        except (FileNotFoundError, IsADirectoryError):
            continue
        except UnicodeDecodeError as error:
            message = f"the caption is not UTF-8 (byte {error.start}): save it as UTF-8"
            raise UserError(Problem(message, file=str(path))) from error
        except OSError as error:
            raise UserError(Problem(f"the caption cannot be read: {error}", file=str(path))) from error
        return "\n".join(stripped for line in lines if (stripped := line.strip()))
    return rules.class_tokens or ""
