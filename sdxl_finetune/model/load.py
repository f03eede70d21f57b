"""Loading an SDXL checkpoint: a single .safetensors or .ckpt file, or a diffusers folder, of any width and depth.

Modules are built on the meta device and their parameters made one at a time from the mapped file, so that no more
memory is used than the model takes. Nothing is ever downloaded. Whatever is wrong with a file, or that it is not
SDXL but something else, is a UserError that says so.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.low_bits import split
from sdxl_finetune.model.architecture import Architecture, read_architecture, read_vae_config
from sdxl_finetune.model.diffusers_folder import open_folder, open_vae
from sdxl_finetune.model.identify import kind_of
from sdxl_finetune.model.keymap import LOGIT_SCALE, VAE, module_name
from sdxl_finetune.model.layout import Named
from sdxl_finetune.model.sdxl import SDXL
from sdxl_finetune.model.tensorfile import Source, TensorFile, open_tensors
from sdxl_finetune.model.text import refill_positions

logger = logging.getLogger(__name__)

Format = Literal["safetensors", "ckpt", "diffusers"]


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A checkpoint in memory."""

    model: SDXL
    vae: AutoencoderKL
    """In float32, not to be trained."""
    format: Format
    metadata: Mapping[str, str]
    """Of a .safetensors file; else empty."""
    epoch: int | None
    """Of a .ckpt that says so."""
    global_step: int | None


def load_checkpoint(
    path: Path, *, dtype: torch.dtype | None, vae_path: Path | None = None, exact: bool = False
) -> Loaded:
    """The model at `path`, in `dtype` (None: one that holds the file's values exactly), and its VAE, or the VAE at
    `vae_path` instead. If `exact`, the low bits that bf16 lacks go into the model's master weights. UserError
    when a file cannot be read or is not what it should be.
    """
    opened, format_ = open_base_model(path, needs_vae=vae_path is None)
    with _about(path):
        named = named_vae = Named(opened.tensors)
    if vae_path is not None:
        with _about(vae_path):
            named_vae = Named(open_vae(_existing(Path(vae_path))))
    with _about(path), torch.device("meta"):
        model = SDXL(read_architecture(named, named_vae))
    with _about(path):
        parts = {"unet": model.unet, "te1": model.te1, "te2": model.te2}
        _check(parts, named, model.unused_names())
        for part, module in parts.items():
            low = _fill(part, module, named, dtype or exact_dtype(opened.tensors), exact=exact)
            for name, bits in low.items():
                model.masters.add(module.get_parameter(name), bits)
        model.unused = {name: named.read(name).clone() for name in model.unused_names() if name in named}
    vae = _build_vae(named_vae, vae_path or path)
    with _about(path):
        _warn_of_rest(named, {**parts, "vae": vae}, model.unused)
    refill_positions(model.te1)
    refill_positions(model.te2)
    return Loaded(
        model=model,
        vae=vae,
        format=format_,
        metadata=opened.metadata,
        epoch=opened.epoch,
        global_step=opened.global_step,
    )


def load_vae(path: Path, vae_path: Path | None = None) -> AutoencoderKL:
    """Only the VAE that `load_checkpoint` loads, likewise."""
    if vae_path is None:
        opened, _ = open_base_model(path)
        with _about(path):
            return _build_vae(Named(opened.tensors), path)
    with _about(vae_path):
        return _build_vae(Named(open_vae(_existing(Path(vae_path)))), vae_path)


def _build_vae(named: Named, path: Path) -> AutoencoderKL:
    with _about(path):
        with torch.device("meta"):
            vae = AutoencoderKL(**read_vae_config(named))
        _check({"vae": vae}, named, ())
        _fill("vae", vae, named, torch.float32)
    return vae.eval().requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """What a file or folder is, without its values."""

    file: TensorFile
    format: Format
    kind: str | None
    """What it is if not an SDXL base model."""
    architecture: Architecture | None
    """Of an SDXL base model."""


def inspect_checkpoint(path: Path) -> Inspected:
    """Looks at the header of whatever is at `path`. UserError when it cannot be read."""
    file, format_ = open_checkpoint(path)
    kind = kind_of(file.tensors)
    architecture = None
    if kind is None:
        with _about(path):
            named = Named(file.tensors)
            architecture = read_architecture(named, named)
    return Inspected(file=file, format=format_, kind=kind, architecture=architecture)


def open_checkpoint(path: Path) -> tuple[TensorFile, Format]:
    """The tensors of the file or folder at `path`, whatever model it is, without reading them."""
    if _existing(path).is_dir():
        return open_folder(path), "diffusers"
    return open_tensors(path), "safetensors" if path.suffix == ".safetensors" else "ckpt"


def open_base_model(path: Path, *, needs_vae: bool = True) -> tuple[TensorFile, Format]:
    """Likewise, of an SDXL base model. UserError when it is something else."""
    opened, format_ = open_checkpoint(Path(path))
    with _about(path):
        if kind := kind_of(opened.tensors, needs_vae=needs_vae):
            raise UserError(f"this is {kind}, not an SDXL base model")
    return opened, format_


def exact_dtype(tensors: Mapping[str, Source]) -> torch.dtype:
    """The dtype in which trained weights (all but the VAE's) are held without loss: that of all, or float32."""
    trained = {source.dtype for key, source in tensors.items() if not key.startswith((VAE, "vae."))}
    floating = {dtype for dtype in trained if dtype.is_floating_point}
    return floating.pop() if floating in ({torch.float16}, {torch.bfloat16}) else torch.float32


def _existing(path: Path) -> Path:
    if not path.exists():
        raise UserError(Problem("there is no such file or folder (models are never downloaded)", file=str(path)))
    return path


@contextlib.contextmanager
def _about(path: Path) -> Iterator[None]:
    """Problems that name no file are about this one."""
    try:
        yield
    except UserError as error:
        named = [
            problem if problem.file else dataclasses.replace(problem, file=str(path)) for problem in error.problems
        ]
        raise UserError(named) from None


def _check(parts: Mapping[str, nn.Module], named: Named, also: Iterable[str]) -> None:
    """UserError when the checkpoint lacks tensors of `parts` or has them in another shape."""
    shapes = {
        module_name(part, name): tuple(parameter.shape)
        for part, module in parts.items()
        for name, parameter in module.named_parameters()
    }
    missing = [named.key(name) for name in [*shapes, *also] if name not in named and name != LOGIT_SCALE]
    wrong = [
        f"{named.key(name)} is {list(named.shape(name))}, not {list(shape)}"
        for name, shape in shapes.items()
        if name in named and named.shape(name) != shape
    ]
    problems = []
    if missing:
        problems.append(Problem(f"{_some(missing)} missing: the file is damaged, or is not SDXL"))
    if wrong:
        problems.append(Problem(f"tensors whose shapes do not fit the rest: {_some(wrong)}"))
    if problems:
        raise UserError(problems)


def _some(items: list[str]) -> str:
    shown = ", ".join(items[:4])
    return shown if len(items) <= 4 else f"{shown} and {len(items) - 4} more"


def _fill(part: str, module: nn.Module, named: Named, dtype: torch.dtype, *, exact: bool = False) -> dict[str, Tensor]:
    """Gives a module on the meta device its weights; returns the low bits of those that bfloat16 does not hold."""
    tensors, low = {}, {}
    for name, parameter in module.named_parameters():
        value = named.read(module_name(part, name))
        if exact and value.dtype != dtype:
            tensors[name], bits = split(value.float())
            if bits.any():
                low[name] = bits
        else:
            tensors[name] = torch.empty(parameter.shape, dtype=dtype).copy_(value)
    module.load_state_dict(tensors, assign=True)
    return low


def _warn_of_rest(named: Named, parts: Mapping[str, nn.Module], unused: Iterable[str]) -> None:
    """One warning about tensors that no part of SDXL has, and that a saved file will not hold."""
    names = [module_name(part, name) for part, module in parts.items() for name, _ in module.named_parameters()]
    known = {named.key(name) for name in [*names, *unused]}
    rest = [key for key in named.tensors if key not in known and not key.endswith("position_ids")]
    if rest:
        logger.warning("%d tensors that are not SDXL's are left out: %s", len(rest), _some(rest))
