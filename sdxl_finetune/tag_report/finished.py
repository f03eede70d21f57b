"""Losses that an interrupted measurement has computed, kept in a file until the report is complete.

The name of the file holds a hash of the model's weights and of everything that is measured. Another model, other
options or other images therefore never find it.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from jaxtyping import Float32

from sdxl_finetune.data.index import Index
from sdxl_finetune.model.sdxl import SDXL
from sdxl_finetune.parsing import parse_json
from sdxl_finetune.tag_report.choice import Choice

Losses = Float32[np.ndarray, "timesteps captions"]


@dataclass(frozen=True)
class Finished:
    """The file of finished losses. Only the first process has one; the path of the others is None."""

    path: Path | None

    def share(self) -> dict[int, Losses]:
        """The losses in the file by the number of their unit, on all processes. A damaged line is left out."""
        found = [_read(self.path)] if self.path else [{}]
        broadcast_object_list(found)
        return found[0]

    def add(self, losses: Mapping[int, Losses]) -> None:
        """Appends the losses of units."""
        if self.path is None or not losses:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps([number, values.astype(float).tolist()]) for number, values in losses.items()]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" + "\n".join(lines) + "\n")  # ends a line that a killed process left incomplete

    def remove(self) -> None:
        """Removes the file, after the report is saved."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def open_finished(folder: Path, sdxl: SDXL, choice: Choice, index: Index, computation: str, rank: int) -> Finished:
    """The file of a measurement. `computation` names everything else that changes losses, such as the precision."""
    if rank:
        return Finished(None)
    digest = hashlib.blake2b(f"{weights_digest(sdxl)} {choice.timesteps} {computation}".encode(), digest_size=12)
    for unit in choice.units:
        digest.update(index.stat_hashes[unit.row].tobytes() + repr(unit.captions).encode())
    return Finished(folder / f"measuring-{digest.hexdigest()}.jsonl")


def weights_digest(sdxl: SDXL) -> str:
    """A hash of all weights of U-Net and text encoders, in 32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    for module in (sdxl.unet, sdxl.te1, sdxl.te2):
        for name, parameter in sorted(module.named_parameters()):
            digest.update(f"{name} {list(parameter.shape)} {parameter.dtype} ".encode())
            digest.update(parameter.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def _read(path: Path) -> dict[int, Losses]:
    found: dict[int, Losses] = {}
    if path.is_file():
        for line in path.read_bytes().splitlines():
            with suppress(ValueError, TypeError):  # a killed process left an incomplete line
                number, values = parse_json(line)
                found[int(number)] = np.array(values, np.float32)
    return found
