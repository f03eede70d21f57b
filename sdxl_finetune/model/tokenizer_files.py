"""CLIP's tokenizer as the files that transformers reads (vocab.json, merges.txt), so that a saved diffusers folder
opens without a download.

The package instant-clip-tokenizer has the vocabulary inside but gives it only as decoded text, which hides two
things: the bytes of tokens that are no whole characters, and which two tokens each merge joins. The bytes are found by
decoding such a token between bytes that complete it; the merge is what byte pair encoding (Sennrich et al.,
arXiv 1508.07909) makes of the token with the merges before it: by construction exactly two symbols.
"""

import json
from functools import cache
from itertools import pairwise, product
from pathlib import Path

from instant_clip_tokenizer import Tokenizer

START, END = "<|startoftext|>", "<|endoftext|>"

_PREFIXES = ("", "c2", "e1", "e180", "f1", "f180", "f18080")
"""Beginnings of UTF-8 characters that lack one to three bytes."""
_SUFFIXES = ("", "80", "8080", "808080", "a0", "a080", "9080", "908080")
"""Ends of UTF-8 characters."""


def save_tokenizers(folder: Path) -> None:
    """Writes `tokenizer` and `tokenizer_2` of a diffusers pipeline. They differ in what they pad with."""
    vocabulary, merges = _contents()
    for name, padding in (("tokenizer", END), ("tokenizer_2", "!")):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "vocab.json").write_text(vocabulary, encoding="utf-8")
        (folder / name / "merges.txt").write_text(merges, encoding="utf-8")
        special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": padding}
        config = {**special, "model_max_length": 77, "do_lower_case": True, "tokenizer_class": "CLIPTokenizer"}
        (folder / name / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
        (folder / name / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")


@cache
def _contents() -> tuple[str, str]:
    """vocab.json and merges.txt, made once (in a second)."""
    tokens = _tokens()
    vocabulary = {token: number for number, token in enumerate([*tokens, START, END])}
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in _merges(tokens))])
    return json.dumps(vocabulary, ensure_ascii=False), merges + "\n"


def _tokens() -> list[str]:
    """All tokens but the two special ones, in CLIP's notation: a character for each byte, `</w>` at a word's end."""
    package = Tokenizer()
    letters = _byte_letters()
    ordered = list(letters)
    byte_numbers = {byte: number for number, byte in enumerate(ordered)}
    tokens = []
    for number in range(package.start_of_text()):
        # The first 256 are the bytes, the next the same at a word's end.
        if number < 512:
            body, word_end = bytes([ordered[number % 256]]), number >= 256
        else:
            text = _token_bytes(package, number, byte_numbers)
            body, word_end = text.removesuffix(b" "), text.endswith(b" ")
        tokens.append("".join(letters[byte] for byte in body) + ("</w>" if word_end else ""))
    return tokens


def _byte_letters() -> dict[int, str]:
    """A printable character for every byte, in CLIP's order: first those that are printable in Latin-1."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def _token_bytes(package: Tokenizer, number: int, byte_numbers: dict[int, int]) -> bytes:
    """The bytes of a token, with a space where a word ends."""
    for prefix, suffix in product(map(bytes.fromhex, _PREFIXES), map(bytes.fromhex, _SUFFIXES)):
        around = [[byte_numbers[byte] for byte in end] for end in (prefix, suffix)]
        text = package.decode([*around[0], number, *around[1]])
        if "\N{REPLACEMENT CHARACTER}" not in text:
            return text.encode().removeprefix(prefix).removesuffix(suffix)
    # What stays a replacement character is one: CLIP has learned it as a word.
    return package.decode([number]).encode()


def _merges(tokens: list[str]) -> list[tuple[str, str]]:
    """The pair that makes each token from the 513th on, in the order of the tokens."""
    ranks: dict[tuple[str, str], int] = {}
    for token in tokens[512:]:
        word_end = token.endswith("</w>")
        symbols = list(token.removesuffix("</w>"))
        if word_end:
            symbols[-1] += "</w>"
        while len(symbols) > 2:
            pairs = list(pairwise(symbols))
            pair_ranks = [ranks.get(pair, len(tokens)) for pair in pairs]
            best = pair_ranks.index(min(pair_ranks))
            symbols[best : best + 2] = ["".join(pairs[best])]
        assert len(symbols) == 2
        ranks[(symbols[0], symbols[1])] = len(ranks)
    return list(ranks)
