"""The objective that a checkpoint says it was trained with: noise, velocity or flow, zero terminal SNR, EDM.

Weights do not show their objective, and a model that is trained on with another one is destroyed slowly. Checkpoints
say their objective in four places:

- marker tensors: the empty tensors `v_pred` and `ztsnr`, which user interfaces look for (interfaces.py), and the
  tensors `flow_model`, `flow_shift` and `flow_base_pixels` of this program, for which no interface looks
- metadata `modelspec.prediction_type` (ModelSpec 1.0.1), `modelspec.predict_key` (ComfyUI) or `prediction_type`
- metadata of this program, with the config
- `scheduler/scheduler_config.json` in a diffusers folder

Loading keeps the markers in `SDXL.markers`, training replaces them by those of its own objective, and saving writes
them into every format.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from sdxl_finetune.config.flow_options import FlowOptions
from sdxl_finetune.config.training_options import ObjectiveKind
from sdxl_finetune.errors import Problem
from sdxl_finetune.model.tensorfile import TensorFile
from sdxl_finetune.parsing import parse_json

V_PRED, ZTSNR = "v_pred", "ztsnr"
"""Keys of the empty tensors by which user interfaces recognise v-prediction and zero terminal SNR."""
FLOW, FLOW_SHIFT, FLOW_BASE_PIXELS = "flow_model", "flow_shift", "flow_base_pixels"
"""Keys of the tensors of a flow: an empty one, and one number for the shift that it was trained with.

The number is `flow_uniform_static_ratio`, or `flow_uniform_base_pixels` of a shift by resolution. The tensors keep the
objective in formats without metadata, and in merges by other programs.
"""
FLOW_KEYS = (FLOW, FLOW_SHIFT, FLOW_BASE_PIXELS)
EDM = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
"""Keys of the tensors of models on EDM's continuous noise levels: Playground v2.5 (the first two) and CosXL."""
CONFIG = "sdxl_finetune.config"
"""Metadata field with the options of the run that saved the checkpoint, as JSON."""
ZERO_COND = "sdxl_finetune.use_zero_cond"
"""Metadata field of merges, which have no config: "true" or "false"."""
SIZE = re.compile(r"([0-9]{2,4})x([0-9]{2,4})")
SDXL_SIZE = (1024, 1024)
"""Width and height in pixels that SDXL is trained at."""
LEAST_SIDE, MOST_SIDE = 64, 2048
"""Pixels of a side that `modelspec.resolution` is believed to say. An image of 9999x9999 takes all memory."""
GUIDE = "docs/objectives.md"
"""The page about turning a model of one objective into one of another."""
KIND_NAMES: Mapping[ObjectiveKind, str] = {
    "noise": "noise prediction",
    "velocity": "v-prediction",
    "flow": "a flow (flow matching)",
}
_WORDS: Mapping[ObjectiveKind, tuple[str, ...]] = {
    "noise": ("epsilon", "eps", "noise"),
    "velocity": ("v", "v_prediction", "vpred", "v-prediction", "v_pred", "velocity"),
    "flow": ("flow", "flow_prediction", "flow_matching", "flow-matching", "rectified_flow", "rectified-flow", "rf"),
}
MODELSPEC: Mapping[ObjectiveKind, str] = {"noise": "epsilon", "velocity": "v", "flow": "flow"}
"""Values of the metadata field `modelspec.prediction_type`. ModelSpec 1.0.1 names epsilon and v."""
_PREDICTS: Mapping[ObjectiveKind, str] = {
    "noise": "predicts noise",
    "velocity": "predicts velocity",
    "flow": "is a flow",
}
_SETTINGS: Mapping[ObjectiveKind, str] = {
    "noise": "v_parameterization = false",
    "velocity": "v_parameterization = true",
    "flow": "flow_model = true",
}


@dataclass(frozen=True, kw_only=True)
class Declared:
    """The objective of a checkpoint. None: the checkpoint does not say it."""

    objective: ObjectiveKind | None
    zero_terminal_snr: bool | None
    zero_cond: bool | None = None
    """True if empty captions were trained as zeros, False if as the encoded empty text."""
    flow: FlowOptions = field(default_factory=FlowOptions)
    """The shift of a flow, in its three options. No shift if the checkpoint says none."""
    size: tuple[int, int] | None = None
    """Width and height in pixels of the training (`modelspec.resolution`); None also if it says an unusual one."""
    edm: bool = False
    """True for a model on EDM's noise levels, of which SDXL's noise schedule knows nothing."""

    def contradictions(
        self, path: Path, *, objective: ObjectiveKind, zero_terminal_snr: bool, use_zero_cond: bool
    ) -> Iterator[Problem]:
        """Yields remarks on options that contradict the checkpoint at `path`. The reference makes no such remarks.

        A checkpoint that says nothing gets one remark if the options ask for a velocity or a flow, because most such
        checkpoints predict noise. A run without `use_zero_cond` contradicts a checkpoint with it. The contrary is no
        contradiction: a run that drops no caption says `use_zero_cond = false` as well.
        """
        if self.edm:
            message = "is trained on EDM's noise levels (Playground v2.5, CosXL), and training would slowly change that"
            yield Problem(f"{message}: choose another checkpoint", file=str(path))
        elif self.objective is None:
            yield from _unsaid(path, objective)
        if self.objective not in (None, objective):
            yield _other_objective(path, said=self.objective, asked=objective)
        said = self.zero_terminal_snr
        if said is not None and said != zero_terminal_snr and "flow" not in (self.objective, objective):
            kind = "has zero terminal SNR" if said else "has no zero terminal SNR"
            message = f"{path} says that it {kind}, and training would slowly change that"
            remedy = f"set zero_terminal_snr = {str(said).lower()}"
            yield Problem(f"{message}: {remedy}", key="zero_terminal_snr", value=zero_terminal_snr)
        if self.zero_cond and not use_zero_cond:
            message = f"{path} says that empty captions were trained as zeros, and training would slowly change that"
            yield Problem(f"{message}: set use_zero_cond = true", key="use_zero_cond", value=False)


def _unsaid(path: Path, asked: ObjectiveKind) -> Iterator[Problem]:
    message = f"{path} does not say what it predicts, and most such checkpoints predict noise"
    if asked == "velocity":
        remedy = "training then has to teach it velocity first, so watch the previews"
        yield Problem(f"{message}: {remedy}", key="v_parameterization", value=True)
    elif asked == "flow":
        remedy = f"training then has to teach it the flow first, so watch the previews, and read {GUIDE}"
        yield Problem(f"{message}: {remedy}", key="flow_model", value=True)


def _other_objective(path: Path, *, said: ObjectiveKind, asked: ObjectiveKind) -> Problem:
    """The remark that a model of one objective is trained on with another."""
    message = f"{path} says that it {_PREDICTS[said]}"
    if asked == "flow":
        message += ". Training first turns it into a flow, and until then pictures are wrong"
        return Problem(f"{message}: see {GUIDE}, or set flow_model = false", key="flow_model", value=True)
    remedy = f"{message}, and training would slowly change that: set {_SETTINGS[said]}"
    if said == "flow":
        remove = " and remove v_parameterization" if asked == "velocity" else ""
        return Problem(f"{remedy}{remove}", key="flow_model", value=False)
    return Problem(remedy, key="v_parameterization", value=asked == "velocity")


def read_declared(file: TensorFile) -> Declared:
    """Reads what a checkpoint says. Tensors win over metadata, and metadata over the scheduler's config."""
    names = ("modelspec.prediction_type", "modelspec.predict_key", "prediction_type")
    words = [file.metadata.get(name) for name in names]
    options = _trained_with(file.metadata)
    terminal_said = [options.get("zero_terminal_snr"), file.scheduler.get("rescale_betas_zero_snr")]
    marked = marked_objective(file.tensors)
    kinds: list[ObjectiveKind | None] = [None if marked == "noise" else marked]
    kinds += [*map(_kind, words), _scheduler_kind(file.scheduler)]
    objective = next((kind for kind in kinds if kind), None)
    return Declared(
        objective=objective,
        zero_terminal_snr=True if ZTSNR in file.tensors else _first(terminal_said),
        size=_believed_size(file.metadata.get("modelspec.resolution", "")),
        zero_cond=_first([options.get("use_zero_cond"), _SWITCHES.get(file.metadata.get(ZERO_COND, ""))]),
        flow=_read_shift(file, options) if objective == "flow" else FlowOptions(),
        edm=any(key in file.tensors for key in EDM),
    )


def marker_tensors(
    objective: ObjectiveKind, *, zero_terminal_snr: bool, flow: FlowOptions | None = None
) -> dict[str, Tensor]:
    """Builds the marker tensors of an objective by key. Those without a number are empty, as ComfyUI writes them.

    A flow has no zero terminal SNR, because it always ends in pure noise. `flow` has the shift of a flow.
    """
    if objective != "flow":
        said = (V_PRED, objective == "velocity"), (ZTSNR, zero_terminal_snr)
        return {key: torch.empty(0) for key, is_said in said if is_said}
    markers, flow = {FLOW: torch.empty(0)}, flow or FlowOptions()
    if flow.flow_uniform_static_ratio is not None:
        markers[FLOW_SHIFT] = torch.tensor([flow.flow_uniform_static_ratio])
    elif flow.flow_uniform_shift:
        markers[FLOW_BASE_PIXELS] = torch.tensor([flow.flow_uniform_base_pixels])
    return markers


def read_markers(file: TensorFile) -> dict[str, Tensor]:
    """Reads the marker tensors of a checkpoint. What it says in another place becomes a marker too."""
    declared = read_declared(file)
    markers = marker_tensors(
        declared.objective or "noise",
        zero_terminal_snr=bool(declared.zero_terminal_snr),
        flow=declared.flow,
    )
    return markers | {key: file.tensors[key].read().clone() for key in EDM if key in file.tensors}


def marked_objective(markers: Collection[str]) -> ObjectiveKind:
    """The objective that the keys of marker tensors stand for."""
    return "flow" if FLOW in markers else "velocity" if V_PRED in markers else "noise"


def marked_shift(markers: Mapping[str, Tensor]) -> FlowOptions:
    """The shift that marker tensors stand for."""
    if FLOW_SHIFT in markers:
        return _shift(flow_uniform_static_ratio=markers[FLOW_SHIFT].flatten()[:1].tolist())
    if FLOW_BASE_PIXELS in markers:
        pixels = markers[FLOW_BASE_PIXELS].flatten()[:1].tolist()
        return _shift(flow_uniform_shift=[True], flow_uniform_base_pixels=pixels)
    return FlowOptions()


def _read_shift(file: TensorFile, options: Mapping[str, Any]) -> FlowOptions:
    if not file.tensors.keys().isdisjoint((FLOW_SHIFT, FLOW_BASE_PIXELS)):
        return marked_shift({key: file.tensors[key].read() for key in FLOW_KEYS if key in file.tensors})
    if FLOW in file.tensors:
        return FlowOptions()
    if options:
        return _shift(**{name: [options[name]] for name in _SHIFT_OPTIONS if name in options})
    said = file.scheduler.get("flow_shift", file.scheduler.get("shift"))
    return _shift(flow_uniform_static_ratio=[said] if isinstance(said, int | float) and said != 1 else [])


_SWITCHES = {"true": True, "false": False}
_SHIFT_OPTIONS = ("flow_uniform_static_ratio", "flow_uniform_shift", "flow_uniform_base_pixels")


def _shift(**values: list[Any]) -> FlowOptions:
    """The shift of these options, each with one value or none; no shift if a value is out of its range."""
    try:
        return FlowOptions(**{name: value for name, found in values.items() for value in found})
    except ValidationError:
        return FlowOptions()


def _first(said: Iterable[Any]) -> bool | None:
    """The first of these values that is true or false. The metadata of a foreign file may hold anything."""
    return next((each for each in said if isinstance(each, bool)), None)


def _believed_size(text: str) -> tuple[int, int] | None:
    """Width and height of `modelspec.resolution`; None if it says none that a model of SDXL is trained at."""
    found = SIZE.fullmatch(text)
    sides = tuple(map(int, found.groups())) if found else (0, 0)
    return (sides[0], sides[1]) if all(LEAST_SIDE <= side <= MOST_SIDE for side in sides) else None


def _kind(word: Any) -> ObjectiveKind | None:
    word = str(word).lower()
    return next((kind for kind, words in _WORDS.items() if word in words), None)


def _scheduler_kind(scheduler: Mapping[str, Any]) -> ObjectiveKind | None:
    """The objective of a diffusers scheduler. Classes for flows have no `prediction_type`."""
    is_flow = str(scheduler.get("_class_name", "")).startswith("FlowMatch") or scheduler.get("use_flow_sigmas")
    return "flow" if is_flow else _kind(scheduler.get("prediction_type"))


def _trained_with(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The options of the run that saved the checkpoint; empty if it does not say them."""
    try:
        return dict(parse_json(metadata.get(CONFIG, "{}")))
    except (ValueError, TypeError):
        return {}
