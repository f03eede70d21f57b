"""Options by which the user says the objective of a checkpoint, for convert, generate, compare and card.

`convert` writes what they say into the checkpoint. The others draw with it. They are needed for checkpoints that do not
say their objective (model/declared.py).
"""

import argparse
import math
from typing import TYPE_CHECKING

from sdxl_finetune.errors import Problem, UserError

if TYPE_CHECKING:
    from sdxl_finetune.config import FlowOptions
    from sdxl_finetune.diffusion.objective import Objective
    from sdxl_finetune.model.declared import Declared
    from sdxl_finetune.model.load import Loaded

MEANINGS = {
    "v_parameterization": ("predicts velocity", "predicts no velocity"),
    "zero_terminal_snr": ("has zero terminal SNR", "has no zero terminal SNR"),
    "flow_model": ("is a flow", "is no flow"),
}
"""Meaning of each option, and of its `--no-` form, as a statement on the model."""


def add_written_objective(parser: argparse.ArgumentParser) -> None:
    """Adds the options of convert."""
    for option, (yes, no) in MEANINGS.items():
        described = f"say that the model {yes}, or that it {no} (default: as the model says)"
        parser.add_argument(f"--{option}", action=argparse.BooleanOptionalAction, default=None, help=described)
    described = "say with which shift the flow was trained. 1: none (default: as the model says)"
    parser.add_argument("--flow_shift", type=_ratio, metavar="R", help=described)


def add_drawn_objective(parser: argparse.ArgumentParser) -> None:
    """Adds the options of generate, compare and card."""
    unsaid = "The metadata of models from sdxl-train says this already"
    for option, (yes, _) in MEANINGS.items():
        parser.add_argument(f"--{option}", action="store_true", help=f"the model {yes}. {unsaid}")
    described = f"shift with which the flow was trained. 1: none. {unsaid}"
    parser.add_argument("--flow_shift", type=_ratio, metavar="R", help=described)


def drawn_objective(declared: "Declared", arguments: argparse.Namespace) -> "tuple[Objective, FlowOptions]":
    """The objective and the shift to draw a checkpoint with: as the command line says, or else the checkpoint.

    Raises UserError for a shift of a model that is no flow.
    """
    from sdxl_finetune.config import FlowOptions
    from sdxl_finetune.diffusion.objective import build_objective

    kind = declared.objective or "noise"
    if arguments.flow_model or arguments.v_parameterization:
        kind = "flow" if arguments.flow_model else "velocity"
    if kind != "flow" and arguments.flow_shift is not None:
        raise _shift_without_flow(arguments)
    zero_terminal_snr = arguments.zero_terminal_snr or bool(declared.zero_terminal_snr)
    ratio = arguments.flow_shift
    flow = declared.flow if ratio is None else FlowOptions(flow_uniform_static_ratio=ratio)
    return build_objective(kind, zero_terminal_snr=zero_terminal_snr), flow


def write_objective(loaded: "Loaded", arguments: argparse.Namespace) -> dict[str, str]:
    """Gives the model the markers that the command line asks for. Returns the metadata that goes with them.

    Raises UserError if the options contradict each other or the checkpoint.
    """
    from sdxl_finetune.config import FlowOptions
    from sdxl_finetune.model.declared import EDM, FLOW, FLOW_KEYS, V_PRED, ZTSNR, marker_tensors

    check_options(arguments)
    markers, metadata = loaded.model.markers, dict(loaded.metadata)
    asked = {V_PRED: arguments.v_parameterization, ZTSNR: arguments.zero_terminal_snr, FLOW: arguments.flow_model}
    given = [f"--{option}" for option in (*MEANINGS, "flow_shift") if getattr(arguments, option) is not None]
    if given and not markers.keys().isdisjoint(EDM):
        message = f"is an EDM model, which predicts in a way of its own. Leave out {' and '.join(given)}"
        raise UserError(Problem(message, file=str(arguments.model)))
    for key, value in asked.items():
        for removed in FLOW_KEYS if key == FLOW else (key,):
            if value is False:
                markers.pop(removed, None)
    if asked[V_PRED] or asked[ZTSNR]:
        for key in FLOW_KEYS:
            markers.pop(key, None)
        markers |= marker_tensors("velocity" if asked[V_PRED] else "noise", zero_terminal_snr=bool(asked[ZTSNR]))
    if asked[FLOW] or arguments.flow_shift is not None:
        if not asked[FLOW] and FLOW not in markers:
            raise _shift_without_flow(arguments)
        ratio = arguments.flow_shift
        flow = loaded.declared.flow if ratio is None else FlowOptions(flow_uniform_static_ratio=ratio)
        markers.clear()
        markers |= marker_tensors("flow", zero_terminal_snr=False, flow=flow)
    if False in (asked[V_PRED], asked[FLOW]):
        metadata["modelspec.prediction_type"] = "epsilon"
    return metadata


def check_options(arguments: argparse.Namespace) -> None:
    """Raises UserError if the options contradict each other."""
    if arguments.flow_model and (others := [name for name in MEANINGS if getattr(arguments, name)][:-1]):
        message = "a model has one objective, and a flow always ends in pure noise. Leave out --flow_model or"
        raise UserError(Problem(f"{message} --{' and --'.join(others)}", key="flow_model"))
    if arguments.flow_model is False and arguments.flow_shift is not None:
        raise _shift_without_flow(arguments)


def _shift_without_flow(arguments: argparse.Namespace) -> UserError:
    message = "only a flow has a shift. Add --flow_model, or leave out --flow_shift"
    return UserError(Problem(message, key="flow_shift", value=arguments.flow_shift))


def _ratio(text: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        ratio = math.nan
    if not 0 < ratio < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: must be a number above 0, as 1 or 2.5")
    return ratio
