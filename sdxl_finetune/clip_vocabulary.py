"""CLIP's vocabulary of byte-pair tokens. SDXL's two text encoders share it.

The package contains the vocabulary, so no run downloads it. `clip_merges.txt.gz` holds the merges that OpenAI
published with CLIP (MIT licence, see NOTICE): lines 2 to 48,895 of `bpe_simple_vocab_16e6.txt.gz`, which several
packages contain, for example clip-anytorch. This command made the file:

    gunzip -c bpe_simple_vocab_16e6.txt.gz | sed -n 2,48895p | gzip -9n > clip_merges.txt.gz

The tokens and their ids follow from the merges, as in CLIP's own code. First come the 256 bytes, then the 256 bytes
at the end of a word, then one token for each merge, then the two special tokens. Byte-pair encoding for text is from
Sennrich et al., arXiv 1508.07909.
"""

import functools
import gzip
from pathlib import Path

START_TOKEN, END_TOKEN = "<|startoftext|>", "<|endoftext|>"
"""The two special tokens."""
START, END, FILL_2 = 49406, 49407, 0
"""Ids of the start token, of the end token, and of what fills up a chunk for encoder 2."""
WORD_END = "</w>"
"""Suffix of a token that ends a word."""


@functools.cache
def load_merges() -> tuple[tuple[str, str], ...]:
    """The 48,894 pairs of tokens that are joined, the pair of highest priority first."""
    packed = Path(__file__).with_name("clip_merges.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode().splitlines()
    return tuple((first, second) for first, second in map(str.split, lines))


def load_vocabulary() -> dict[str, int]:
    """The id of each of the 49,408 tokens, in the order of the ids."""
    letters = byte_letters()
    words = [letter + WORD_END for letter in letters]
    tokens = [*letters, *words, *map("".join, load_merges()), START_TOKEN, END_TOKEN]
    return {token: number for number, token in enumerate(tokens)}


def byte_letters() -> list[str]:
    """A printable character for each of the 256 bytes, in the order of the tokens' ids.

    A byte that is printable in Latin-1 stands for itself and comes first. The other bytes follow in ascending order
    and are written as the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(0x100 + number) for number in range(256 - len(printable))]
