"""Made-up tag reports, as the measurement writes them: tags from seldom to often seen, some of them contradictory."""

import numpy as np
import pyarrow as pa

from sdxl_finetune.tag_report.schema import CHANGES, IMAGES, TAGS, Facts, Report

CHANCE = 0.2
SCRIPT = "<script>document.title = 'run'</script>"
ODD = ["=1+1", 'say "hi", then', SCRIPT, "*", "風景", "-_-"]
"""Tags that a careless writer of CSV, HTML, TOML or patterns would break on."""


def facts(step: int | None = 500, **values) -> Facts:
    usual = {"model": "style.safetensors", "epoch": 2, "options": {"others": 4}, "bounds": {"least accuracy": 0.5}}
    return Facts(step=step, **{**usual, **values})


def tags_table(rows: list[dict]) -> pa.Table:
    usual = {
        "images": 8, "held_out": 2, "exposures": 100, "gain": 0.01, "gain_error": 0.002, "accuracy": 0.3,
        "accuracy_error": 0.05, "chance": CHANCE, **dict.fromkeys(CHANGES), "state": "underfitted",
    }  # fmt: skip
    return pa.Table.from_pylist([{**usual, **row} for row in rows], schema=TAGS)


def images_table(tags: pa.Table, each: int = 6) -> pa.Table:
    rows = [
        {
            "tag": row["tag"],
            "image": f"style/{number:03}.png",
            "held_out": number == 0,
            "gain": row["gain"] + 0.01 * number,
        }
        for row in tags.to_pylist()
        for number in range(each)
    ]
    return pa.Table.from_pylist([{**row, "rank": 0, "exposures": 3} for row in rows], schema=IMAGES)


def made_report(count: int, step: int = 500, *, names: list[str] | None = None) -> Report:
    """A report of `count` tags at a step: knowledge grows with exposures, but every seventh is contradictory."""
    random = np.random.default_rng(count)
    exposures = (np.geomspace(20, 20_000, count)[random.permutation(count)] * step / 500).astype(int)
    noise = random.normal(0, 0.04, (2, count))
    mixed = np.arange(count) % 7 == 6
    known = np.clip(np.log10(np.maximum(exposures, 10) / 10) / 2.4 + noise[0], 0, 1) * np.where(mixed, 0.15, 1)
    rows = []
    for place in range(count):
        accuracy = float(np.clip(CHANCE + (0.97 - CHANCE) * known[place] + noise[1, place], 0, 1))
        state = "learned" if accuracy > 0.6 else "contradictory" if exposures[place] > 1000 else "underfitted"
        state = "unclear" if 0.5 < accuracy <= 0.6 else state
        change = 0.05 * float(known[place]) if step > 100 else None
        rows.append({
            "tag": (names or [])[place] if names and place < len(names) else f"style_{place:04}",
            "exposures": int(exposures[place]), "gain": 0.06 * float(known[place]) ** 1.5 + noise[0, place] / 40,
            "gain_error": 0.003, "accuracy": accuracy, "accuracy_error": 0.04, "state": state,
            "gain_since_last": change and change / 10, "accuracy_since_last": change,
            "gain_since_base": 0.06 * float(known[place]), "accuracy_since_base": accuracy - CHANCE,
        })  # fmt: skip
    tags = tags_table(rows)
    return Report(facts(step), tags, images_table(tags))
