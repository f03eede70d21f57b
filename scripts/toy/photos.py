"""Writes a small folder of photographs with captions: python -m scripts.toy.photos FOLDER

The photographs come with the package scikit-image (public domain and CC0, see its data/README.txt). They are saved as
JPEG. The captions are comma-separated tags that begin with the quality, as in data sets of art styles.
"""

import sys
from pathlib import Path

from PIL import Image

CAPTIONS = {
    "astronaut.png": "masterpiece, photo, 1woman, astronaut, orange spacesuit, smile, flag, portrait",
    "chelsea.png": "high quality, photo, cat, tabby, animal focus, whiskers, close-up, looking at viewer",
    "coffee.png": "masterpiece, photo, still life, coffee, cup, spoon, table, no humans",
    "rocket.jpg": "normal quality, photo, rocket, launch pad, night, tower, no humans",
    "motorcycle_left.png": "high quality, photo, motorcycle, garage, workshop, no humans",
    "hubble_deep_field.jpg": "masterpiece, photo, space, galaxy, stars, telescope, no humans",
    "ihc.png": "low quality, photo, microscope, tissue, stain, blue and brown, no humans",
    "retina.jpg": "low quality, photo, retina, blood vessels, orange, medical, no humans",
}


def write_photos(folder: Path) -> list[Path]:
    """Writes each photograph of `CAPTIONS` as JPEG, with a caption file. Returns the paths of the images."""
    import skimage

    source = Path(skimage.__file__).parent / "data"
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, caption in CAPTIONS.items():
        target = folder / f"{Path(name).stem}.jpg"
        with Image.open(source / name) as image:
            image.convert("RGB").save(target, quality=92)
        target.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
        written.append(target)
    return written


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(f"{len(write_photos(Path(sys.argv[1])))} photographs in {sys.argv[1]}")
