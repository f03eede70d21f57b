"""Captions from several sources, from the files of a folder to the tokens of a batch."""

import json
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sdxl_finetune.batch import Position
from sdxl_finetune.data.caption_lengths import measure_captions
from sdxl_finetune.data.captions import AS_WRITTEN, caption
from sdxl_finetune.data.index import Index, build_index
from sdxl_finetune.data.loader import TrainingDataset
from sdxl_finetune.data.tokens import Tokenizer
from sdxl_finetune.errors import UserError
from sdxl_finetune.seeding import position_random

SOURCES = ".txt:0.75, .json#caption:0.25"


@pytest.fixture
def index(tmp_path: Path, subset, dataset, write_images) -> Callable[..., Index]:
    """index(**options): the index of four images. Image a has both texts, b and c have one text each, d has none."""
    folder = tmp_path / "images"
    write_images(folder, {f"{name}.png": (64, 64) for name in "abcd"})
    for name in "ab":
        (folder / f"{name}.txt").write_text(f"tags of {name}")
    for name in "ac":
        (folder / f"{name}.json").write_text(json.dumps({"caption": f"A text of {name}.", "other": 1}))

    def build(**options: object) -> Index:
        own = subset(folder, **{"caption_sources": SOURCES, **options})
        return build_index([dataset(own)], tmp_path / "cache", on_bad_image="stop")

    return build


def build(index: Index, **options: object) -> TrainingDataset:
    def draw(*_: object) -> torch.Tensor:
        raise AssertionError("captions only")

    fields = {"read_latents": None, "draw_noise": draw, "draw_timesteps": draw, "seed": 3, "max_steps": 10}
    return TrainingDataset(index=index, tokenize=Tokenizer(max_token_length=75), **{**fields, **options})


def position(step: int) -> Position:
    return Position(epoch=0, step=step, micro_batch=0, micro_batches_in_step=1)


def test_the_index_holds_the_text_of_each_source(index, caplog) -> None:
    with caplog.at_level(logging.INFO):
        own = index()
    assert [own[row].captions for row in range(4)] == [
        ("tags of a", "A text of a."), ("tags of b", None), (None, "A text of c."), (None, None)
    ]  # fmt: skip
    assert "4 images; caption source .txt in 2, .json#caption in 2, none in 1" in caplog.text
    assert "1 of 4 images have no caption, or an empty one, and are trained without a text" in caplog.text
    assert "d.png: write one of the texts that caption_sources names" in caplog.text


def test_a_source_that_no_image_has_is_named(index, caplog) -> None:
    index(caption_sources=".txt, .json#long, tags")
    assert "has .json#long or tags: check the name of the key or the ending of the file" in caplog.text


def test_sources_are_drawn_by_position_in_the_shares_of_the_weights(index) -> None:
    dataset = build(index(class_tokens="nothing"))
    drawn = [Counter(dataset.caption_at(position(step), 0, row) for step in range(2000)) for row in range(4)]
    assert abs(drawn[0]["tags of a"] / 2000 - 0.75) < 0.03 and drawn[0].total() == 2000 and len(drawn[0]) == 2
    assert [list(counts) for counts in drawn[1:]] == [["tags of b"], ["A text of c."], ["nothing"]]
    again = build(dataset.index)
    for step in range(20):
        assert again.caption_at(position(step), 1, 0) == dataset.caption_at(position(step), 1, 0)


def test_other_weights_scan_nothing_anew_and_other_sources_do(index, tmp_path: Path) -> None:
    first = index()
    again = index(caption_sources=".txt:0.1, .json#caption:0.9")
    assert again.path == first.path and len(list((tmp_path / "cache" / "scans").iterdir())) == 1
    assert index(caption_sources=".json#caption, .txt")[0].captions == ("A text of a.", "tags of a")


def test_only_a_changed_text_changes_the_captions_of_the_index(index, tmp_path: Path) -> None:
    before = index()
    (tmp_path / "images" / "d.json").write_text('{"caption": "now it has one"}')
    (tmp_path / "images" / "a.txt").unlink()
    after = index()
    assert after[0].captions == (None, "A text of a.") and after[3].captions == (None, "now it has one")
    assert {fact for fact, value in after.facts().items() if value != before.facts()[fact]} == {"captions"}


def test_a_broken_file_of_a_source_is_a_problem_of_its_image(index, tmp_path: Path) -> None:
    (tmp_path / "images" / "b.json").write_text("{")
    with pytest.raises(UserError, match=r"b\.json: the caption file is not valid JSON"):
        index()


@pytest.mark.parametrize("seed", range(3))
def test_without_caption_sources_every_draw_is_as_before(index, seed: int) -> None:
    """The caption's generator draws nothing for the source. A single source changes nothing either."""
    options = {"shuffle_caption": True, "caption_dropout_rate": 0.3, "caption_tag_dropout_rate": 0.2}
    plain = index(caption_sources=None, caption_extension=".txt", **options)
    for own in (plain, index(caption_sources=".txt", **options)):
        dataset = build(own, seed=seed)
        for step in range(30):
            rng = position_random(seed, "caption", step, 0, 0)
            expected = caption(own.subsets[0], "tags of b", rng, epoch=0, step=step, max_steps=10)
            assert dataset.caption_at(position(step), 0, 1) == expected


def test_a_whole_source_is_never_shuffled_and_keeps_all_its_parts(index, tmp_path: Path) -> None:
    (tmp_path / "images" / "a.json").write_text('{"caption": "One, two, three, four."}')
    (tmp_path / "images" / "a.txt").write_text("one, two, three, four")
    options = {"shuffle_caption": True, "caption_tag_dropout_rate": 0.3, "token_warmup_step": 0.5}
    dataset = build(index(caption_sources=".txt:0.7, .json#caption:0.3:whole", **options))
    drawn = Counter(dataset.caption_at(position(step), 0, 0) for step in range(300))
    assert [text for text in drawn if "." in text] == ["One, two, three, four."] and len(drawn) > 20


def test_validation_takes_the_heaviest_source(index) -> None:
    own = index(caption_sources=".txt:0.2, .json#caption:0.3")
    unchanged = own.datasets[0].model_copy(update={"subsets": (own.subsets[0].model_copy(update=AS_WRITTEN),)})
    dataset = build(replace(own, datasets=(unchanged,)))
    assert {dataset.caption_at(position(step), 0, 0) for step in range(20)} == {"A text of a."}


def test_all_captions_of_a_small_set_are_counted(index, tmp_path: Path) -> None:
    (tmp_path / "images" / "b.txt").write_text("cat " * 100)
    (tmp_path / "images" / "c.txt").write_text("cat " * 290)
    (tmp_path / "images" / "d.txt").write_text("BREAK, cat")
    own = index(caption_sources=None, caption_extension=".txt", caption_suffix="end", caption_dropout_rate=1.0)
    tokenizer = Tokenizer(max_token_length=75)
    lengths = measure_captions(own, tokenizer)
    numbers = [tokenizer.count(f"{own[row].caption} end") for row in range(4)]
    assert [number.lost for number in numbers] == [0, 26, 216, 0]
    assert (lengths.captions, lengths.counted, lengths.cut, lengths.lost) == (4, 4, 2, 242)
    assert (lengths.tokens, lengths.longest) == (sum(number.tokens for number in numbers), 291)
    cut, remedy, word = lengths.describe()
    assert cut == (
        "max_token_length = 75 cuts off 2 (50.0%) of all 4 captions, which have 100 tokens on average and 291 at most:"
        f" 242 tokens ({242 / lengths.tokens:.1%}) are not read"
    )
    assert remedy == "max_token_length = 300 would read at least 99% of the captions to the end"
    assert word.startswith("1 of them hold the word BREAK, which is read as a word")
    (none_cut,) = measure_captions(own, Tokenizer(max_token_length=300, breaks=True)).describe()
    assert none_cut.startswith("max_token_length = 300 cuts off none of all 4 captions")


def test_a_large_set_is_sampled_and_the_text_says_so(tmp_path: Path, subset, dataset, write_images) -> None:
    write_images(tmp_path / "images", {f"{number:03}.png": (64, 64) for number in range(120)})
    for number in range(120):
        (tmp_path / "images" / f"{number:03}.txt").write_text("cat " * (100 if number % 3 == 0 else 10))
    own = build_index([dataset(subset(tmp_path / "images", caption_extension=".txt"))], tmp_path, on_bad_image="stop")
    lengths = measure_captions(own, Tokenizer(max_token_length=75), sample=60)
    assert lengths == measure_captions(own, Tokenizer(max_token_length=75), sample=60)
    assert (lengths.captions, lengths.counted) == (120, 60)
    assert 10 <= lengths.cut <= 30 and lengths.lost == 25 * lengths.cut
    assert "of a random sample of 60 of 120 captions" in next(lengths.describe())


def test_captions_beyond_all_sense_are_to_be_shortened(index, tmp_path: Path) -> None:
    (tmp_path / "images" / "a.txt").write_text("cat " * 1000)
    own = index(caption_sources=None, caption_extension=".txt")
    _, remedy = measure_captions(own, Tokenizer(max_token_length=225)).describe()
    assert remedy == "shorten the captions: more than 600 tokens are hardly of use"


def test_excluded_images_are_not_counted(index) -> None:
    own = index().without([0])
    assert measure_captions(own, Tokenizer(max_token_length=75)).captions == 3
    assert np.array_equal(own.used, [False, True, True, True])
