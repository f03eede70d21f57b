"""The objective that a checkpoint says it was trained with: v-prediction, zero terminal SNR.

Weights do not show their objective, and a model that is trained on with the other one is destroyed slowly. Checkpoints
say their objective in four places:

- marker tensors: empty tensors with the keys `v_pred` and `ztsnr`, which user interfaces look for (interfaces.py)
- metadata `modelspec.prediction_type` (ModelSpec 1.0.1), `modelspec.predict_key` (ComfyUI) or `prediction_type`
- metadata of this program, with the config
- `scheduler/scheduler_config.json` in a diffusers folder

Loading keeps the markers in `SDXL.markers`, training replaces them by those of its own objective, and saving writes
them into every format.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdxl_finetune.errors import Problem
from sdxl_finetune.model.tensorfile import TensorFile

V_PRED, ZTSNR = "v_pred", "ztsnr"
"""Keys of the empty tensors by which user interfaces recognise v-prediction and zero terminal SNR."""
EDM = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
"""Keys of the tensors of models on EDM's continuous noise levels: Playground v2.5 (the first two) and CosXL."""
CONFIG = "sdxl_finetune.config"
"""Metadata field with the options of the run that saved the checkpoint, as JSON."""
_V_WORDS = ("v", "v_prediction", "vpred", "v-prediction", "v_pred", "velocity")
_EPSILON_WORDS = ("epsilon", "eps", "noise")


@dataclass(frozen=True, kw_only=True)
class Declared:
    """The objective of a checkpoint. None: the checkpoint does not say it."""

    v_prediction: bool | None
    zero_terminal_snr: bool | None
    zero_cond: bool | None = None
    """True if empty captions were trained as zeros, False if as the encoded empty text."""
    edm: bool = False
    """True for a model on EDM's noise levels, of which SDXL's noise schedule knows nothing."""

    def contradictions(self, path: Path, *, v_parameterization: bool, zero_terminal_snr: bool) -> Iterator[Problem]:
        """Yields a remark for each of these options that contradicts the checkpoint at `path`.

        A checkpoint that says nothing gets one remark if the options ask for v-prediction, because most such
        checkpoints predict noise. The reference makes no such remarks.
        """
        if self.edm:
            message = "is trained on EDM's noise levels (Playground v2.5, CosXL), and training would slowly change that"
            yield Problem(f"{message}: choose another checkpoint", file=str(path))
        elif v_parameterization and self.v_prediction is None:
            message = f"{path} does not say what it predicts, and most such checkpoints predict noise"
            remedy = "training then has to teach it velocity first, so watch the previews"
            yield Problem(f"{message}: {remedy}", key="v_parameterization", value=True)
        for name, asked, said, kinds in (
            ("v_parameterization", v_parameterization, self.v_prediction, ("predicts noise", "predicts velocity")),
            (
                "zero_terminal_snr",
                zero_terminal_snr,
                self.zero_terminal_snr,
                ("has no zero terminal SNR", "has zero terminal SNR"),
            ),
        ):
            if said is not None and said != asked:
                message = f"{path} says that it {kinds[said]}, and training would slowly change that"
                yield Problem(f"{message}: set {name} = {str(said).lower()}", key=name, value=asked)

    def zero_cond_remarks(self, path: Path, *, use_zero_cond: bool) -> Iterator[Problem]:
        """Yields a remark if the checkpoint at `path` was trained with zeros for empty captions, and the run is not.

        The contrary is no contradiction: a run that drops no caption says `use_zero_cond = false` as well.
        """
        if self.zero_cond and not use_zero_cond:
            message = f"{path} says that empty captions were trained as zeros, and training would slowly change that"
            yield Problem(f"{message}: set use_zero_cond = true", key="use_zero_cond", value=False)


def read_declared(file: TensorFile) -> Declared:
    """Reads what a checkpoint says. Tensors win over metadata, and metadata over the scheduler's config."""
    names = ("modelspec.prediction_type", "modelspec.predict_key", "prediction_type")
    words = [file.metadata.get(name) for name in names]
    v_said = [_is_v(word) for word in [*words, file.scheduler.get("prediction_type")]]
    options = _trained_with(file.metadata)
    terminal_said = [options.get("zero_terminal_snr"), file.scheduler.get("rescale_betas_zero_snr")]
    return Declared(
        v_prediction=True if V_PRED in file.tensors else _first(v_said),
        zero_terminal_snr=True if ZTSNR in file.tensors else _first(terminal_said),
        zero_cond=options.get("use_zero_cond"),
        edm=any(key in file.tensors for key in EDM),
    )


def marker_tensors(*, v_prediction: bool, zero_terminal_snr: bool) -> dict[str, Tensor]:
    """Builds the marker tensors of an objective by key, empty as ComfyUI writes them."""
    return {key: torch.empty(0) for key, said in ((V_PRED, v_prediction), (ZTSNR, zero_terminal_snr)) if said}


def read_markers(file: TensorFile) -> dict[str, Tensor]:
    """Reads the marker tensors of a checkpoint. What it says in another place becomes a marker too."""
    declared = read_declared(file)
    markers = marker_tensors(
        v_prediction=bool(declared.v_prediction), zero_terminal_snr=bool(declared.zero_terminal_snr)
    )
    return markers | {key: file.tensors[key].read().clone() for key in EDM if key in file.tensors}


def _first(said: Iterable[bool | None]) -> bool | None:
    return next((each for each in said if each is not None), None)


def _is_v(word: Any) -> bool | None:
    word = str(word).lower()
    return True if word in _V_WORDS else False if word in _EPSILON_WORDS else None


def _trained_with(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The options of the run that saved the checkpoint; empty if it does not say them."""
    try:
        return dict(json.loads(metadata.get(CONFIG, "{}")))
    except (ValueError, TypeError):
        return {}
