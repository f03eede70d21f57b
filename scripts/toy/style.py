"""Teaches the small model a new style and shows the result:

    python -m scripts.toy.style pictures FOLDER
    python -m scripts.toy.style show BEFORE AFTER PICTURE.png

`pictures` writes training images with caption files. Half of them are in the new style: they hang in a wooden frame and
have the tag `gallery style`. The other half is drawn as the model already knows it.

`show` draws held-out captions with the model before and after fine-tuning, with and without the tag. It prints how
many images hang in a frame and how well the captions are followed (judge.py explains the figures). Some of the images
are put side by side into one picture.
"""

import argparse
import logging
import random
from dataclasses import replace
from itertools import islice
from pathlib import Path

from PIL import Image

from scripts.toy.judge import draw_captions, held_out_scenes, judge
from scripts.toy.world import NEW_STYLE, caption, draw, scenes
from sdxl_finetune.output.contact_sheet import contact_sheet

PICTURES = 960
"""Training images."""
SHOWN = 5
"""Captions in the picture of `show`."""


def main() -> None:
    logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)  # it warns of a kernel that is not used here
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
    """Writes images and caption files. Every call writes the same."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, plain in enumerate(islice(scenes(2, for_training=True, quality="best"), count)):
        scene = replace(plain, framed=number % 2 == 0)
        save_pair(folder, number, draw(scene, random.Random(f"style {number}")), caption(scene))


def save_pair(folder: Path, number: int, image: Image.Image, text: str) -> None:
    """Writes an image and its caption file."""
    path = folder / f"{number:03d}.png"
    image.save(path)
    path.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")


def compare(before: Path, after: Path, picture: Path, count: int) -> None:
    """Prints the scores of both models, with and without the tag, and writes some of their images to `picture`."""
    test_scenes = held_out_scenes(count)
    columns, texts = [], []
    for model, when in ((before, "before"), (after, "after")):
        for styled in (False, True):
            images = draw_captions(model, test_scenes, styled=styled)
            tag = f"with {NEW_STYLE} style" if styled else "without the tag"
            print(f"{when}, {tag}: {judge(test_scenes, images)}")
            columns.append(images[:SHOWN])
            texts.append([f"{when}, {tag}: {caption(scene)}" for scene in test_scenes[:SHOWN]])
    images_by_row = [image for row in zip(*columns, strict=True) for image in row]
    texts_by_row = [text for row in zip(*texts, strict=True) for text in row]
    contact_sheet(images_by_row, texts_by_row, columns=len(columns)).save(picture)
    print(f"wrote {picture}")


if __name__ == "__main__":
    main()
