"""Captions as token ids for SDXL's two CLIP text encoders.

Both encoders read the same byte-pair encoding and differ in what fills up a chunk: the end token for encoder
1, id 0 for encoder 2. A caption of more than 75 tokens is cut, wherever that falls, into chunks of 75 that
each have their own start and end. The vocabulary is the one inside instant-clip-tokenizer, so that nothing is
downloaded; the ids are those of the CLIPTokenizer (the one written in Python, with ftfy) that sd-scripts
uses.
"""

import functools
import itertools
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import ftfy
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from sdxl_finetune.errors import Problem, UserError

CHUNK = 75
"""Tokens of a caption that fit between start and end."""
START, END, FILL2 = 49406, 49407, 0
SPECIAL = {"<|startoftext|>": START, "<|endoftext|>": END}
SPECIAL_NAME = re.compile(f"({'|'.join(map(re.escape, SPECIAL))})")
SAVED_NAMES = ("openai_clip-vit-large-patch14", "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k")
"""What sd-scripts calls the two tokenizers' folders in its `tokenizer_cache_dir`."""
PROBE, PROBE_IDS = "a photo of a cat", [320, 1125, 539, 320, 2368]
WEIGHT_MARK = re.compile(
    r"\\(?P<escaped>[\\()\[\]]?)"
    r"|:(?P<weight>[+-]?(?:\d{1,9}(?:\.\d*)?|\.\d+))\)"
    r"|(?P<bracket>[()\[\]])"
    r"|(?P<plain>[^\\()\[\]:]+|:)"
)
BRACKET_WEIGHT = {"(": 1.1, "[": 1 / 1.1}

logger = logging.getLogger(__name__)


class Tokens(NamedTuple):
    """What the two encoders read for k captions."""

    ids1: Int64[Tensor, "k chunks 77"]
    ids2: Int64[Tensor, "k chunks 77"]
    weights: Float32[Tensor, "k chunks 77"] | None


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Turns captions into Tokens. A plain value: a worker process that is given it loads the vocabulary itself."""

    max_token_length: int | None
    """Tokens of a caption that are read, rounded down to a multiple of 75 (255 is 225); None is 75."""
    weighted: bool = False
    """Whether (brackets:1.3) and [brackets] are weights, as in `weighted_captions`, and not text."""
    folders: tuple[Path | None, Path | None] = (None, None)
    """Saved tokenizers to use, for encoder 1 and 2, in place of the vocabulary inside."""

    def __call__(self, captions: Sequence[str]) -> Tokens:
        """The tokens of k captions; the weights are those of encoder 1's tokens, which encoder 2 shares."""
        parsed = [self._parse(text) for text in captions]
        first = [_encode(parts, load_vocabulary(self.folders[0])) for parts in parsed]
        second = first
        if self.folders[0] != self.folders[1]:
            second = [_encode(parts, load_vocabulary(self.folders[1])) for parts in parsed]
        weights = None
        if self.weighted:
            weights = self._tensor([chunks(row, self._chunks, 1.0, 1.0, 1.0) for _, row in first], torch.float32)
        return Tokens(
            ids1=self._tensor([chunks(ids, self._chunks, START, END, END) for ids, _ in first], torch.int64),
            ids2=self._tensor([chunks(ids, self._chunks, START, END, FILL2) for ids, _ in second], torch.int64),
            weights=weights,
        )

    def length(self, caption: str) -> int:
        """Tokens of a whole caption, as encoder 1 counts them, however many of them are read."""
        return len(_encode(self._parse(caption), load_vocabulary(self.folders[0]))[0])

    def _parse(self, caption: str) -> list[tuple[str, float]]:
        return parse_weights(caption) if self.weighted else [(caption, 1.0)]

    @property
    def _chunks(self) -> int:
        return (self.max_token_length or CHUNK) // CHUNK

    def _tensor(self, rows: list, dtype: torch.dtype) -> Tensor:
        return torch.tensor(rows, dtype=dtype).reshape(len(rows), self._chunks, CHUNK + 2)


def build_tokenizer(
    *, max_token_length: int | None, weighted_captions: bool = False, tokenizer_cache_dir: Path | None = None
) -> Tokenizer:
    """The tokenizer of a run. Tokenizers that sd-scripts saved in `tokenizer_cache_dir` are used; where there
    are none (it downloads them then) the vocabulary inside serves, which is the same. Raises UserError for a
    folder that holds something else."""
    folders: list[Path | None] = [None, None]
    problems = []
    if tokenizer_cache_dir is not None:
        present = [tokenizer_cache_dir / name for name in SAVED_NAMES]
        folders = [folder if folder.is_dir() else None for folder in present]
        problems = [_problem(folder) for folder in folders if folder and not _is_clip(folder)]
        if folders == [None, None]:
            message = "tokenizer_cache_dir %s holds neither %s nor %s: the vocabulary inside is used"
            logger.warning(message, tokenizer_cache_dir, *SAVED_NAMES)
    if problems:
        raise UserError(problems)
    return Tokenizer(max_token_length=max_token_length, weighted=weighted_captions, folders=(folders[0], folders[1]))


def _is_clip(folder: Path) -> bool:
    try:
        return load_vocabulary(folder)(PROBE) == PROBE_IDS
    except Exception:  # tokenizers raises no narrower class for a file that it cannot read
        return False


def _problem(folder: Path) -> Problem:
    message = "holds no CLIP tokenizer: put its vocab.json and merges.txt there, or remove the folder"
    return Problem(message, key="tokenizer_cache_dir", file=str(folder))


@functools.cache
def load_vocabulary(folder: Path | None) -> Callable[[str], list[int]]:
    """CLIP's byte-pair encoding of clean lower-case text: that of the tokenizer saved in `folder`, or the one
    inside. Loaded once in a process."""
    if folder is None:
        from instant_clip_tokenizer import Tokenizer as InsideTokenizer

        return InsideTokenizer().encode
    from transformers import CLIPTokenizer

    saved = CLIPTokenizer.from_pretrained(folder, model_max_length=10**9, local_files_only=True)
    return lambda text: saved(text, add_special_tokens=False).input_ids


def token_ids(text: str, vocabulary: Callable[[str], list[int]]) -> list[int]:
    """The ids of `text`, any number of them, without start and end. A special token's name, written out, is
    that token; what stands between is cleaned piece by piece, in CLIPTokenizer's order."""
    ids: list[int] = []
    for piece in SPECIAL_NAME.split(text):
        ids += [SPECIAL[piece]] if piece in SPECIAL else vocabulary(_clean(piece).lower())
    return ids


def _clean(text: str) -> str:
    """ftfy's repairs (broken encodings, entities, curly quotes, full-width letters). It costs more than the
    encoding and changes nothing in plain ASCII, the usual caption."""
    return text if text.isascii() and text.isprintable() and "&" not in text else ftfy.fix_text(text)


def _encode(parts: list[tuple[str, float]], vocabulary: Callable[[str], list[int]]) -> tuple[list, list]:
    """The ids of weighted pieces of text, and the weight of each id."""
    encoded = [(token_ids(text, vocabulary), weight) for text, weight in parts]
    return [id for ids, _ in encoded for id in ids], [weight for ids, weight in encoded for _ in ids]


def chunks(values: list, count: int, start: int | float, end: int | float, fill: int | float) -> list[list]:
    """`count` chunks of 77: start, up to 75 of `values`, end, fill. What is left over is dropped."""
    parts = [values[index * CHUNK : (index + 1) * CHUNK] for index in range(count)]
    return [[start, *part, end, *[fill] * (CHUNK - len(part))] for part in parts]


def parse_weights(text: str) -> list[tuple[str, float]]:
    """Text in pieces with their weights, in the syntax of weighted captions (AUTOMATIC1111's web UI).

    (a) weighs 1.1, (a:1.3) 1.3, [a] 1 / 1.1; nested ones multiply; a bracket left open closes with the text;
    a backslash makes the bracket or backslash after it text. Neighbours of one weight are one piece, since
    words end where a piece ends. A malformed number, on which the reference fails, is text.
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
    runs = itertools.groupby(zip(texts, weights, strict=True), key=lambda piece: piece[1])
    return [("".join(text for text, _ in run), weight) for weight, run in runs]
