"""Loads an SDXL checkpoint of any width and depth: a single .safetensors or .ckpt file, or a diffusers folder.

Modules are built on the meta device, and their parameters are made one at a time from the mapped file. Loading
therefore needs no more memory than the model. Nothing is ever downloaded. A damaged file, or a file that is not an SDXL
base model, raises a UserError that says what it is.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.low_bits import split
from sdxl_finetune.model.architecture import Architecture, read_architecture, read_vae_config, vae_config
from sdxl_finetune.model.declared import EDM, FLOW_KEYS, V_PRED, ZTSNR, Declared, read_declared, read_markers
from sdxl_finetune.model.diffusers_folder import open_folder, open_vae
from sdxl_finetune.model.identify import kind_of
from sdxl_finetune.model.keymap import LOGIT_SCALE, module_name
from sdxl_finetune.model.named_tensors import NamedTensors
from sdxl_finetune.model.sdxl import SDXL
from sdxl_finetune.model.tensorfile import Source, TensorFile, open_tensors
from sdxl_finetune.model.text import refill_positions
from sdxl_finetune.model.weights import Weights

logger = logging.getLogger(__name__)

Format = Literal["safetensors", "ckpt", "diffusers"]


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A checkpoint in memory."""

    model: SDXL
    vae: AutoencoderKL
    """In float32 and evaluation mode, without gradients."""
    format: Format
    metadata: Mapping[str, str]
    """Metadata of a .safetensors file; empty for other formats."""
    declared: Declared
    """The objective that the checkpoint says it was trained with."""
    epoch: int | None
    """Epoch in a .ckpt file, if it has one."""
    global_step: int | None
    """Optimizer steps in a .ckpt file, if it has that number."""


def load_checkpoint(
    path: Path, *, dtype: torch.dtype | None, vae_path: Path | None = None, exact: bool = False
) -> Loaded:
    """Loads the model at `path` in `dtype`, and its VAE, or the VAE at `vae_path` instead.

    If `dtype` is None, the model gets a dtype that holds the file's values exactly. If `exact`, the model's master
    weights get the low bits of values that a 16-bit `dtype` rounds.

    Raises UserError if a file cannot be read or is not an SDXL base model or VAE.
    """
    with _problems_in(path):
        file, format_ = open_base_model(path, needs_vae=vae_path is None)
        named = NamedTensors(file.tensors)
        named_vae = named if vae_path is None else _open_named_vae(vae_path)
        with torch.device("meta"):
            model = SDXL(read_architecture(named, named_vae))
        parts = {"unet": model.unet, "te1": model.te1, "te2": model.te2}
        _check_tensors(parts, named, model.unused_names())
        dtype = dtype or _exact_dtype(parts, named, model.unused_names())
        _fill_parts(model, parts, named, dtype, exact=exact)
        model.unused = {name: named.read(name).clone() for name in model.unused_names() if name in named}
        model.markers = read_markers(file)
        vae = _build_vae(named_vae, vae_path or path)
        _warn_of_unknown_tensors(named, {**parts, "vae": vae}, model.unused)
    return Loaded(
        model=model,
        vae=vae,
        format=format_,
        metadata=file.metadata,
        declared=read_declared(file),
        epoch=file.epoch,
        global_step=file.global_step,
    )


def load_text_encoders(path: Path, *, dtype: torch.dtype, vae_path: Path | None = None, exact: bool = False) -> SDXL:
    """Loads only the text encoders that `load_checkpoint` would load. The U-Net has shapes, but no values.

    Raises UserError as `load_checkpoint` does.
    """
    with _problems_in(path):
        named = NamedTensors(open_base_model(path, needs_vae=vae_path is None)[0].tensors)
        with torch.device("meta"):
            model = SDXL(read_architecture(named, named if vae_path is None else _open_named_vae(vae_path)))
        parts = {"te1": model.te1, "te2": model.te2}
        _check_tensors(parts, named, ())
        _fill_parts(model, parts, named, dtype, exact=exact)
    return model


def load_vae(path: Path, vae_path: Path | None = None) -> AutoencoderKL:
    """Loads only the VAE that `load_checkpoint` would load with these paths. Raises UserError as it does."""
    if vae_path is not None:
        return _build_vae(_open_named_vae(vae_path), vae_path)
    with _problems_in(path):
        return _build_vae(NamedTensors(open_base_model(path)[0].tensors), path)


def _open_named_vae(path: Path) -> NamedTensors:
    with _problems_in(path):
        return NamedTensors(open_vae(_existing(path)))


def _build_vae(named: NamedTensors, path: Path) -> AutoencoderKL:
    with _problems_in(path):
        with torch.device("meta"):
            vae = AutoencoderKL(**read_vae_config(named))
        _check_tensors({"vae": vae}, named, ())
        _fill("vae", vae, named, torch.float32)
    return vae.eval().requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """An SDXL base model of which each tensor is read when a writer asks for it."""

    weights: Weights
    dtype: torch.dtype
    """The dtype that holds the model's weights exactly."""
    file: TensorFile


def open_weights(path: Path) -> Opened:
    """Opens a model to read its tensors one by one. Raises UserError as `load_checkpoint` does."""
    with _problems_in(path):
        file, _ = open_base_model(path)
        named = NamedTensors(file.tensors)
        architecture = read_architecture(named, named)
        with torch.device("meta"):
            model, vae = SDXL(architecture), AutoencoderKL(**vae_config(architecture))
        parts = {"unet": model.unet, "te1": model.te1, "te2": model.te2}
        _check_tensors({**parts, "vae": vae}, named, model.unused_names())
        _warn_of_unknown_tensors(named, {**parts, "vae": vae}, model.unused_names())
        names = [module_name(p, name) for p, m in {**parts, "vae": vae}.items() for name, _ in m.named_parameters()]
        tensors = {
            name: Source(
                shape=named.shape(name),
                dtype=named.tensors[named.key(name)].dtype,
                read=partial(named.read, name),
            )
            for name in [*names, *model.unused_names()]
            if name in named
        }
        return Opened(
            weights=Weights(architecture=architecture, tensors=tensors, markers=read_markers(file)),
            dtype=_exact_dtype(parts, named, model.unused_names()),
            file=file,
        )


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """A file or folder, by its headers only."""

    file: TensorFile
    format: Format
    kind: str | None
    """Kind of the model, with its article; None for an SDXL base model."""
    architecture: Architecture | None
    """Architecture of an SDXL base model; None for other kinds."""


def inspect_checkpoint(path: Path) -> Inspected:
    """Reads the headers of any file or folder. Raises UserError if they cannot be read."""
    file, format_ = open_checkpoint(path)
    kind = kind_of(file.tensors)
    architecture = None
    if kind is None:
        with _problems_in(path):
            named = NamedTensors(file.tensors)
            architecture = read_architecture(named, named)
    return Inspected(file=file, format=format_, kind=kind, architecture=architecture)


def open_checkpoint(path: Path) -> tuple[TensorFile, Format]:
    """Opens a file or folder of any kind of model, without reading the values of its tensors."""
    if _existing(path).is_dir():
        return open_folder(path), "diffusers"
    return open_tensors(path), "safetensors" if path.suffix == ".safetensors" else "ckpt"


def open_base_model(path: Path, *, needs_vae: bool = True) -> tuple[TensorFile, Format]:
    """Opens an SDXL base model, without reading the values of its tensors. Raises UserError for another kind."""
    file, format_ = open_checkpoint(path)
    if kind := kind_of(file.tensors, needs_vae=needs_vae):
        raise UserError(Problem(f"this is {kind}, not an SDXL base model: choose another file", file=str(path)))
    return file, format_


def _exact_dtype(parts: Mapping[str, nn.Module], named: NamedTensors, unused: Iterable[str]) -> torch.dtype:
    """The dtype that holds the model's weights exactly: their common dtype, or float32.

    Foreign tensors do not count, and neither does logit_scale, one number that SDXL never uses.
    """
    names = [module_name(part, name) for part, module in parts.items() for name, _ in module.named_parameters()]
    keys = [named.key(name) for name in [*names, *unused] if name != LOGIT_SCALE]
    dtypes = {named.tensors[key].dtype for key in keys if key in named.tensors}
    return dtypes.pop() if dtypes in ({torch.float16}, {torch.bfloat16}) else torch.float32


def _existing(path: Path) -> Path:
    if not path.exists():
        message = "there is no such file or folder: check the path (models are never downloaded)"
        raise UserError(Problem(message, file=str(path)))
    return path


@contextlib.contextmanager
def _problems_in(path: Path) -> Iterator[None]:
    """Within the context, problems that name no file get this file."""
    try:
        yield
    except UserError as error:
        problems = [
            problem if problem.file else dataclasses.replace(problem, file=str(path)) for problem in error.problems
        ]
        raise UserError(problems) from None


def _check_tensors(parts: Mapping[str, nn.Module], named: NamedTensors, unused: Iterable[str]) -> None:
    """Raises UserError if the checkpoint has no tensors for `parts` or `unused` names, or has them in other shapes."""
    shapes = {
        module_name(part, name): tuple(parameter.shape)
        for part, module in parts.items()
        for name, parameter in module.named_parameters()
    }
    missing = [named.key(name) for name in [*shapes, *unused] if name not in named and name != LOGIT_SCALE]
    wrong = [
        f"{named.key(name)} is {list(named.shape(name))}, not {list(shape)}"
        for name, shape in shapes.items()
        if name in named and named.shape(name) != shape
    ]
    problems = []
    if missing:
        problems.append(Problem(f"{_first_four(missing)} missing: the file is damaged, or is not SDXL"))
    if wrong:
        problems.append(Problem(f"tensors whose shapes do not fit the rest: {_first_four(wrong)}"))
    if problems:
        raise UserError(problems)


def _first_four(items: list[str]) -> str:
    shown = ", ".join(items[:4])
    return shown if len(items) <= 4 else f"{shown} and {len(items) - 4} more"


def _fill_parts(
    model: SDXL, parts: Mapping[str, nn.Module], named: NamedTensors, dtype: torch.dtype, *, exact: bool
) -> None:
    """Gives parts of a model on the meta device their weights, and the model's master weights their low bits."""
    for part, module in parts.items():
        for name, bits in _fill(part, module, named, dtype, exact=exact).items():
            model.masters.add(module.get_parameter(name), bits)
        if part != "unet":
            refill_positions(module)


def _fill(
    part: str, module: nn.Module, named: NamedTensors, dtype: torch.dtype, *, exact: bool = False
) -> dict[str, Tensor]:
    """Gives a module on the meta device its weights.

    If `exact`, returns by name the low bits of those parameters whose values a 16-bit `dtype` does not hold.
    """
    tensors, low = {}, {}
    for name, parameter in module.named_parameters():
        value = named.read(module_name(part, name))
        if exact and value.dtype != dtype:
            tensors[name], bits = split(value.float(), dtype)
            if bits.any():
                low[name] = bits
        else:
            tensors[name] = torch.empty(parameter.shape, dtype=dtype).copy_(value)
    module.load_state_dict(tensors, assign=True)
    return low


def _warn_of_unknown_tensors(named: NamedTensors, parts: Mapping[str, nn.Module], unused: Iterable[str]) -> None:
    """Warns once of tensors that no part of SDXL has, and that saved checkpoints will not hold."""
    names = [module_name(part, name) for part, module in parts.items() for name, _ in module.named_parameters()]
    known = {named.key(name) for name in [*names, *unused]} | {V_PRED, ZTSNR, *FLOW_KEYS, *EDM}
    unknown = [key for key in named.tensors if key not in known and not key.endswith("position_ids")]
    if unknown:
        logger.warning("%d tensors that are not SDXL's are left out: %s", len(unknown), _first_four(unknown))
