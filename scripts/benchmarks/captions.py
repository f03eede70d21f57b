"""Measures the way from a caption to tokens: python -m scripts.benchmarks.captions [--captions 10000 100000]

Every option is on: several sources, prefix and suffix, wildcards, shuffling, tag dropout with groups, protected tags,
tag warm-up, weights, BREAK. Captions have about 200 tokens, of 10,000 names and 2,000 tags. A fiftieth holds letters
that are not ASCII. The target is 0.3 ms an image on one core, at every number of captions.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

from sdxl_finetune.config import Subset
from sdxl_finetune.data.caption_sources import choose_text
from sdxl_finetune.data.captions import caption
from sdxl_finetune.data.tokens import Tokenizer
from sdxl_finetune.seeding import position_random

SYLLABLES = ("ka", "shi", "mo", "to", "ren", "bel", "lar", "vin", "dor", "sha", "mi", "ko", "ta", "ne", "ru", "zo")
WORDS = ("hair", "eyes", "dress", "sleeves", "sky", "hand", "skirt", "jacket", "ribbon", "hat", "gloves", "standing")
BATCH, LENGTH = 5, 225


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=int, nargs="+", default=[10_000, 100_000])
    for count in parser.parse_args().captions:
        milliseconds, tokens = caption_to_tokens(count)
        print(f"{count} captions of {tokens:.0f} tokens: {milliseconds:.3f} ms an image (target 0.3)")


def caption_to_tokens(count: int) -> tuple[float, float]:
    """Milliseconds from the texts of an image to its tokens, and tokens of a caption, as means of `count` captions."""
    rng = random.Random(0)
    name = lambda: "".join(rng.choices(SYLLABLES, k=rng.randint(2, 4)))  # noqa: E731
    names = [f"{name()} {name()} \\({name()}\\)" for _ in range(10_000)]
    tags = [f"{rng.choice(WORDS)} {name()} {rng.choice(WORDS)}" for _ in range(2_000)]
    texts = [_texts(rng, names, tags, number) for number in range(count)]
    tokenizer = Tokenizer(max_token_length=LENGTH, weighted=True, breaks=True)
    with tempfile.TemporaryDirectory() as folder:
        subset = _all_options(Path(folder), rng.sample(tags, 200), names)
        drawn = []
        tokenizer([_draw(subset, texts[0], 0)])  # reads the vocabulary and the lists of tags
        start = time.process_time()
        for first in range(0, count, BATCH):
            batch = [_draw(subset, texts[at], at) for at in range(first, min(count, first + BATCH))]
            tokenizer(batch)
            drawn += batch[:1] if first % 100 == 0 else []
        seconds = time.process_time() - start
    lengths = [tokenizer.count(text)[0] for text in drawn if text]
    return 1000 * seconds / count, sum(lengths) / len(lengths)


def _draw(subset: Subset, texts: tuple[str, str], number: int) -> str:
    generator = position_random(0, "caption", number, 0, 0)
    text, whole = choose_text(subset, texts, generator.random)
    return caption(subset, text, generator, epoch=0, step=900, max_steps=1000, whole=whole)


def _texts(rng: random.Random, names: list[str], tags: list[str], number: int) -> tuple[str, str]:
    """Tags and a long text of one image."""
    chosen = [rng.choice(names), *rng.choices(tags, k=34), "{indoors|outdoors}", f"({rng.choice(tags)}:1.2)"]
    if number % 50 == 0:
        chosen.append("café à la crème")
    words = " ".join(rng.choice(WORDS) for _ in range(110))
    return (
        f"best quality, {', '.join(chosen[:14])} BREAK {', '.join(chosen[14:])}",
        f"{words} BREAK {words}, {chosen[0]}",
    )


def _all_options(folder: Path, protected: list[str], names: list[str]) -> Subset:
    (folder / "protected.txt").write_text("\n".join(["best quality", "* quality", *protected]))
    groups = {name: ["hair *", "eyes *"] for name in names}
    (folder / "groups.json").write_text(json.dumps(groups))
    return Subset(
        num_repeats=1,
        class_tokens=None,
        caption_sources="tags:0.8, caption_long:0.2:whole",
        shuffle_caption=True,
        keep_tokens=1,
        enable_wildcard=True,
        caption_prefix="masterpiece,",
        caption_suffix=", absurdres",
        caption_dropout_rate=0.05,
        caption_tag_dropout_rate=0.1,
        caption_tag_dropout_groups=folder / "groups.json",
        protected_tags_file=folder / "protected.txt",
        token_warmup_step=0.95,
        caption_break=True,
        secondary_separator=";",
    )


if __name__ == "__main__":
    main()
