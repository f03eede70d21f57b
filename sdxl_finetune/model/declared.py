"""The objective that a checkpoint says it was trained with: v-prediction, zero terminal SNR.

Weights do not show their objective, and a model that is trained on with the other one is destroyed slowly. Checkpoints
say their objective in four places:

- empty tensors with the keys `v_pred` and `ztsnr`, which user interfaces look for
- metadata `modelspec.prediction_type` (ModelSpec 1.0.1) or `prediction_type`
- metadata of this program, with the config
- `scheduler/scheduler_config.json` in a diffusers folder
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_finetune.errors import Problem
from sdxl_finetune.model.tensorfile import TensorFile

CONFIG = "sdxl_finetune.config"
"""Metadata field with the options of the run that saved the checkpoint, as JSON."""
_V_WORDS = ("v", "v_prediction", "vpred", "v-prediction", "v_pred", "velocity")
_EPSILON_WORDS = ("epsilon", "eps", "noise")


@dataclass(frozen=True, kw_only=True)
class Declared:
    """The objective of a checkpoint. None: the checkpoint does not say it."""

    v_prediction: bool | None
    zero_terminal_snr: bool | None

    def contradictions(self, path: Path, *, v_parameterization: bool, zero_terminal_snr: bool) -> Iterator[Problem]:
        """Yields a remark for each of these options that contradicts the checkpoint at `path`."""
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


def read_declared(file: TensorFile) -> Declared:
    """Reads what a checkpoint says. Tensors win over metadata, and metadata over the scheduler's config."""
    words = [file.metadata.get(name) for name in ("modelspec.prediction_type", "prediction_type")]
    v_said = [_is_v(word) for word in [*words, file.scheduler.get("prediction_type")]]
    options = _trained_with(file.metadata)
    terminal_said = [options.get("zero_terminal_snr"), file.scheduler.get("rescale_betas_zero_snr")]
    return Declared(
        v_prediction=True if "v_pred" in file.tensors else _first(v_said),
        zero_terminal_snr=True if "ztsnr" in file.tensors else _first(terminal_said),
    )


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
