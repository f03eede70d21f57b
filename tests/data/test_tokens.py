"""Token ids: equal to the reference's tokenizers, plain and weighted, and what holds for any caption."""

import itertools
import json
import logging
import pickle
from pathlib import Path

import ftfy
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from sdxl_finetune.data.tokens import (
    END,
    SAVED_NAMES,
    START,
    Tokenizer,
    build_tokenizer,
    load_vocabulary,
    parse_weights,
    token_ids,
)
from sdxl_finetune.errors import UserError

LENGTHS = {None: "None", 150: "150", 225: "225", 255: "225"}
"""max_token_length, and the one under which the golden file holds its tokens."""


def spread(rows: list) -> list[list]:
    """Golden rows without their run lengths."""
    return [
        [value for item in row for value in ([item[0]] * item[1] if isinstance(item, list) else [item])] for row in rows
    ]


@pytest.mark.parametrize("length", LENGTHS)
def test_golden_tokens(golden, length: int | None) -> None:
    cases = golden("tokens.json")["tokenize"]
    assert len(cases) == 49
    tokens = Tokenizer(max_token_length=length)([case["caption"] for case in cases])
    assert tokens.weights is None
    for index, case in enumerate(cases):
        expected = case[f"max_token_length_{LENGTHS[length]}"]
        assert tokens.ids1[index].tolist() == spread(expected["ids1"])
        assert tokens.ids2[index].tolist() == spread(expected["ids2"])


@pytest.mark.parametrize("length", LENGTHS)
def test_golden_weighted_tokens(golden, length: int | None) -> None:
    cases = golden("tokens.json")["tokenize_with_weights"]
    assert len(cases) == 22
    tokenizer = build_tokenizer(max_token_length=length, weighted_captions=True)
    tokens = tokenizer([case["caption"] for case in cases])
    assert tokens.ids1.dtype == torch.int64
    for index, case in enumerate(cases):
        expected = case[f"max_token_length_{LENGTHS[length]}"]
        assert tokens.ids1[index].tolist() == spread(expected["ids1"])
        assert tokens.ids2[index].tolist() == spread(expected["ids2"])
        torch.testing.assert_close(tokens.weights[index], torch.tensor(spread(expected["weights1"])))


def test_golden_other_lengths_lose_their_tail(golden) -> None:
    cases = {int(length): case for length, case in golden("tokens.json")["other_max_token_length"].items()}
    for length, case in cases.items():
        if length > 0:  # The config refuses the others.
            tokens = Tokenizer(max_token_length=length)(["cat " * 310, "a cat"])
            assert tokens.ids1[0].tolist() == spread(case["ids1"])
            assert tokens.ids1[1].tolist() == spread(case["short_ids1"])
            assert tokens.ids2[1].tolist() == spread(case["short_ids2"])


captions = st.one_of(
    st.text(),
    st.text(st.characters(max_codepoint=127)),
    st.lists(st.sampled_from(["1girl", "long_hair", "it's", "!", "<|endoftext|>", "é", "日本", "&amp;"])).map(" ".join),
)


@given(captions, st.sampled_from([75, 150, 225]))
@example("cat " * 75, 150)
def test_chunks_put_together_are_the_caption(text: str, length: int) -> None:
    ids = token_ids(text, load_vocabulary(None))
    tokens = Tokenizer(max_token_length=length)([text])
    for name, fill in (("ids1", END), ("ids2", 0)):
        rows = getattr(tokens, name)[0].tolist()
        assert len(rows) == length // 75
        rest = ids[:length]
        for row in rows:
            part, rest = rest[:75], rest[75:]
            assert row == [START, *part, END, *[fill] * (75 - len(part))]


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters="&")))
def test_plain_ascii_needs_no_repair(text: str) -> None:
    """What `tokens._clean` takes for granted."""
    assert ftfy.fix_text(text) == text


@given(st.text("ab ()[]:\\1.3-+", max_size=30))
def test_weighted_pieces_differ_from_their_neighbours(text: str) -> None:
    pieces = parse_weights(text)
    weights = [weight for _, weight in pieces]
    assert all(one != next_one for one, next_one in itertools.pairwise(weights))
    if not set(text) & set("()[]\\"):
        assert pieces == ([(text, 1.0)] if text else [])


@pytest.mark.parametrize("number", ["1.2.3", ".", "9" * 400])
def test_a_malformed_weight_is_text(number: str) -> None:
    """differences.md: Malformed weights."""
    assert parse_weights(f"(a:{number}) b") == [(f"a:{number}", 1.1), (" b", 1.0)]


def test_a_token_of_id_0_is_not_taken_for_fill() -> None:
    """differences.md: Exclamation marks at the edge of a chunk."""
    ids = token_ids("!_", load_vocabulary(None))
    assert ids[0] == 0
    row = Tokenizer(max_token_length=150)(["!_"]).ids2[0, 0].tolist()
    assert row[:4] == [START, *ids, END]


def test_upper_case_special_tokens_and_the_iota_subscript_are_text() -> None:
    """differences.md: Two corners of CLIPTokenizer."""
    encode = load_vocabulary(None)
    assert END not in token_ids("a <|ENDOFTEXT|>", encode)
    assert len(token_ids("a\u0345", encode)) > len(token_ids("a", encode))


def test_no_caption_is_an_empty_batch() -> None:
    tokens = Tokenizer(max_token_length=225, weighted=True)([])
    assert tokens.ids1.shape == tokens.weights.shape == (0, 3, 77)


def test_it_travels_to_workers() -> None:
    tokenizer = Tokenizer(max_token_length=75)
    before = tokenizer(["a cat"])
    assert torch.equal(pickle.loads(pickle.dumps(tokenizer))(["a cat"]).ids1, before.ids1)


def save_tokenizer(folder: Path, words: dict[str, int]) -> None:
    """A saved tokenizer that knows a few words, letter pairs joined from the left, under the ids of CLIP."""
    vocabulary = {"<|startoftext|>": START, "<|endoftext|>": END, **words}
    merges, spare = [], 1000
    for word in words:
        parts = [*word.removesuffix("</w>")[:-1], word.removesuffix("</w>")[-1] + "</w>"]
        for part in parts:
            vocabulary.setdefault(part, spare := spare + 1)
        left = parts[0]
        for part in parts[1:]:
            merges.append(f"{left} {part}")
            left += part
            vocabulary.setdefault(left, spare := spare + 1)
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")


CAT = {"a</w>": 320, "photo</w>": 1125, "of</w>": 539, "cat</w>": 2368}


def test_saved_tokenizers_are_used(tmp_path) -> None:
    save_tokenizer(tmp_path / SAVED_NAMES[0], CAT)
    save_tokenizer(tmp_path / SAVED_NAMES[1], {**CAT, "of</w>": 539, "dog</w>": 7})
    tokenizer = build_tokenizer(max_token_length=None, tokenizer_cache_dir=tmp_path)
    assert tokenizer.folders == tuple(tmp_path / name for name in SAVED_NAMES)
    tokens = pickle.loads(pickle.dumps(tokenizer))(["A PHOTO of a ｃａｔ", "dog"])
    assert tokens.ids1[0, 0, :7].tolist() == [START, 320, 1125, 539, 320, 2368, END]
    assert tokens.ids1[1, 0, 1] != 7
    assert tokens.ids2[1, 0, :4].tolist() == [START, 7, END, 0]


def test_a_cache_folder_without_tokenizers_leaves_the_vocabulary_inside(tmp_path, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        tokenizer = build_tokenizer(max_token_length=None, tokenizer_cache_dir=tmp_path / "none")
    assert tokenizer == Tokenizer(max_token_length=None)
    assert [SAVED_NAMES[0] in record.getMessage() for record in caplog.records] == [True]


def test_a_saved_tokenizer_that_is_not_clips_is_refused(tmp_path) -> None:
    (tmp_path / SAVED_NAMES[0]).mkdir()
    save_tokenizer(tmp_path / SAVED_NAMES[1], {**CAT, "cat</w>": 5})
    with pytest.raises(UserError) as caught:
        build_tokenizer(max_token_length=None, tokenizer_cache_dir=tmp_path)
    assert [problem.file for problem in caught.value.problems] == [str(tmp_path / name) for name in SAVED_NAMES]
    assert "vocab.json" in str(caught.value)
