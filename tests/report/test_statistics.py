"""The statistics of the report equal plain counts."""

import random
from collections import Counter
from itertools import combinations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_finetune.data.tokens import build_tokenizer
from sdxl_finetune.pages.words import percent
from sdxl_finetune.report.captions import measure_lengths
from sdxl_finetune.report.duplicates import group_rows
from sdxl_finetune.report.rows import first_texts
from sdxl_finetune.report.sizes import histogram, log_histogram, map_sizes
from sdxl_finetune.report.tags import TagCounter, Tags, count_together, neighbours, split_texts
from sdxl_finetune.seeding import draw_sample

CAPTIONS = st.lists(st.sampled_from(["a", " b", "b ", "long tag", "", "ü", "<b>"]), max_size=8).map(",".join)


def plain_tags(caption: str) -> set[str]:
    return {tag.strip() for tag in caption.split(",")} - {""}


def count(captions: list[str], chunk: int = 3, **options: int) -> Tags:
    counter = TagCounter(**options)
    for start in range(0, len(captions), chunk):
        counter.add(split_texts(pa.array(captions[start : start + chunk], pa.large_string()), [","]))
    return counter.result()


@settings(deadline=None)
@given(st.lists(CAPTIONS, max_size=20))
def test_tags_are_counted_once_for_each_image(captions: list[str]) -> None:
    tags = count(captions)
    expected = Counter(tag for caption in captions for tag in plain_tags(caption))
    assert dict(zip(tags.names, tags.images.tolist(), strict=True)) == expected
    assert list(tags.images) == sorted(tags.images, reverse=True)
    sizes = Counter(len(plain_tags(caption)) for caption in captions)
    assert {number: int(images) for number, images in enumerate(tags.per_image) if images} == sizes


def test_captions_are_split_at_every_separator_and_null_has_no_tags() -> None:
    texts = pa.array(["a, b|||c;;d", None, "", "e\nf"], pa.large_string())
    assert split_texts(texts, [",", "|||", ";;", "\n"]).to_pylist() == [["a", "b", "c", "d"], [], [], ["e", "f"]]
    words = pa.array(["a BREAK b, BREAKFAST", "c"], pa.large_string())
    assert split_texts(words, [",", "BREAK"]).to_pylist() == [["a", "b", "BREAKFAST"], ["c"]]
    assert split_texts(texts.slice(2), [","]).to_pylist() == [[], ["e\nf"]]


def test_the_first_caption_source_of_each_image_is_used() -> None:
    lists = [["z"], [None, "b"], ["c", "d"], [], [None, None]]
    captions = pa.array(lists, pa.large_list(pa.large_string()))
    assert first_texts(captions).to_pylist() == ["z", "b", "c", None, None]
    assert first_texts(captions.slice(1, 2)).to_pylist() == ["b", "c"]
    assert first_texts(captions, [1, 0]).to_pylist() == ["z", "b", "d", None, None]
    assert first_texts(captions.slice(0, 1)).to_pylist() == ["z"]
    assert first_texts(captions.slice(0, 0)).to_pylist() == []
    assert first_texts(pa.array([["a", "b"], []], captions.type)).to_pylist() == ["a", None]


def test_the_rarest_tags_are_dropped_when_there_are_too_many() -> None:
    captions = [f"style, sentence {number}" for number in range(50)]
    tags = count(captions, most=10)
    assert (tags.names[0], tags.images[0]) == ("style", 50)
    assert (len(tags.names), tags.dropped) == (10, 41)


@settings(deadline=None)
@given(st.lists(CAPTIONS, min_size=1, max_size=20))
def test_pairs_are_counted_as_in_a_plain_loop(captions: list[str]) -> None:
    tags = count(captions)
    chunks = [
        split_texts(pa.array(captions[start : start + 4], pa.large_string()), [","]) for start in (0, 4, 8, 12, 16)
    ]
    together = count_together(chunks, tags)
    assert together.sample == len(captions)
    expected = Counter(pair for caption in captions for pair in combinations(sorted(plain_tags(caption)), 2))
    for x, y in combinations(range(len(together.names)), 2):
        pair = tuple(sorted((together.names[x], together.names[y])))
        assert together.counts[x, y] == together.counts[y, x] == expected[pair]


def test_the_pair_that_always_comes_together_has_the_highest_lift() -> None:
    rng = random.Random(0)
    captions = [", ".join(rng.sample(["red", "green", "blue", "black"], 2)) for _ in range(900)]
    captions += ["castle, moat"] * 100
    pair = count_together([split_texts(pa.array(captions, pa.large_string()), [","])], count(captions, 100)).pairs[0]
    assert ({pair.first, pair.second}, pair.images) == ({"castle", "moat"}, 100)
    assert (pair.lift, pair.of_first, pair.of_second) == pytest.approx((10, 1, 1))


def test_tags_that_occur_together_are_neighbours() -> None:
    counts = np.full((6, 6), 5) + np.diag([95] * 6)
    for x, y in ((0, 3), (1, 5), (2, 4)):
        counts[x, y] = counts[y, x] = 90
    order = neighbours(counts).tolist()
    assert sorted(order) == list(range(6))
    assert {frozenset(order[place : place + 2]) for place in (0, 2, 4)} == {
        frozenset({0, 3}),
        frozenset({1, 5}),
        frozenset({2, 4}),
    }


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=30))
def test_equal_rows_are_grouped_as_in_a_dictionary(rows: list[tuple[int, int]]) -> None:
    columns = [np.array([row[place] for row in rows], np.int64) for place in (0, 1)]
    found = group_rows(columns, most=100)
    expected: dict[tuple[int, int], list[int]] = {}
    for number, row in enumerate(rows):
        expected.setdefault(row, []).append(number)
    groups = [group for group in expected.values() if len(group) > 1]
    assert sorted(group.tolist() for group in found.largest) == sorted(groups)
    assert (found.groups, found.rows) == (len(groups), sum(map(len, groups)))
    assert [len(group) for group in found.largest] == sorted(map(len, groups), reverse=True)


def test_histograms_count_every_value_also_beyond_the_edges() -> None:
    values = np.array([0.01, 0.2, 0.2, 0.9, 5.0])
    assert histogram(values, np.array([0.1, 0.5, 1.0])).counts.tolist() == [3, 2]
    assert log_histogram(values, least=0.1, most=2.0).counts.sum() == 5
    assert log_histogram(np.ones(3), least=0.1, most=2.0).counts.sum() == 3
    sizes = map_sizes(np.array([1.0, 4000.0, 4000.0]), np.array([70000.0, 10.0, 10.0]))
    assert (sizes.counts.sum(), sizes.counts.max(), sizes.counts.min()) == (3, 2, 0)
    assert sizes.counts[0, -1] == 2, "rows are heights"


def test_lengths_say_what_each_limit_cuts() -> None:
    tags = [f"tag{chr(97 + number % 26)}" for number in range(200)]
    texts = {0: "cat", 1: ", ".join(["cat"] * 38), 2: ", ".join(["cat"] * 38) + ", dog", 3: ", ".join(tags)}
    tokenizer = build_tokenizer(max_token_length=100)  # as 75
    found = measure_lengths(np.arange(4), texts.__getitem__, lambda row: ",", tokenizer)
    lengths = [tokenizer.count(text).tokens for text in texts.values()]
    assert lengths[:3] == [1, 75, 77]
    assert found.lengths.tolist() == lengths
    assert [(one.tokens, one.cut, one.lost) for one in found.limits] == [
        (75, 2, 2 + lengths[3] - 75),
        (150, 1, lengths[3] - 150),
        (225, 1, lengths[3] - 225),
    ]
    assert found.configured.tokens == 75
    lost = dict(found.lost_tags)
    assert found.searched == 2
    assert "cat" not in lost
    assert set(lost.values()) == {1}, "a tag counts once for each caption"


def test_a_caption_with_breaks_is_cut_after_its_chunks() -> None:
    tokenizer = build_tokenizer(max_token_length=150, caption_break=True)
    texts = {0: "cat BREAK dog BREAK bird, fish", 1: "cat BREAK dog"}
    found = measure_lengths(np.arange(2), texts.__getitem__, lambda row: ",", tokenizer)
    assert found.lengths.tolist() == [5, 2]
    assert [(one.tokens, one.cut, one.lost) for one in found.limits] == [(75, 2, 5), (150, 1, 3), (225, 0, 0)]
    assert found.lost.tolist() == [3, 0]


def test_a_tag_at_the_end_of_a_cut_caption_is_named() -> None:
    text = ", ".join(["cat"] * 38 + ["a very long tag", "dog"])
    found = measure_lengths(np.arange(1), lambda row: text, lambda row: ",", build_tokenizer(max_token_length=None))
    assert found.lost_tags == [("a very long tag", 1), ("dog", 1)]


def test_a_sample_is_the_same_each_time_and_has_no_row_twice() -> None:
    assert draw_sample(np.arange(5), 10, "x").tolist() == [0, 1, 2, 3, 4]
    sample = draw_sample(np.arange(0, 2000, 2), 100, "x")
    assert sample.tolist() == draw_sample(np.arange(0, 2000, 2), 100, "x").tolist() == sorted(set(sample.tolist()))
    assert not (sample % 2).any() and sample.tolist() != draw_sample(np.arange(0, 2000, 2), 100, "y").tolist()
    assert len(sample) == 100


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0 %"),
        (0.0001, "under 0.1 %"),
        (0.004, "0.4 %"),
        (0.0996, "10 %"),
        (0.5, "50 %"),
        (0.9995, "over 99.9 %"),
        (1.0, "100 %"),
    ],
)
def test_shares_are_written_in_few_digits(share: float, text: str) -> None:
    assert percent(share) == text
