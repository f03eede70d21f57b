"""A style to teach the small model that draws, and a look at what was learned:

    python -m scripts.toy.style pictures FOLDER
    python -m scripts.toy.style show BEFORE AFTER PICTURE.png

`pictures` writes drawings with captions beside them: half of them in the gallery style, in a wooden frame and tagged
so, half as the model knows them. `show` draws held-out captions with the model before and after fine-tuning, with the
tag and without it, says how many pictures hang in a frame and how well the captions are followed, and puts some of them
side by side into one picture.
"""

import argparse
import logging
import random
from dataclasses import replace
from itertools import islice
from pathlib import Path

from PIL import Image

from scripts.toy.judge import draw_captions, judge
from scripts.toy.world import NEW_STYLE, caption, draw, scenes
from sdxl_finetune.output.contact_sheet import contact_sheet

PICTURES = 960
SHOWN = 5


def main() -> None:
    logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)  # warns of a kernel that nothing here uses
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    pictures = commands.add_parser("pictures")
    pictures.add_argument("folder", type=Path)
    show = commands.add_parser("show")
    show.add_argument("before", type=Path)
    show.add_argument("after", type=Path)
    show.add_argument("picture", type=Path)
    show.add_argument("--captions", type=int, default=50)
    arguments = parser.parse_args()
    if arguments.command == "pictures":
        write_pictures(arguments.folder)
    else:
        compare(arguments.before, arguments.after, arguments.picture, arguments.captions)


def write_pictures(folder: Path, count: int = PICTURES) -> None:
    """The same every time."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(islice(scenes(2, kept=True, quality="best"), count)):
        told = replace(scene, framed=number % 2 == 0)
        save_pair(folder, number, draw(told, random.Random(f"style {number}")), caption(told))


def save_pair(folder: Path, number: int, picture: Image.Image, words: str) -> None:
    """A picture with its caption beside it."""
    path = folder / f"{number:03d}.png"
    picture.save(path)
    path.with_suffix(".txt").write_text(words + "\n", encoding="utf-8")


def compare(before: Path, after: Path, picture: Path, count: int) -> None:
    wanted = list(islice(scenes(1, kept=False, quality="best"), count))
    columns, words = [], []
    for model, when in ((before, "before"), (after, "after")):
        for styled in (False, True):
            drawn = draw_captions(model, wanted, styled=styled)
            tag = f"with {NEW_STYLE} style" if styled else "without the tag"
            print(f"{when}, {tag}: {judge(wanted, drawn)}")
            columns.append(drawn[:SHOWN])
            words.append([f"{when}, {tag}: {caption(scene)}" for scene in wanted[:SHOWN]])
    rows = [one for row in zip(*columns, strict=True) for one in row]
    texts = [one for row in zip(*words, strict=True) for one in row]
    contact_sheet(rows, texts, across=len(columns)).save(picture)
    print(f"wrote {picture}")


if __name__ == "__main__":
    main()
