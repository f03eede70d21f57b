"""Captions are encoded as they are trained, each once; their variants are functions of the text and the options."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from sdxl_finetune.config import Config
from sdxl_finetune.data.captions import caption
from sdxl_finetune.data.index import Index, build_index
from sdxl_finetune.data.tokens import SAVED_NAMES, build_tokenizer
from sdxl_finetune.errors import UserError
from sdxl_finetune.latents import captions as captions_module
from sdxl_finetune.latents.captions import KEPT, Captions, count_keys, find_keys, find_keys_together, prepare_text
from sdxl_finetune.latents.shards import Kind
from sdxl_finetune.latents.together import find_team
from sdxl_finetune.model.load import load_checkpoint, load_text_encoders
from sdxl_finetune.model.random_model import TINY, build_random_model
from sdxl_finetune.model.save import single_file_tensors
from sdxl_finetune.model.tensorfile import write_safetensors
from sdxl_finetune.training.text_encoder import TextEncoders

TEXTS = {"a": "cat, dog, bird, tree", "b": "cat, dog, bird, tree", "c": "{red|blue|green} hat\nsecond line", "d": ""}


@pytest.fixture
def index(tmp_path: Path, write_images, subset, dataset) -> Callable[..., Index]:
    """index(**options): the index of four images, of which two have the same caption."""
    write_images(tmp_path / "images", {f"{name}.png": (64, 64) for name in TEXTS})
    for name, text in TEXTS.items():
        (tmp_path / "images" / f"{name}.txt").write_text(text)

    def build(**options: object) -> Index:
        own = subset(tmp_path / "images", caption_extension=".txt", **options)
        return build_index([dataset(own)], tmp_path / "cache", on_bad_image="stop")

    return build


def texts(captions: Captions, row: int) -> list[str]:
    return [captions.text(row, number) for number in range(captions.variants)]


def test_one_variant_is_the_caption_as_it_is_trained(index) -> None:
    options = {"caption_prefix": "photo,", "caption_suffix": "sharp", "secondary_separator": ";"}
    found = Captions(index(**options), 1, "tokenizer")
    for row in range(4):
        entry = found.index[row]
        expected = caption(entry.subset, entry.caption, random.Random(0), epoch=0, step=0, max_steps=1)
        assert found.text(row, 0) == expected and expected.startswith("photo, ")
    assert found.text(4, 0) == "" and found.text(2, 0) == "photo, {red|blue|green} hat sharp"
    keys = found.keys()
    assert np.array_equal(keys[0], keys[1]) and count_keys(keys, found.used) == 4, "with the empty caption"


def test_variants_are_drawn_by_the_text_and_the_number(index) -> None:
    options = {"shuffle_caption": True, "keep_tokens": 1, "caption_tag_dropout_rate": 0.3, "enable_wildcard": True}
    found = Captions(index(**options, caption_dropout_rate=1.0), 12, "tokenizer")
    assert texts(found, 0) == texts(found, 1) == texts(Captions(index(**options), 12, "other"), 0)
    drawn = [text.split(", ") for text in texts(found, 0)]
    assert all(tags[0] == "cat" and set(tags) <= {"cat", "dog", "bird", "tree"} for tags in drawn)
    assert len({tuple(tags) for tags in drawn}) > 5 and len({len(tags) for tags in drawn}) > 1
    assert set(texts(found, 2)) == {"red hat", "blue hat", "green hat", "second line"}
    keys = found.keys()
    different = {text for row in range(5) for text in texts(found, row)}
    assert count_keys(keys, found.used) == len(different) and np.array_equal(keys[0], keys[1])


def test_held_out_captions_are_whole_and_in_order(index) -> None:
    found = Captions(index(shuffle_caption=True, validation_split=0.5), 6, "tokenizer")
    held_out = np.flatnonzero(found.index.held_out).tolist()
    assert len(held_out) == 2
    for row in held_out:
        assert set(texts(found, row)) == {found.index[row].caption.partition("\n")[0]}
        assert (found.keys()[row] == found.keys()[row, 0]).all()


def test_another_tokenizer_gives_other_keys(index, tmp_path: Path) -> None:
    identities = [
        build_tokenizer(max_token_length=75).identity(),
        build_tokenizer(max_token_length=150).identity(),
        build_tokenizer(max_token_length=75, weighted_captions=True).identity(),
    ]
    keys = [Captions(index(), 1, identity).keys()[0].tobytes() for identity in identities]
    assert len(set(keys)) == 3
    folder = tmp_path / SAVED_NAMES[0]
    folder.mkdir()
    tokenizer = build_tokenizer(max_token_length=75)
    contents = []
    for text in ("one", "two"):
        (folder / "vocab.json").write_text(text)
        contents.append(type(tokenizer)(max_token_length=75, folders=(folder, None)).identity())
    assert len({*contents, identities[0]}) == 3


class Fake:
    """Encodes a caption as its length, or as infinity."""

    hidden_shape, pooled_size, tokenizer_identity, zeroed = (3, 2), 4, "tokenizer", None

    def __init__(self, bad: str = "none") -> None:
        self.bad = bad
        self.seen: list[str] = []

    def identity(self) -> str:
        return "fake"

    @contextmanager
    def on_device(self) -> Iterator[Callable[[Sequence[str]], Callable[[], Tensor]]]:
        yield self.encode

    def encode(self, captions: Sequence[str]) -> Callable[[], Tensor]:
        self.seen += captions
        values = [
            [float("inf") if text == self.bad else len(text) + place / 16 for place in range(10)] for text in captions
        ]
        return lambda: torch.tensor(values).half()


@pytest.mark.parametrize("on_disk", [True, False])
def test_what_is_read_is_what_was_encoded(index, tmp_path: Path, on_disk: bool) -> None:
    options = {"cache_text_encoder_outputs_to_disk": on_disk, "cache_text_encoder_outputs": True}
    config = Config(output_dir=tmp_path, text_encoder_outputs_variants=3, text_encoder_batch_size=2, **options)
    own, encoder = index(enable_wildcard=True), Fake()
    store = prepare_text(own, encoder, config, Accelerator())
    assert len(encoder.seen) == len(set(encoder.seen)), "no caption is encoded twice"
    captions = Captions(own, 3, "tokenizer")
    rows, draws = [0, 2, 2, None, 3], [0.0, 0.34, 0.99, 0.5, 0.7]
    hidden, pooled = store.read(rows, draws)
    assert hidden.shape == (5, 3, 2) and pooled.shape == (5, 4) and hidden.dtype == pooled.dtype == np.float16
    lengths = [
        len(captions.text(4 if row is None else row, int(draw * 3))) for row, draw in zip(rows, draws, strict=True)
    ]
    assert hidden[:, 0, 0].tolist() == lengths and lengths[3] == lengths[4] == 0
    assert np.allclose(pooled[:, 0], np.array(lengths) + 6 / 16)
    again = Fake()
    prepare_text(own, again, config, Accelerator())
    assert again.seen == ([] if on_disk else encoder.seen)


def test_an_output_beyond_16_bits_is_named(index, tmp_path: Path) -> None:
    config = Config(output_dir=tmp_path, cache_text_encoder_outputs=True)
    with pytest.raises(UserError, match=r"cache_text_encoder_outputs = True: remove it.*'cat, dog, bird, tree'"):
        prepare_text(index(), Fake(bad="cat, dog, bird, tree"), config, Accelerator())


def test_the_reference_s_files_are_not_read_and_mentioned_once(index, tmp_path: Path, caplog) -> None:
    own = index()
    for name in TEXTS:
        (tmp_path / "images" / f"{name}_te_outputs.npz").write_bytes(b"not even an archive")
    with caplog.at_level("INFO"):
        prepare_text(own, Fake(), Config(output_dir=tmp_path, cache_text_encoder_outputs=True), Accelerator())
    assert caplog.text.count("_te_outputs.npz") == 1


@pytest.mark.parametrize(("dtype", "exact"), [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, False)])
def test_identity_and_outputs_are_those_of_the_trained_model(tmp_path: Path, dtype: torch.dtype, exact: bool) -> None:
    """Of the encoders alone, as sdxl-cache loads them, and of the model in a training state."""
    model, vae = build_random_model(TINY, seed=0)
    write_safetensors(tmp_path / "base.safetensors", single_file_tensors(model, vae, torch.float32), {})
    whole = load_checkpoint(tmp_path / "base.safetensors", dtype=dtype, exact=exact)
    alone = load_text_encoders(tmp_path / "base.safetensors", dtype=dtype, exact=exact)
    state = single_file_tensors(whole.model, whole.vae, None, exact=True)
    write_safetensors(tmp_path / "state.safetensors", state, {})
    resumed = load_checkpoint(tmp_path / "state.safetensors", dtype=dtype, exact=exact).model
    tokenizer, device = build_tokenizer(max_token_length=75), torch.device("cpu")
    encoders = [TextEncoders(sdxl, tokenizer, device) for sdxl in (whole.model, alone, resumed)]
    assert len({encoder.identity() for encoder in encoders}) == 1
    records = []
    for encoder in encoders:
        with encoder.on_device() as encode:
            records.append(encode(["a cat", ""])())
    assert all(torch.equal(record, records[0]) for record in records) and not torch.equal(records[0][0], records[0][1])
    hidden, pooled = (model if exact else whole.model).encode_text(tokenizer(["a cat", ""]))
    plain = torch.cat([hidden.flatten(1), pooled], dim=1).float()
    tolerance = 0.05 if dtype == torch.bfloat16 and not exact else 2e-3
    torch.testing.assert_close(records[0].float(), plain, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        next(alone.te2.parameters()).view(-1)[0] += 1
    assert encoders[1].identity() != encoders[0].identity()


def test_variants_share_the_sources_by_their_weights(index, tmp_path: Path) -> None:
    for name in "abd":
        (tmp_path / "images" / f"{name}.json").write_text('{"long": "A long text."}')
    options = {"caption_sources": ".txt:0.7, .json#long:0.3", "shuffle_caption": True}
    found = Captions(index(**options), 20, "tokenizer")
    drawn = texts(found, 0)
    assert abs(drawn.count("A long text.") - 6) <= 1 and len(set(drawn)) > 8
    assert texts(found, 1) == drawn and texts(found, 3) == ["A long text."] * 20  # d.txt is empty
    few = Captions(found.index, 4, "tokenizer")
    assert texts(few, 0) == drawn[:4] and np.array_equal(few.keys(), found.keys()[:, :4])
    once = Captions(index(caption_sources=options["caption_sources"]), 1, "tokenizer")
    assert once.text(0, 0) in ("A long text.", TEXTS["a"])


def test_a_held_out_caption_is_its_heaviest_source(index, tmp_path: Path) -> None:
    for name in TEXTS:
        (tmp_path / "images" / f"{name}.json").write_text('{"long": "A long text."}')
    own = index(caption_sources=".txt:0.3, .json#long:0.7", validation_split=0.5)
    found = Captions(own, 5, "tokenizer")
    for row in np.flatnonzero(own.held_out).tolist():
        assert set(texts(found, row)) == {"A long text."}
        assert (found.keys()[row] == found.keys()[row, 0]).all()


def test_keys_are_kept_until_something_changes(index, tmp_path: Path, monkeypatch) -> None:
    """There may be millions of captions, and each start needs the keys of all of them."""
    folder, made = tmp_path / "kept", []
    original = Captions.keys
    monkeypatch.setattr(Captions, "keys", lambda self: made.append(self) or original(self))

    def is_made(variants: int = 3, tokenizer: str = "tokenizer", *, writes: bool = True, **options: object) -> bool:
        count, captions = len(made), Captions(index(shuffle_caption=True, **options), variants, tokenizer)
        keys = find_keys(captions, folder, writes=writes)
        assert np.array_equal(keys, original(captions))
        return len(made) > count

    rules = tmp_path / "tags.txt"
    rules.write_text("cat")
    assert is_made(writes=False) and is_made() and not is_made()
    for change in ({"variants": 2}, {"tokenizer": "x"}, {"keep_tokens": 2}, {"protected_tags_file": rules}):
        assert is_made(**change) and not is_made(**change)
    assert len(list(folder.iterdir())) == KEPT and is_made(), "the oldest file is removed"
    (tmp_path / "images" / "a.txt").write_text("another, caption")
    assert is_made() and not is_made()
    for path in folder.iterdir():
        keys = np.load(path)
        keys[:2] += 1  # as if another version of the program had made them
        np.save(path, keys)
    assert is_made() and not is_made()
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:200])
    assert is_made() and not is_made()


def test_keys_are_made_again_when_a_file_of_tag_rules_changes(index, tmp_path: Path) -> None:
    (tmp_path / "tags.txt").write_text("cat")
    captions = Captions(index(shuffle_caption=True, protected_tags_file=tmp_path / "tags.txt"), 2, "tokenizer")
    for number in (1, 2):
        find_keys(captions, tmp_path / "kept", writes=True)
        assert len(list((tmp_path / "kept").iterdir())) == number
        (tmp_path / "tags.txt").write_text("dog")


def test_processes_make_the_keys_of_one_process_together(index, tmp_path: Path, monkeypatch) -> None:
    """The parts of several processes are all keys, each once. The last part is one block."""
    monkeypatch.setattr(captions_module, "ROWS", 2)
    found = Captions(index(shuffle_caption=True), 3, "tokenizer")
    together, made = np.zeros_like(found.keys()), []
    original = Captions._keys_of
    monkeypatch.setattr(Captions, "_keys_of", lambda self, row, texts: made.append(row) or original(self, row, texts))
    for part in range(3):
        found.fill(together, part, 3)
    assert np.array_equal(together, found.keys()) and sorted(made[: len(found.index)]) == list(range(len(found.index)))
    accelerator, config = Accelerator(), Config(output_dir=tmp_path)
    team = find_team(accelerator, Kind("text_outputs", "x"), config, on_disk=True)
    for _ in range(2):
        made.clear()
        assert np.array_equal(find_keys_together(found, tmp_path / "kept", team, accelerator), together)
    assert len(made) <= len(found.index), "only the keys that are compared"
    assert [path.suffix for path in (tmp_path / "kept").iterdir()] == [".npy"]
