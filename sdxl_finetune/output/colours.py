"""Mean, contrast and saturation of pictures, and how far drawn pictures are off those that they should resemble.

A wrong noise schedule or a training that goes wrong changes brightness and contrast long before any loss shows it. Lin
et al. (arXiv 2305.08891, section 2) describe this.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

NAMES = ("mean", "contrast", "saturation")
LUMA = (0.2126, 0.7152, 0.0722)
"""Weights of red, green and blue in the brightness of a pixel (ITU-R BT.709)."""
WORDS = {"mean": ("darker", "brighter"), "contrast": ("flatter", "harsher"), "saturation": ("paler", "more colourful")}
"""Words for pictures with too low and too high a figure."""


def measure(images: Float[Tensor, "k 3 H W"]) -> Float[Tensor, "k 3"]:
    """The figures of NAMES for images in [-1, 1], which are clipped. Figures are from 0 to 1.

    The mean and the contrast are mean and standard deviation of the brightness. The saturation is the mean difference
    of the strongest and the weakest colour of a pixel.
    """
    levels = (images.float().clamp(-1, 1) + 1) / 2
    luma = torch.einsum("kchw,c->khw", levels, torch.tensor(LUMA, device=levels.device)).flatten(1)
    chroma = (levels.amax(1) - levels.amin(1)).flatten(1)
    return torch.stack([luma.mean(1), luma.std(1, correction=0), chroma.mean(1)], dim=1)


@dataclass(frozen=True, kw_only=True)
class Drift:
    """One figure of drawn pictures beside that of the images of the same captions, as means over all pictures."""

    name: str
    drawn: float
    expected: float
    error: float
    """Standard error of the drift."""

    @property
    def value(self) -> float:
        return self.drawn - self.expected

    def is_beyond(self, bound: float) -> bool:
        """True if the drift is larger than `bound`, and twice its standard error does not explain it."""
        return abs(self.value) > max(bound, 2 * self.error)

    def __str__(self) -> str:
        word = WORDS[self.name][self.value > 0]
        return f"{word} ({self.name} {self.drawn:.2f} instead of {self.expected:.2f})"


def compare(drawn: Float[np.ndarray, "n 3"], expected: Float[np.ndarray, "n 3"]) -> list[Drift]:
    """The drift of each figure. The rows of both arrays are figures of a picture and of the image with its caption."""
    difference = drawn - expected
    count = len(difference)
    errors = difference.std(axis=0, ddof=1) / count**0.5 if count > 1 else np.full(3, 0.0)
    columns = zip(NAMES, drawn.mean(axis=0), expected.mean(axis=0), errors, strict=True)
    return [Drift(name=n, drawn=float(d), expected=float(e), error=float(error)) for n, d, e, error in columns]
