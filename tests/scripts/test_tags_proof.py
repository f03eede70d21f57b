"""The proof of tag reports: its styles can be read off pictures, and a slice of it runs."""

import random
import shutil
from collections import Counter
from dataclasses import replace
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts.benchmarks import tags
from scripts.benchmarks.proof_runs import TOY
from scripts.benchmarks.tags import Row, correlations, table
from scripts.toy.palettes import SIMILAR, SPOILT, STYLES, palettes, write_styles
from scripts.toy.world import draw, scenes


def test_plain_code_reads_each_palette_and_no_other() -> None:
    own = palettes(0)
    assert len(set(own.values())) == len(STYLES) == 10 and palettes(1) != own
    plain = list(islice(scenes(5, for_training=True, quality="best"), 20))
    shown: Counter[tuple[str, str]] = Counter()
    for style, palette in own.items():
        for number, scene in enumerate(plain):
            picture = draw(palette.paint(scene), random.Random(number))
            shown.update((style, other) for other in own if own[other].is_shown(picture))
    right = sum(count for (style, other), count in shown.items() if style == other)
    assert right >= 0.95 * 20 * len(own)
    assert shown.total() - right <= 0.02 * 20 * len(own)


def test_no_two_styles_are_similar() -> None:
    for seed in range(30):
        for one, other in combinations(palettes(seed).values(), 2):
            assert one != other and not (one.ground == other.ground and {one.colour, other.colour} in SIMILAR)


def test_spoilt_styles_show_other_palettes(tmp_path: Path) -> None:
    write_styles(tmp_path, 0, share=0.25)
    own, shares = palettes(0), {}
    for style in STYLES:
        files = [path for path in sorted(tmp_path.glob("*.txt")) if f"style_{style}," in path.read_text()]
        assert len(files) == max(4, round(0.25 * STYLES[style]))
        assert not any(colour in path.read_text() for path in files for colour in ("red", "white", "background"))
        pictures = [Image.open(path.with_suffix(".png")) for path in files]
        shares[style] = sum(own[style].is_shown(picture) for picture in pictures) / len(files)
    for style, every in SPOILT.items():
        assert shares[style] == pytest.approx(1 / every, abs=0.1)
    assert min(share for style, share in shares.items() if style not in SPOILT) > 0.9


def test_a_slice_of_the_proof_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is the one before training, which knows no style. Reports and pictures are real."""

    def untrained(folder: Path, name: str, *_: str, **__: object) -> Path:
        (folder / name).mkdir(parents=True)
        return Path(shutil.copy(TOY, folder / name / "model.safetensors"))

    monkeypatch.setattr(tags, "train", untrained)
    monkeypatch.setattr(tags, "PICTURES", 1)
    monkeypatch.setattr(tags, "REPORT", ["--tags", "style_*", "--images", "3", "--timesteps", "950", "--draw", "0"])
    rows = tags.measure(tmp_path, 0, share=0.01)
    assert [row.style for row in rows] == list(STYLES)
    assert all(row.then_gain == row.gain for row in rows), "the model is the same"
    assert all(np.isfinite(row.gain) and row.exposures is None and row.drawn in (0.0, 1.0) for row in rows)
    assert "contradictory" not in {row.state for row in rows}, "nothing says how often this model saw the tags"
    assert tags.measure(tmp_path, 0) == rows, "finished parts are kept"


def test_the_table_counts_what_was_found() -> None:
    row = Row("monet", 40, 0.1, 0.02, 0.4, 0.1, "underfitted", 0.2, 0.4, 0.9, "learned", 0.9)
    learned = replace(row, style="dali", gain=0.5, accuracy=0.9, state="learned", drawn=0.9)
    missed = replace(row, style="goya", gain=0.3, accuracy=0.8, state="learned", drawn=0.4)
    spoilt = replace(row, style="titian", gain=0.05, accuracy=0.3, state="contradictory", drawn=0.1)
    rows = [row, learned, missed, spoilt]
    assert correlations(rows) == pytest.approx((1.0, 1.0))
    line, all_lines = table({0: rows}).splitlines()[-2:]
    assert "1 found, 1 of the 2" in line and "titian contradictory" in line and "20%, 90%" in line
    assert "1 of 2 contradictory, and 0 of 3 clean ones" in all_lines
