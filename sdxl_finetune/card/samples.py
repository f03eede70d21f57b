"""Sample pictures of the page, from previews of the run or from a folder. PNG files say how they were drawn.

The text is that of AUTOMATIC1111, which this program and user interfaces write into the field `parameters`: the prompt,
a line with the negative prompt, and a line of settings.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sdxl_finetune.errors import Problem, UserError

logger = logging.getLogger(__name__)

MOST = 12
"""Pictures on a page. More of them make the page too heavy for model sites."""
FORMATS = ("PNG", "JPEG", "WEBP")
"""Formats that a sample may have, whatever its name says. Pillow would start other programs for some other formats."""
SETTING = re.compile(r'\s*([\w ]+): ("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')
PREVIEW = re.compile(r"(?P<moment>e?\d{6,})_(?P<index>\d{2,})_(?P<time>\d{14})(?:_\d+)?\.png")
"""The name of a preview after the name of the run (PreviewFiles.path)."""


@dataclass(frozen=True)
class Sample:
    """A picture, and how it was drawn."""

    image: Image.Image
    text: str
    """The parameters in the text format of AUTOMATIC1111."""

    @property
    def prompt(self) -> str:
        return self._parts[0]

    @property
    def negative_prompt(self) -> str | None:
        return self._parts[1]

    @property
    def settings(self) -> Mapping[str, str]:
        """Steps, Sampler, CFG scale, Seed and Size, as far as the text says them."""
        return self._parts[2]

    @property
    def _parts(self) -> tuple[str, str | None, dict[str, str]]:
        prompt, _, settings = self.text.rpartition("\n")
        if not settings.startswith("Steps: "):
            return self.text, None, {}
        prompt, _, negative = prompt.partition("\nNegative prompt: ")
        return prompt, negative or None, {name.strip(): value for name, value in SETTING.findall(settings)}


def load_samples(paths: list[Path]) -> list[Sample]:
    """Reads pictures, at most MOST of them. Raises UserError for a picture that cannot be read."""
    if len(paths) > MOST:
        logger.warning("the page shows the first %d of %d pictures", MOST, len(paths))
    return [_load_sample(path) for path in paths[:MOST]]


def _load_sample(path: Path) -> Sample:
    try:
        with Image.open(path, formats=FORMATS) as image:
            return Sample(image.convert("RGB"), str(image.info.get("parameters", "")))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        message = f"the picture cannot be read ({error}): remove it or draw it again"
        raise UserError(Problem(message, key="samples", value=str(path))) from None


def find_pictures(folder: Path) -> list[Path]:
    """The PNG files of a folder, by name. Raises UserError if it has none."""
    found = sorted(folder.glob("*.png")) if folder.is_dir() else []
    if not found:
        message = "there is no PNG file in this folder: give a folder that `sdxl-model generate` has filled"
        raise UserError(Problem(message, key="samples", value=str(folder)))
    return found


def find_previews(folder: Path, output_name: str | None, *, step: int, epoch: int | None) -> list[Path]:
    """The run's previews of this step, or else of the end of this epoch, in the order of their prompts.

    A run that was interrupted may have drawn a preview twice. The newer one is returned.
    """
    prefix = f"{output_name}_" if output_name else ""
    for moment in (f"{step:06d}", None if epoch is None else f"e{epoch:06d}"):
        newest: dict[int, tuple[str, Path]] = {}
        for path in folder.glob("*.png"):
            found = PREVIEW.fullmatch(path.name.removeprefix(prefix)) if path.name.startswith(prefix) else None
            if found and found["moment"] == moment:
                index, drawn = int(found["index"]), (found["time"], path)
                newest[index] = max(newest.get(index, drawn), drawn)
        if newest:
            return [newest[index][1] for index in sorted(newest)]
    return []
