"""CLIP's tokenizers as the files that transformers reads, so that a saved diffusers folder opens without a download."""

import json
from pathlib import Path

from sdxl_finetune.clip_vocabulary import END_TOKEN, START_TOKEN, load_merges, load_vocabulary

PADDING = {"tokenizer": END_TOKEN, "tokenizer_2": "!"}
"""Token that fills up a caption, for each of the pipeline's two tokenizers; "!" has id 0."""


def save_tokenizers(folder: Path) -> None:
    """Writes the folders `tokenizer` and `tokenizer_2` of a diffusers pipeline into `folder`.

    Each receives vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json. The two differ only in
    the padding token.
    """
    vocabulary = json.dumps(load_vocabulary(), ensure_ascii=False)
    merges = "\n".join(["#version: 0.2", *map(" ".join, load_merges())]) + "\n"
    for name, padding in PADDING.items():
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        special = {"bos_token": START_TOKEN, "eos_token": END_TOKEN, "unk_token": END_TOKEN, "pad_token": padding}
        config = {**special, "model_max_length": 77, "do_lower_case": True, "tokenizer_class": "CLIPTokenizer"}
        (target / "vocab.json").write_text(vocabulary, encoding="utf-8")
        (target / "merges.txt").write_text(merges, encoding="utf-8")
        (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
        (target / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
