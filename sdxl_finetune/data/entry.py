"""One image of the index, as a Python object, with the bucket in which it is trained."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from sdxl_finetune.config.dataset import Subset
from sdxl_finetune.data.contents import read_image
from sdxl_finetune.data.images import load_crop
from sdxl_finetune.data.mask_files import NO_MASK
from sdxl_finetune.storage import Location


@dataclass(frozen=True)
class Bucket:
    """An aspect-ratio bucket: the images of one dataset that are trained at one size in pixels."""

    dataset: int
    width: int
    height: int


@dataclass(frozen=True)
class Entry:
    """One image of the index. Sizes are (width, height) in pixels."""

    path: Location
    """In a tar file: the path of the tar file, and the member's name below it."""
    captions: tuple[str | None, ...]
    """The whole text of each caption source, None for a source that the image does not have."""
    subset: Subset
    size: tuple[int, int]
    resized: tuple[int, int]
    bucket: Bucket
    interpolation: str | None
    stat: tuple[int, int]
    """Size in bytes, and the modification time or version that the scan noted for the image."""
    offset: int = -1
    """Position of the image in its tar file in bytes, -1 for a file of its own."""
    quality: str | None = None
    """Quality tag of the image."""
    mask: Location | None = None
    """File of the mask."""
    mask_stat: tuple[int, int] = (NO_MASK, 0)
    """Size of that file in bytes, NO_MASK or SHARED; and its modification time or version."""

    @property
    def caption(self) -> str:
        """The text of the first caption source that the image has."""
        return next((text for text in self.captions if text is not None), "")

    def read(self, *, unchanged: bool = False) -> bytes:
        """The content of the image file. Raises ImageError.

        An object and a tar file must be as the scan found them. A file of its own must be so if `unchanged` is true.
        """
        container = None
        if self.offset >= 0:
            container = self.subset.image_dir / self.path.relative_to(self.subset.image_dir).parts[0]
        return read_image(self.path, container, self.offset, self.stat, unchanged=unchanged)

    def load(
        self, left_top: tuple[int, int], data: bytes | None = None, *, resized: tuple[int, int] | None = None
    ) -> UInt8[np.ndarray, "H W 3"]:
        """The image's pixels in its bucket. Raises ImageError.

        `left_top` is the position of the crop in the resized image. `data` is the file's content, if it was read.
        `resized` replaces the size before the crop.
        """
        return load_crop(
            self.path,
            size=self.size,
            resized=resized or self.resized,
            left_top=left_top,
            bucket=(self.bucket.width, self.bucket.height),
            interpolation=self.interpolation,
            data=self.read() if data is None else data,
            hides=not self.subset.alpha_mask,
        )

    @property
    def has_mask(self) -> bool:
        return self.subset.alpha_mask or self.subset.conditioning_data_dir is not None
