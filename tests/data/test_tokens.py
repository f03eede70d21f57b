"""Token ids equal those of the reference's tokenizers, for plain and weighted captions, over all of Unicode."""

import hashlib
import itertools
import json
import logging
import pickle
import subprocess
import sys
import unicodedata
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
    load_encoding,
    parse_weights,
    token_ids,
)
from sdxl_finetune.errors import UserError

LENGTHS = {None: "None", 150: "150", 225: "225", 255: "225"}
"""max_token_length, and the name of the same length in the golden file."""


def expanded_rows(rows: list) -> list[list]:
    """Returns golden rows as plain lists: a pair in a row is a value and how often it is repeated."""
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
        assert tokens.ids1[index].tolist() == expanded_rows(expected["ids1"])
        assert tokens.ids2[index].tolist() == expanded_rows(expected["ids2"])


@pytest.mark.parametrize("length", LENGTHS)
def test_golden_weighted_tokens(golden, length: int | None) -> None:
    cases = golden("tokens.json")["tokenize_with_weights"]
    assert len(cases) == 22
    tokenizer = build_tokenizer(max_token_length=length, weighted_captions=True)
    tokens = tokenizer([case["caption"] for case in cases])
    assert tokens.ids1.dtype == torch.int64
    for index, case in enumerate(cases):
        expected = case[f"max_token_length_{LENGTHS[length]}"]
        assert tokens.ids1[index].tolist() == expanded_rows(expected["ids1"])
        assert tokens.ids2[index].tolist() == expanded_rows(expected["ids2"])
        torch.testing.assert_close(tokens.weights[index], torch.tensor(expanded_rows(expected["weights1"])))


def test_golden_other_lengths_are_rounded_down_to_a_multiple_of_75(golden) -> None:
    cases = {int(length): case for length, case in golden("tokens.json")["other_max_token_length"].items()}
    for length, case in cases.items():
        if length > 0:  # The config refuses the others.
            tokens = Tokenizer(max_token_length=length)(["cat " * 310, "a cat"])
            assert tokens.ids1[0].tolist() == expanded_rows(case["ids1"])
            assert tokens.ids1[1].tolist() == expanded_rows(case["short_ids1"])
            assert tokens.ids2[1].tolist() == expanded_rows(case["short_ids2"])


captions = st.one_of(
    st.text(),
    st.text(st.characters(max_codepoint=127)),
    st.lists(st.sampled_from(["1girl", "long_hair", "it's", "!", "<|endoftext|>", "é", "日本", "&amp;"])).map(" ".join),
)


@given(captions, st.sampled_from([75, 150, 225]))
@example("cat " * 75, 150)
def test_chunks_joined_are_the_token_ids_of_the_caption(text: str, length: int) -> None:
    ids = token_ids(text, load_encoding(None))
    tokens = Tokenizer(max_token_length=length)([text])
    for name, fill in (("ids1", END), ("ids2", 0)):
        rows = getattr(tokens, name)[0].tolist()
        assert len(rows) == length // 75
        remaining = ids[:length]
        for row in rows:
            part, remaining = remaining[:75], remaining[75:]
            assert row == [START, *part, END, *[fill] * (75 - len(part))]


def test_ids_of_all_unicode_characters_equal_the_reference() -> None:
    """The hash is that of the ids of transformers 4.44's slow CLIPTokenizer with ftfy 6.3.

    It covers the 95,218 characters of Unicode 3.2, so that it holds for every Python: later characters are unknown to
    some Unicode tables. The three that are left out are in differences.md: Corners of CLIPTokenizer.
    """
    table = unicodedata.ucd_3_2_0
    unassigned, private, surrogate = "Cn", "Co", "Cs"
    characters = [
        character
        for character in map(chr, range(sys.maxunicode + 1))
        if table.category(character) not in (unassigned, private, surrogate) and character not in "\u0345ſﬅ"
    ]
    encode = load_encoding(None)
    ids = []
    for start in range(0, len(characters), 100):
        words = (f"a{character}b 1{character} '{character}" for character in characters[start : start + 100])
        ids.append(token_ids(" ".join(words), encode))
    digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
    assert digest == "06fa250b35aff5ffe1b5ae24be8f3634275423ab75bbfb6c20e0386def23f32e"


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters="&")))
def test_ftfy_leaves_plain_ascii_unchanged(text: str) -> None:
    """`tokens._clean` relies on this."""
    assert ftfy.fix_text(text) == text


@given(st.text("ab ()[]:\\1.3-+", max_size=30))
def test_neighbouring_pieces_of_a_weighted_caption_have_different_weights(text: str) -> None:
    pieces = parse_weights(text)
    weights = [weight for _, weight in pieces]
    assert all(weight != following for weight, following in itertools.pairwise(weights))
    if not set(text) & set("()[]\\"):
        assert pieces == ([(text, 1.0)] if text else [])


@pytest.mark.parametrize("number", ["1.2.3", ".", "9" * 400])
def test_a_malformed_weight_is_text(number: str) -> None:
    """differences.md: Malformed weights."""
    assert parse_weights(f"(a:{number}) b") == [(f"a:{number}", 1.1), (" b", 1.0)]


def test_a_token_of_id_0_is_not_taken_for_fill() -> None:
    """differences.md: Exclamation marks at the edge of a chunk."""
    ids = token_ids("!_", load_encoding(None))
    assert ids[0] == 0
    row = Tokenizer(max_token_length=150)(["!_"]).ids2[0, 0].tolist()
    assert row[:4] == [START, *ids, END]


def test_upper_case_special_tokens_and_the_iota_subscript_are_text() -> None:
    """differences.md: Corners of CLIPTokenizer."""
    encode = load_encoding(None)
    assert END not in token_ids("a <|ENDOFTEXT|>", encode)
    assert len(token_ids("a\u0345", encode)) > len(token_ids("a", encode))
    assert token_ids("'ſ", encode) == [*token_ids("'", encode), *token_ids("ſ", encode)]


def test_an_empty_list_of_captions_gives_an_empty_batch() -> None:
    tokens = Tokenizer(max_token_length=225, weighted=True)([])
    assert tokens.ids1.shape == tokens.weights.shape == (0, 3, 77)


def test_a_tokenizer_can_be_pickled_for_a_worker() -> None:
    tokenizer = Tokenizer(max_token_length=75)
    before = tokenizer(["a cat"])
    pickled = pickle.dumps(tokenizer)
    assert len(pickled) < 500  # the settings only: a worker loads the vocabulary itself
    assert torch.equal(pickle.loads(pickled)(["a cat"]).ids1, before.ids1)


def test_importing_the_module_loads_no_tokenizer_library() -> None:
    code = "import sys, sdxl_finetune.data.tokens; print({'tokenizers', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def save_tokenizer(folder: Path, words: dict[str, int]) -> None:
    """Writes a tokenizer of a few words under the given ids. Its merges join the letters of a word from the left."""
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


def test_a_cache_folder_without_tokenizers_is_reported_and_the_package_vocabulary_used(tmp_path, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        tokenizer = build_tokenizer(max_token_length=None, tokenizer_cache_dir=tmp_path / "none")
    assert tokenizer == Tokenizer(max_token_length=None)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"tokenizer_cache_dir: {tmp_path / 'none'} contains neither {SAVED_NAMES[0]}")
    assert "Remove tokenizer_cache_dir" in message


def test_a_saved_tokenizer_other_than_clip_is_refused(tmp_path) -> None:
    (tmp_path / SAVED_NAMES[0]).mkdir()
    save_tokenizer(tmp_path / SAVED_NAMES[1], {**CAT, "cat</w>": 5})
    with pytest.raises(UserError) as caught:
        build_tokenizer(max_token_length=None, tokenizer_cache_dir=tmp_path)
    assert [problem.file for problem in caught.value.problems] == [str(tmp_path / name) for name in SAVED_NAMES]
    assert "vocab.json" in str(caught.value)


def words(ids: torch.Tensor) -> list[int]:
    """The tokens of a chunk between its start and its first end token."""
    return ids[1 : ids.tolist().index(END)].tolist()


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a cat BREAK a dog", ["a cat", "a dog", ""]),
        ("a catBREAK a dog", ["a catBREAK a dog", "", ""]),
        ("a cat break a dog", ["a cat break a dog", "", ""]),
        ("a cat,BREAK,a dog", ["a cat,", ",a dog", ""]),
        ("BREAK a dog", ["", "a dog", ""]),
        ("a cat BREAK BREAK a dog", ["a cat", "", "a dog"]),
        ("a cat BREAK", ["a cat", "", ""]),
        ("BREAK", ["", "", ""]),
        ("cat " * 75 + "BREAK a dog", ["cat " * 75, "a dog", ""]),
        ("cat " * 76 + "BREAK a dog", ["cat " * 75, "cat", "a dog"]),
        ("a BREAK b BREAK c BREAK d", ["a", "b", "c"]),
    ],
)
def test_break_starts_a_new_chunk_for_both_encoders(caption: str, expected: list[str]) -> None:
    tokens = Tokenizer(max_token_length=225, breaks=True)([caption, "a cat"])
    encode = load_encoding(None)
    assert [words(chunk) for chunk in tokens.ids1[0]] == [token_ids(part, encode) for part in expected]
    assert [words(chunk) for chunk in tokens.ids2[0]] == [token_ids(part, encode) for part in expected]
    alone = [Tokenizer(max_token_length=75)([part]) for part in expected]  # each chunk is filled up as one of its own
    assert torch.equal(tokens.ids1[0], torch.cat([one.ids1[0] for one in alone]))
    assert torch.equal(tokens.ids2[0], torch.cat([one.ids2[0] for one in alone]))


def test_break_is_a_word_unless_caption_break_is_set() -> None:
    off, on = (build_tokenizer(max_token_length=150, caption_break=is_on) for is_on in (False, True))
    assert words(off(["a BREAK b"]).ids1[0, 0]) == token_ids("a break b", load_encoding(None))
    assert torch.equal(off(["a cat"]).ids1, on(["a cat"]).ids1)
    assert off.identity() == Tokenizer(max_token_length=150).identity() != on.identity()


def test_break_within_weights_starts_a_chunk_and_keeps_the_weights() -> None:
    tokens = build_tokenizer(max_token_length=150, weighted_captions=True, caption_break=True)(
        ["x (a BREAK b:1.5), c [BREAK] d"]
    )
    encode = load_encoding(None)
    assert [words(chunk) for chunk in tokens.ids1[0]] == [token_ids("x a", encode), token_ids("b, c", encode)]
    assert tokens.weights[0, 0, :5].tolist() == [1.0, 1.0, 1.5, 1.0, 1.0]
    assert tokens.weights[0, 1, :5].tolist() == [1.0, 1.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("length", [75, 300, 525])
def test_any_multiple_of_75_is_read_and_what_is_cut_off_is_counted(length: int) -> None:
    tokenizer = Tokenizer(max_token_length=length)
    tokens = tokenizer(["cat " * 500, "a cat"])
    assert tokens.ids1.shape == tokens.ids2.shape == (2, length // 75, 77)
    assert sum(len(words(chunk)) for chunk in tokens.ids1[0]) == min(length, 500)
    assert tokenizer.count("cat " * 500) == (500, max(0, 500 - length), 7)
    assert tokenizer.count("a cat") == (2, 0, 1)


def test_break_counts_the_tokens_of_lost_chunks_only() -> None:
    tokenizer = Tokenizer(max_token_length=150, breaks=True)
    assert tokenizer.count("a cat BREAK a dog") == (4, 0, 2)
    assert tokenizer.count("a cat BREAK a dog BREAK two birds") == (6, 2, 3)
    assert tokenizer.count("cat " * 80 + "BREAK a dog") == (82, 2, 3)


@given(st.text(alphabet=st.characters(min_codepoint=1, max_codepoint=127), max_size=40))
def test_remembered_words_of_ascii_text_have_the_ids_of_the_whole_text(text: str) -> None:
    encode = load_encoding(None)
    # A letter that is not ASCII sends the whole text through the library.
    assert encode(f"{text} é")[: len(encode(text))] == encode(text)


@given(
    st.lists(
        st.sampled_from(
            [
                "BREAK",
                " ",
                "\n",
                ",",
                "(",
                ")",
                "[",
                "]",
                ":1.3)",
                "&nbsp;",
                "\ufeff",
                "ab",
                "a",
                "7",
                "<|endoftext|>",
                "é",
            ]
        ),
        max_size=6,
    ).map("".join),
    st.booleans(),
    st.booleans(),
    st.sampled_from([75, 150]),
)
@example("BREAK ab", True, True, 75)
@example("a" * 200 + " BREAK " + "ab cd", False, True, 75)
def test_a_text_is_empty_if_its_tokens_are(text: str, weighted: bool, breaks: bool, length: int) -> None:
    """With a chunk alone, all text may stand behind a BREAK, where it is not read."""
    tokenizer = Tokenizer(max_token_length=length, weighted=weighted, breaks=breaks)
    tokens = tokenizer([text, "", "a cat"])
    assert tokens.empty.tolist() == [tokenizer.is_empty(text), True, False]
    kept = [id for chunk in tokens.ids1[0].tolist() for id in chunk[1:-1] if id != END]
    if "endoftext" not in text:
        assert tokenizer.is_empty(text) == (not kept)
