"""The report shows scores, quality tags and loss weights where a dataset has them."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from sdxl_finetune.commands.data import load_data_config
from sdxl_finetune.commands.data import main as data_tool
from sdxl_finetune.data.tokens import build_tokenizer
from sdxl_finetune.report.collect import collect

SCORES = [round(0.1 + 0.8 * number / 11, 3) for number in range(12)]


def tag_of(score: float) -> str:
    return "masterpiece" if score > 0.7 else "high quality" if score > 0.5 else "worst quality"


@pytest.fixture
def config(tmp_path, write_images) -> str:
    """The config of 14 images, of which 12 have a score. Every third image has the tag style."""
    write_images(tmp_path / "images", {f"{number:02}.png": (64, 64) for number in range(14)})
    for number in range(14):
        (tmp_path / "images" / f"{number:02}.txt").write_text("style, cat" if number % 3 == 0 else "cat")
    rows = "".join(f"{number:02}.png,{score}\n" for number, score in enumerate(SCORES))
    (tmp_path / "scores.csv").write_text(f"path,score\n{rows}")
    (tmp_path / "weights.toml").write_text("[tags]\nstyle = { repeats = 3, loss_weight = 0.5 }\n")
    (tmp_path / "c.toml").write_text(
        f"train_data_dir = '{tmp_path / 'images'}'\ncache_dir = '{tmp_path / 'cache'}'\nresolution = 64\n"
        "caption_extension = '.txt'\nquality_tags = 'masterpiece > 0.7, high quality > 0.5, worst quality'\n"
        f"quality_scores = '{tmp_path / 'scores.csv'}'\nimage_weights = '{tmp_path / 'weights.toml'}'\n"
    )
    return str(tmp_path / "c.toml")


def test_scores_quality_tags_and_weights_equal_plain_counts(tmp_path, config) -> None:
    assert data_tool(["report", "--config", config, "--output", str(tmp_path / "r.html")]) == 0
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', text)[1])

    def bars(name: str) -> dict[str, int]:
        figure = figures[name]
        return dict(zip(figure["layout"]["yaxis"]["ticktext"], figure["data"][0]["x"], strict=True))

    assert bars("quality") == {**Counter(map(tag_of, SCORES)), "no quality tag": 2}
    assert list(bars("quality")) == ["masterpiece", "high quality", "worst quality", "no quality tag"]
    assert bars("weights") == {"0.5": 5, "1": 9}
    assert bars("repeats") == {"1 ×": 9, "3 ×": 5}
    short = build_tokenizer(max_token_length=None).count("worst quality, cat").tokens
    assert sum(sum(trace["y"]) for trace in figures["tokens"]["data"]) == 14
    assert max(trace["x"][-1] for trace in figures["tokens"]["data"]) >= short - 2.5, "quality tags count as tokens"
    assert sum(figures["scores"]["data"][0]["y"]) == 12
    assert [shape["x0"] for shape in figures["scores"]["layout"]["shapes"]] == [0.5, 0.7]
    assert f"12 images have a score, {np.mean(SCORES):.3f} on average. 2 images have none." in text


def test_tags_come_from_the_heaviest_source_that_is_a_list(tmp_path, config) -> None:
    for number in range(14):
        (tmp_path / "images" / f"{number:02}.long").write_text("A cat, which sits.")
        if number < 3:
            (tmp_path / "images" / f"{number:02}.tags").write_text("dog, tail")
    lines = Path(config).read_text().splitlines()
    lines = [line for line in lines if not line.startswith(("quality", "image_weights", "caption_extension"))]
    lines.append('caption_sources = ".txt:0.2, .tags:0.3, .long:0.5:whole"')
    (tmp_path / "sources.toml").write_text("\n".join(lines))
    config_of_sources = load_data_config(["--config", str(tmp_path / "sources.toml")], "sdxl-data report")
    report = collect(config_of_sources, rare=3)
    assert dict(zip(report.tags.names, report.tags.images.tolist(), strict=True)) == {
        "cat": 11,
        "style": 4,
        "dog": 3,
        "tail": 3,
    }
    assert set(report.lengths.lengths.tolist()) >= {1, 6}, "the text is drawn for the count of tokens"


def test_a_dataset_without_scores_has_no_such_section(tmp_path, config) -> None:
    lines = Path(config).read_text().splitlines()
    plain = [line for line in lines if not line.startswith(("quality", "image_weights"))]
    (tmp_path / "plain.toml").write_text("\n".join(plain))
    assert data_tool(["report", "--config", str(tmp_path / "plain.toml"), "--output", str(tmp_path / "r.html")]) == 0
    assert 'id="scores"' not in (tmp_path / "r.html").read_text(encoding="utf-8")
