"""Runs configs that people use for SDXL full fine-tuning, scaled down to the small model.

    python -m scripts.real_configs [--steps 2] [--keep FOLDER] [NUMBER ...]

prints a line for each config in tests/real_configs: its number, `trained` or `refused`, seconds, and what was saved or
why the config was refused. The exit status is 1 if a result differs from tests/real_configs/expected.tsv.

Keys and values of the configs are those of their authors. Only paths, sizes, run length and names of people were
replaced. `{base}`, `{data}`, `{out}` and `{here}` stand for the model, the pictures, an output folder and the config's
folder. A line `# args: ...` holds the options of the command line.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from safetensors.torch import load_file, save_file

from scripts.toy.photos import write_photos

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "tests" / "real_configs"
BASE = ROOT / "tests" / "toy" / "toy.safetensors"
VAE = "first_stage_model."
TAGS = "oil painting, tower, red sky, ruins, fog, portrait, 1girl, solo, long hair"
FOLDERS = {"img/10_name person": 12, "reg/1_person": 4, "flat": 12, "flat2": 12, "flat3": 12, "flatreg": 4}
"""Folders that the configs name, each with its number of pictures."""
ALL_BLOCKS = ["--unet_widths", "32,32,64", "--unet_layers", "2,2,2", "--transformer_layers", "0,1,1", "--te1", "64,2",
              "--te2", "64,2", "--vae_widths", "32,32,32,32", "--vae_layers", "1"]  # fmt: skip
"""Sizes of a random model with the 23 blocks of SDXL's U-Net, for configs that number them. The small model has 17."""
PROMPTS = {
    "prompt.txt": "an oil painting of a tower --w 64 --h 64 --s 2 --d 1 --l 5\n",
    "prompt.toml": '[prompt]\nwidth = 64\nheight = 64\nsample_steps = 2\n[[prompt.subset]]\nprompt = "1girl"\n',
}


@dataclass(frozen=True)
class Config:
    """One config with what has to come of it."""

    number: str
    trains: bool
    refused_for: str
    """Word in the message of a config that is refused."""

    def __str__(self) -> str:
        return self.number


def expected_results() -> list[Config]:
    """Reads tests/real_configs/expected.tsv."""
    rows = [line.split("\t") for line in (CONFIGS / "expected.tsv").read_text().splitlines()]
    return [Config(number, result == "train", "".join(word)) for number, result, *word in rows]


def write_data(folder: Path) -> None:
    """Writes pictures with captions, metadata and prompt files, a model and a VAE under the names that configs use."""
    photos = write_photos(folder / "photos")
    for name, count in FOLDERS.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            image = Image.open(photos[number % len(photos)])
            image.resize((96 + 16 * (number % 5), 160 - 16 * (number % 4))).save(folder / name / f"{number:02}.png")
            for ending in (".txt", ".caption"):
                (folder / name / f"{number:02}{ending}").write_text(f"picture {number}, {TAGS}")
    for name, images in (("meta_lat.json", "flat"), ("meta_flat3.json", "flat3")):
        entry = {"caption": "a picture", "tags": TAGS, "train_resolution": [128, 128]}
        rows = {str(path): entry for path in sorted((folder / images).glob("*.png"))}
        (folder / name).write_text(json.dumps(rows))
    for name, text in PROMPTS.items():
        (folder / name).write_text(text)
    vae = {name.removeprefix(VAE): tensor for name, tensor in load_file(BASE).items() if name.startswith(VAE)}
    save_file(vae, folder / "toy_vae.safetensors")
    init = "from sdxl_finetune.cli import model; model()"
    command = [sys.executable, "-c", init, "init", str(folder / "blocks.safetensors"), *ALL_BLOCKS]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def command_line(number: str, data: Path, work: Path, steps: int) -> list[str]:
    """Writes the config into the folder `work`, with all paths filled in. Returns the arguments of sdxl-train."""
    (work / "datasets").mkdir(parents=True)
    base = data / "blocks.safetensors" if "freeze_unet_blocks" in (CONFIGS / f"{number}.toml").read_text() else BASE

    def fill(text: str) -> str:
        for word, path in {"base": base, "data": data, "out": work, "here": work}.items():
            text = text.replace(f"{{{word}}}", str(path))
        return text

    for name in (f"{number}.toml", f"datasets/{number}.toml"):
        if (CONFIGS / name).is_file():
            (work / name).write_text(fill((CONFIGS / name).read_text()))
    config = work / f"{number}.toml"
    typed = [line.removeprefix("# args: ") for line in config.read_text().splitlines() if line.startswith("# args: ")]
    # The length of a run is part of a config, so it is the last word of the command line.
    length = ["--max_train_epochs", "", "--max_train_steps", str(steps)]
    return ["--config", str(config), *shlex.split(" ".join(typed)), *length]


def run(config: Config, data: Path, work: Path, steps: int) -> tuple[bool, str]:
    """Trains with a config. Returns whether the result is the expected one, and a line about it."""
    arguments = command_line(config.number, data, work, steps)
    started = time.monotonic()
    command = [sys.executable, "-m", "sdxl_finetune", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=work, check=False)
    saved = sorted(path.name for path in work.rglob("*.safetensors"))
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    if config.trains:
        good = done.returncode == 0 and bool(saved)
    else:
        good = done.returncode == 2 and config.refused_for in "\n".join(errors)
    result = "trained" if done.returncode == 0 else "refused" if done.returncode == 2 else "FAILED"
    last = done.stderr.splitlines()[-1:]
    about = ", ".join(saved) if done.returncode == 0 else " / ".join(errors or last)
    return good, f"{config.number} {result:8} {time.monotonic() - started:4.0f} s  {about[:600]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", metavar="NUMBER")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="folder for data and results; default: a temporary folder")
    given = parser.parse_args()
    configs = [config for config in expected_results() if not given.numbers or config.number in given.numbers]
    good_ones = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.keep or Path(temporary)).resolve()
        write_data(folder / "data")
        for config in configs:
            good, line = run(config, folder / "data", folder / config.number, given.steps)
            good_ones += good
            print(line if good else f"NOT AS EXPECTED: {line}", flush=True)
    print(f"{good_ones} of {len(configs)} as expected")
    return good_ones < len(configs)


if __name__ == "__main__":
    sys.exit(main())
