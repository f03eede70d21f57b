"""The weights of a whole model as sources: what every writer of checkpoints is given.

A model in memory (save.py), files on the disk (load.py) and a merge of files (merge.py) all become `Weights`. A writer
reads one tensor after the other, so that no writer needs memory for the whole model.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from sdxl_finetune.model.architecture import Architecture
from sdxl_finetune.model.tensorfile import Source


@dataclass(frozen=True, kw_only=True)
class Weights:
    """All tensors of an SDXL model and its VAE, by name (see keymap.py), in the shapes of the modules."""

    architecture: Architecture
    tensors: Mapping[str, Source]
    markers: Mapping[str, Tensor]
    """Marker tensors by key (see declared.py)."""
