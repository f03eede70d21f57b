"""The tokenizer files of a diffusers folder give the reference's token ids, and contain CLIP's whole vocabulary."""

from pathlib import Path

import ftfy
import pytest
from transformers import CLIPTokenizer

from sdxl_finetune.model.tokenizer_files import save_tokenizers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizers")
    save_tokenizers(path)
    return path


def expanded(runs: list) -> list[int]:
    """Returns a golden row as a plain list: a pair in the row is a value and how often it is repeated."""
    ids: list[int] = []
    for run in runs:
        ids += [run[0]] * run[1] if isinstance(run, list) else [run]
    return ids


def test_ids_equal_the_reference(golden, folder: Path) -> None:
    first = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    second = CLIPTokenizer.from_pretrained(folder / "tokenizer_2", local_files_only=True)
    compared = 0
    for case in golden("tokens.json")["tokenize"]:
        if ftfy.fix_text(case["caption"]) != case["caption"]:
            continue  # transformers repairs such text in some versions only
        expected = case["max_token_length_None"]
        long = {"padding": "max_length", "max_length": 77, "truncation": True}
        assert first(case["caption"], **long).input_ids == expanded(expected["ids1"][0]), case["caption"]
        # "!" is the padding token here, as in the tokenizer files that OpenCLIP published.
        ids2 = expected.get("ids2_if_exclamation_is_a_special_token", expected["ids2"])
        assert second(case["caption"], **long).input_ids == expanded(ids2[0]), case["caption"]
        compared += 1
    assert compared > 20


def test_vocabulary_is_complete(folder: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    assert len(tokenizer) == 49408
    assert len((folder / "tokenizer" / "merges.txt").read_text(encoding="utf-8").splitlines()) == 48895
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (49406, 49407, 49407)
    for text in ("日本語のタグ", "смех", "🇯🇵 🎉", "�"):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True).replace(" ", "") == text.replace(
            " ", ""
        )
