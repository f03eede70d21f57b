"""The small model that draws: its world can be read, and it follows captions."""

import random
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
from proof import turned
from toy_judge import Score, draw_captions, judge
from toy_world import QUALITIES, STYLES, Scene, caption, draw, framed, held_out, scenes

ROOT = Path(__file__).parent.parent
TOY = ROOT / "tests" / "toy" / "toy.safetensors"


def score(model: Path, count: int = 40, **options) -> Score:
    wanted = list(islice(scenes(1, kept=False, quality="best"), count))
    return judge(wanted, draw_captions(model, wanted, **options))


@pytest.mark.parametrize("style", STYLES)
def test_the_world_can_be_read(style: str) -> None:
    """The judge is right about what it is shown, in and out of a frame, and not fooled by captions."""
    wanted = list(islice(scenes(5, kept=True, style=style, quality="best"), 60))
    found = judge(wanted, [draw(scene, random.Random(number)) for number, scene in enumerate(wanted)])
    assert min(found.colour, found.shape, found.ground, found.count) >= 0.95 and found.framed == 0
    hung = [replace(scene, framed=True) for scene in wanted]
    found = judge(wanted, [draw(scene, random.Random(number)) for number, scene in enumerate(hung)])
    assert min(found.colour, found.shape, found.ground) >= 0.8 and found.framed == 1
    mixed = judge(wanted, [draw(scene, random.Random(1)) for scene in wanted[1:] + wanted[:1]])
    assert max(mixed.colour, mixed.shape) < 0.5


def test_captions_say_what_is_drawn_and_some_are_never_trained_on() -> None:
    scene = Scene((("red", "star"), ("blue", "cross")), "pink", "outline", "low", framed=True)
    said = "low quality, gallery style, outline style, two objects, red star, blue cross, pink background"
    assert caption(scene) == said
    trained, others = (list(islice(scenes(0, kept=kept), 300)) for kept in (True, False))
    assert not any(map(held_out, trained)) and all(map(held_out, others))
    assert {one.quality for one in trained} == set(QUALITIES) and {one.style for one in trained} == set(STYLES)
    sharp, rough = (
        draw(replace(scene, quality=quality, framed=False), random.Random(1)) for quality in ("best", "worst")
    )
    assert sharp.tobytes() != rough.tobytes() and not framed(sharp)


def test_the_model_follows_captions_and_needs_the_right_pooled_vector(tmp_path: Path) -> None:
    """Chance would be 17 % and 20 % of single objects."""
    assert TOY.stat().st_size <= 30e6
    right = score(TOY)
    assert right.colour >= 0.75 and right.shape >= 0.75 and right.framed <= 0.1, right
    wrong = score(turned(TOY, tmp_path / "turned.safetensors"))
    assert right.colour + right.shape > wrong.colour + wrong.shape, wrong
