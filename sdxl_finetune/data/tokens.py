"""Turns captions into token ids for SDXL's two CLIP text encoders.

Both encoders read CLIP's byte-pair encoding. A caption of more than 75 tokens is cut, even inside a word, into chunks
of 75 tokens that each have their own start and end token. With `breaks` the word BREAK starts a new chunk. The two
encoders differ only in the id that fills up a chunk: the end token for encoder 1, id 0 for encoder 2. The ids equal
those of transformers' slow CLIPTokenizer with ftfy, which sd-scripts uses; docs/differences.md names the exceptions.
"""

import functools
import hashlib
import itertools
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import ftfy
import numpy as np
import torch
from torch import Tensor

from sdxl_finetune.batch import Tokens
from sdxl_finetune.clip_vocabulary import (
    END,
    END_TOKEN,
    FILL_2,
    START,
    START_TOKEN,
    WORD_END,
    load_merges,
    load_vocabulary,
)
from sdxl_finetune.config import ModelOptions
from sdxl_finetune.errors import Problem, UserError

CHUNK = 75
"""Caption tokens in a chunk. CLIP reads 77 positions; the start and the end token take two."""
SPECIAL_IDS = {START_TOKEN: START, END_TOKEN: END}
SPECIAL_NAME = re.compile(f"({'|'.join(map(re.escape, SPECIAL_IDS))})")
SAVED_NAMES = ("openai_clip-vit-large-patch14", "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k")
"""Folders in sd-scripts' `tokenizer_cache_dir`: the tokenizer of encoder 1, then that of encoder 2."""
PROBE, PROBE_IDS = "a photo of a cat", [320, 1125, 539, 320, 2368]
"""A caption and its ids, by which a saved tokenizer is recognised as CLIP's."""
WORD = r"\p{L}+|\p{N}|'(?:[stmd]|re|ve|ll)|[^\s\p{L}\p{N}]+"
"""Regular expression of one word of CLIP: letters, one digit, an English ending such as 's, or other marks."""
WEIGHT_MARK = re.compile(
    r"\\(?P<escaped>[\\()\[\]]?)"
    r"|:(?P<weight>[+-]?(?:\d{1,9}(?:\.\d*)?|\.\d+))\)"
    r"|(?P<bracket>[()\[\]])"
    r"|(?P<plain>[^\\()\[\]:]+|:)"
)
BRACKET_WEIGHT = {"(": 1.1, "[": 1 / 1.1}
"""Factor on the weight of text between brackets without a number."""

BREAK = re.compile(r"\bBREAK\b")
PLAIN_WORD = re.compile(r"(?:^|[\s,])[a-z]{2,}(?=[\s,]|$)")
"""A word that is a token in every reading of a caption: as a tag, and with weights."""
ASCII_WORD = re.compile(r"[A-Za-z]+|[0-9]|'(?:[stmd]|re|ve|ll)|[^\sA-Za-z0-9]+", re.ASCII)
"""WORD for text of ASCII characters."""
MOST_WORDS = 1 << 16
"""Different words whose ids a process remembers, about 15 MB. Nearly all words of captions are found there."""

Encode = Callable[[str], list[int]]
"""Returns the ids of clean lower-case text, without start and end token."""

logger = logging.getLogger(__name__)


class Count(NamedTuple):
    """Tokens of a whole caption."""

    tokens: int
    lost: int
    """Tokens that are cut off."""
    chunks: int
    """Chunks of 75 that the whole caption needs."""


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Turns captions into Tokens.

    A Tokenizer holds settings only, so it is cheap to pickle. Each process that uses one loads the vocabulary itself.
    """

    max_token_length: int | None
    """Tokens of a caption that are read, rounded down to a multiple of 75 (255 becomes 225). None means 75."""
    weighted: bool = False
    """True if (brackets:1.3) and [brackets] are weights, as with `weighted_captions`. False if they are text."""
    breaks: bool = False
    """True if the word BREAK starts a new chunk, as with `caption_break`. False if it is text."""
    folders: tuple[Path | None, Path | None] = (None, None)
    """Saved tokenizers for encoder 1 and encoder 2. None is the package's vocabulary."""

    def __call__(self, captions: Sequence[str]) -> Tokens:
        """Returns the tokens of k captions. Encoder 2 uses the weights of encoder 1's tokens, as in sd-scripts."""
        sections = [self._sections(caption) for caption in captions]
        first = [self._encode(caption, 0) for caption in sections]
        second = first
        if self.folders[0] != self.folders[1]:
            second = [self._encode(caption, 1) for caption in sections]
        weights = None
        if self.weighted:
            weights = self._fill([[weights for _, weights in caption] for caption in first], (1.0, 1.0, 1.0))
        ids1 = self._fill([[ids for ids, _ in caption] for caption in first], (START, END, END))
        ids2 = self._fill([[ids for ids, _ in caption] for caption in second], (START, END, FILL_2))
        return Tokens(ids1, ids2, weights)

    @property
    def positions(self) -> int:
        """Positions of the joined hidden states of a caption."""
        return self.chunks * CHUNK + 2

    def identity(self) -> str:
        """A text that is equal for tokenizers that give the same tokens of every caption."""
        contents = [_hash_of_files(folder) if folder else "" for folder in self.folders]
        return f"{self.chunks} {self.weighted} {contents}" + (" break" if self.breaks else "")

    def count(self, caption: str) -> "Count":
        """Counts the tokens of a whole caption for encoder 1."""
        sections = [ids for ids, _ in self._encode(self._sections(caption), 0)]
        parts = split_chunks(sections)
        tokens = sum(map(len, sections))
        return Count(tokens, tokens - sum(map(len, parts[: self.chunks])), len(parts))

    def is_empty(self, caption: str) -> bool:
        """True if no token of the caption is read, as of a dropped caption. `Tokens.empty` says the same of tokens."""
        if PLAIN_WORD.search(caption) and not (self.breaks and "BREAK" in caption):
            return False  # most captions need not be encoded to know it
        count = self.count(caption)
        return count.tokens == count.lost

    def _sections(self, caption: str) -> list[list[tuple[str, float]]]:
        """The sections of a caption between BREAKs, each as pieces of text with their weights."""
        pieces = parse_weights(caption) if self.weighted else [(caption, 1.0)]
        return split_at_breaks(pieces) if self.breaks and "BREAK" in caption else [pieces]

    def _encode(self, sections: list[list[tuple[str, float]]], number: int) -> list[tuple[list[int], list[float]]]:
        encode = load_encoding(self.folders[number])
        return [_encode_pieces(pieces, encode) for pieces in sections]

    @property
    def chunks(self) -> int:
        """Chunks of 75 tokens that are read of each caption."""
        return (self.max_token_length or CHUNK) // CHUNK

    def _fill(self, captions: Sequence[Sequence[list]], values: tuple[int | float, ...]) -> Tensor:
        """The chunks of all captions, (k, chunks, 77). Each is start, up to 75 of the section's values, end and fill.

        `values` are start, end and fill. Chunks beyond `max_token_length` are left out.
        """
        start, end, fill = values
        filled = np.full((len(captions), self.chunks, CHUNK + 2), fill, np.int64 if type(fill) is int else np.float32)
        filled[:, :, 0], filled[:, :, 1] = start, end
        for row, sections in zip(filled, captions, strict=True):
            for chunk, part in zip(row, split_chunks(sections), strict=False):
                chunk[1 : 1 + len(part)] = part
                chunk[1 + len(part)] = end
        return torch.from_numpy(filled)


def build_tokenizer(
    *,
    max_token_length: int | None,
    weighted_captions: bool = False,
    caption_break: bool = False,
    tokenizer_cache_dir: Path | None = None,
) -> Tokenizer:
    """Returns the tokenizer of a run.

    The run uses the tokenizers that sd-scripts saved in `tokenizer_cache_dir`. For a missing tokenizer it uses the
    package's vocabulary, which is the same; sd-scripts would download the tokenizer. Raises UserError if a saved
    tokenizer is not CLIP's.
    """
    folders: list[Path | None] = [None, None]
    problems = []
    if tokenizer_cache_dir is not None:
        saved = [tokenizer_cache_dir / name for name in SAVED_NAMES]
        folders = [folder if folder.is_dir() else None for folder in saved]
        problems = [_not_clip(folder) for folder in folders if folder and not _is_clip(folder)]
        if folders == [None, None]:
            logger.warning(
                "tokenizer_cache_dir: %s contains neither %s nor %s. The vocabulary of this package is used, which is "
                "the same. Remove tokenizer_cache_dir, or set it to the folder that sd-scripts used.",
                tokenizer_cache_dir,
                *SAVED_NAMES,
            )
    if problems:
        raise UserError(problems)
    return Tokenizer(
        max_token_length=max_token_length,
        weighted=weighted_captions,
        breaks=caption_break,
        folders=(folders[0], folders[1]),
    )


def tokenizer_of(options: ModelOptions) -> Tokenizer:
    """The tokenizer of a run. Raises UserError if a saved tokenizer is not CLIP's."""
    return build_tokenizer(
        max_token_length=options.max_token_length,
        weighted_captions=options.weighted_captions,
        caption_break=options.caption_break,
        tokenizer_cache_dir=options.tokenizer_cache_dir,
    )


def _hash_of_files(folder: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(f"{path.name} {path.stat().st_size} ".encode() + path.read_bytes())
    return digest.hexdigest()


def _is_clip(folder: Path) -> bool:
    try:
        return load_encoding(folder)(PROBE) == PROBE_IDS
    except Exception:  # tokenizers raises no narrower class for a file that it cannot read
        return False


def _not_clip(folder: Path) -> Problem:
    message = "contains no CLIP tokenizer. Put CLIP's vocab.json and merges.txt into this folder, or remove the folder."
    return Problem(message, key="tokenizer_cache_dir", file=str(folder))


@functools.cache
def load_encoding(folder: Path | None) -> Encode:
    """Returns the byte-pair encoding of the tokenizer saved in `folder`, or of the package's vocabulary for None.

    A process loads each encoding once.
    """
    if folder is None:
        return _build_encoding()
    from transformers import CLIPTokenizer

    saved = CLIPTokenizer.from_pretrained(folder, model_max_length=10**9, local_files_only=True)
    return lambda text: saved(text, add_special_tokens=False).input_ids


def _build_encoding() -> Encode:
    """Returns CLIP's byte-pair encoding, made from the package's vocabulary."""
    from tokenizers import Regex, models, pre_tokenizers
    from tokenizers import Tokenizer as Pipeline

    pipeline = Pipeline(models.BPE(load_vocabulary(), list(load_merges()), end_of_word_suffix=WORD_END))
    words = pre_tokenizers.Split(Regex(WORD), "removed", invert=True)
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pipeline.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    known: dict[str, list[int]] = {}

    def encode(text: str) -> list[int]:
        # The words of ASCII text, the usual caption, are looked up. That is ten times faster than the pipeline.
        if not (text.isascii() and text.isprintable()):
            return list(pipeline.encode(text).ids)
        ids: list[int] = []
        for word in ASCII_WORD.findall(text):
            if (found := known.get(word)) is None:
                found = pipeline.encode(word).ids
                if len(known) < MOST_WORDS:
                    known[word] = found
            ids += found
        return ids

    return encode


def token_ids(text: str, encode: Encode) -> list[int]:
    """Returns all ids of `text`, without start and end token.

    The name of a special token, written out in the text, becomes that token. The text around such a name is cleaned
    and encoded piece by piece, in the order of CLIPTokenizer.
    """
    if "<|" not in text:
        return encode(_clean(text).lower())
    ids: list[int] = []
    for piece in SPECIAL_NAME.split(text):
        ids += [SPECIAL_IDS[piece]] if piece in SPECIAL_IDS else encode(_clean(piece).lower())
    return ids


def _clean(text: str) -> str:
    """Returns `text` with ftfy's repairs: broken encodings, HTML entities, curly quotes, full-width letters.

    Plain ASCII, the usual caption, needs no repair. It skips ftfy, which takes longer than the encoding.
    """
    return text if text.isascii() and text.isprintable() and "&" not in text else ftfy.fix_text(text)


def _encode_pieces(pieces: list[tuple[str, float]], encode: Encode) -> tuple[list[int], list[float]]:
    """Returns the ids of weighted pieces of text, and the weight of each id."""
    encoded = [(token_ids(text, encode), weight) for text, weight in pieces]
    return [id for ids, _ in encoded for id in ids], [weight for ids, weight in encoded for _ in ids]


def split_chunks(sections: Sequence[list]) -> list[list]:
    """Splits the values of each section into chunks of up to 75. An empty section before another is an empty chunk."""
    if len(sections) > 1 and not sections[-1]:
        sections = sections[:-1]
    return [part[start : start + CHUNK] for part in sections for start in range(0, len(part) or 1, CHUNK)]


def split_at_breaks(pieces: Sequence[tuple[str, float]]) -> list[list[tuple[str, float]]]:
    """Splits weighted pieces of text at the word BREAK, which must be upper case and a word of its own.

    The rule is that of AUTOMATIC1111's web UI. We differ: BREAK within weighted brackets also starts a chunk.
    """
    sections: list[list[tuple[str, float]]] = [[]]
    for text, weight in pieces:
        for number, part in enumerate(BREAK.split(text)):
            if number:
                sections.append([])
            sections[-1].append((part, weight))
    return sections


def parse_weights(text: str) -> list[tuple[str, float]]:
    """Returns the pieces of a weighted caption and their weights, in the syntax of AUTOMATIC1111's web UI.

    (a) weighs 1.1, (a:1.3) weighs 1.3 and [a] weighs 1 / 1.1. Weights of nested brackets multiply. An open bracket
    ends with the text. A backslash turns the bracket or backslash after it into text. Neighbours of the same weight
    are one piece, because a word cannot continue in the next piece. A malformed number is text; sd-scripts raises
    ValueError.
    """
    texts: list[str] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        for index in range(opened[bracket].pop(), len(weights)):
            weights[index] *= factor

    for match in WEIGHT_MARK.finditer(text):
        bracket = match["bracket"]
        if match["weight"] and opened["("]:
            close("(", float(match["weight"]))
        elif bracket in (")", "]") and opened[opener := "(" if bracket == ")" else "["]:
            close(opener, BRACKET_WEIGHT[opener])
        elif bracket in opened:
            opened[bracket].append(len(texts))
        else:
            texts.append(match["escaped"] if match["escaped"] is not None else match.group())
            weights.append(1.0)
    for bracket, factor in BRACKET_WEIGHT.items():
        while opened[bracket]:
            close(bracket, factor)
    groups = itertools.groupby(zip(texts, weights, strict=True), key=lambda piece: piece[1])
    return [("".join(text for text, _ in group), weight) for weight, group in groups]
