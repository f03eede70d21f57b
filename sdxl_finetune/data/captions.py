"""The caption of one image at one step, in the reference's caption grammar.

A caption is a list of tags, or several lines of which one is chosen. `caption` is a function of the options, the text,
epoch, step and a random generator, and keeps no state. It draws random numbers in the order of sd-scripts'
process_caption: caption dropout, line, wildcards from left to right, shuffle, and one number per tag for tag dropout.
`read_caption` reads the text beside an image.
"""

import math
import os
import random
import re
from pathlib import Path

from sdxl_finetune.config.dataset import Subset
from sdxl_finetune.data.faces import FACE_NAME
from sdxl_finetune.data.quality_text import in_front, take_quality
from sdxl_finetune.errors import Problem, UserError

WILDCARD = re.compile(r"\{\{|\}\}|\{((?:\}\}|[^}])+)\}(?!\})")
"""A doubled brace, or {options}. A doubled closing brace within the options is text."""
AS_WRITTEN = {
    "shuffle_caption": False,
    "caption_dropout_rate": 0.0,
    "caption_dropout_every_n_epochs": 0,
    "caption_tag_dropout_rate": 0.0,
    "token_warmup_step": 0,
}
"""Options of captions that are whole and in order. A wildcard {a|b} still becomes one of its options."""


def caption(
    options: Subset, text: str, rng: random.Random, *, epoch: int, step: int, max_steps: int, quality: str | None = None
) -> str:
    """The caption that the model is given for an image with caption file `text`. A dropped caption is "".

    `epoch` and `step` (optimizer steps) count from 0 at the start of training. `max_steps` is the length of the run; a
    `token_warmup_step` below 1 is a share of it. `quality` is the quality tag of the image. It comes first, or stays
    where the text has one. It is never shuffled or dropped alone, and counts as one of `keep_tokens`.

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
    if options.shuffle_caption or options.token_warmup_step > 0 or options.caption_tag_dropout_rate > 0:
        first, free, last = split_tags(options, text, least_kept=1 if quality else 0)
        free = free[: tag_limit(options, len(free), step=step, max_steps=max_steps)]
        if options.shuffle_caption:
            rng.shuffle(free)
        if options.caption_tag_dropout_rate > 0:
            free = [tag for tag in free if rng.random() >= options.caption_tag_dropout_rate]
        # The space after the separator is the reference's, which always joins with ", ".
        text = f"{options.caption_separator.rstrip()} ".join([*first, *free, *last])
    if options.secondary_separator:
        text = text.replace(options.secondary_separator, options.caption_separator)
    return text


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


def caption_paths(image: str, options: Subset) -> list[str]:
    """The paths where an image's caption file may be, in the order in which they are tried.

    Paths are text here, because the scan calls this for millions of images, and Path is ten times slower.
    """
    extension = "." + options.caption_extension.removeprefix(".")
    folder, name = os.path.split(os.path.splitext(image)[0])  # noqa: PTH122
    stems = [name]
    if face := FACE_NAME.fullmatch(name):
        stems.append(face.group(1))
    return [os.path.join(folder, stem + extension) for stem in stems]  # noqa: PTH118


def read_caption(image: Path, options: Subset) -> str:
    """Reads the caption file beside `image`: all its lines, stripped, without empty lines.

    Without a caption file the result is the subset's `class_tokens`, or "". A face cutout
    (`name_100_200_30_40.png`) may share the caption file of `name`. `caption` chooses the line later.

    Raises UserError for a file that cannot be read or is not UTF-8.

    The reference's function is read_caption of DreamBoothDataset. We differ: a byte order mark is not text, an empty
    first line does not make the caption empty, and an empty file is not an error.
    """
    for path in caption_paths(str(image), options):
        try:
            lines = Path(path).read_bytes().decode("utf-8-sig").replace("\r", "\n").split("\n")
        except (FileNotFoundError, IsADirectoryError):
            continue
        except UnicodeDecodeError as error:
            message = f"the caption is not UTF-8 (byte {error.start}): save it as UTF-8"
            raise UserError(Problem(message, file=path)) from error
        except OSError as error:
            message = f"the caption file cannot be read ({error}): check its permissions"
            raise UserError(Problem(message, file=path)) from error
        return "\n".join(stripped for line in lines if (stripped := line.strip()))
    return options.class_tokens or ""
