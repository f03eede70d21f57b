"""Compiling the U-Net's transformer blocks, where most of a step's time goes; the numbers stay the same to rounding.

Each block is compiled in place, so that parameters keep their names, and by itself, so that gradient checkpointing goes
on around it. Sizes are symbols (`dynamic`): the users' buckets have 59 shapes, and each would be compiled anew. What is
compiled is one graph for each width, doubled for batches of one image and for evaluation. The encoders are left
alone: they are a twentieth of the arithmetic of a step at 1024 pixels.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.model.sdxl import SDXL

GRAPHS = 64
"""So many may be compiled before torch gives up and runs blocks as they are: its 8 are just those named above."""


def check_compiler(backend: str, device: torch.device) -> None:
    """Compiles and differentiates a line of arithmetic. Raises UserError where that fails: a compiler is missing, the
    GPU is too old, or torch has no such backend.
    """
    with compiler_failures(backend, every=True):
        value = torch.ones(4, 4, device=device, requires_grad=True)
        torch.compile(_try_out, backend=backend, dynamic=True)(value).backward()


def _try_out(value: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(value @ value).sum()


def compile_blocks(model: SDXL, backend: str) -> None:
    """Has each block compiled when it is first used."""
    import torch._dynamo  # takes seconds, and only a run that compiles needs it

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    torch._dynamo.config.optimize_ddp = False  # cuts graphs where DDP's buckets end: blocks are short enough
    model.unet.compile_repeated_blocks(dynamic=True, backend=backend)


@contextmanager
def compiler_failures(backend: str, *, every: bool = False) -> Iterator[None]:
    """Turns what torch's compiler raises, or `every` exception, into a UserError of one line."""
    import torch._dynamo.exc

    kind: type[Exception] = Exception if every else torch._dynamo.exc.TorchDynamoException
    try:
        yield
    except kind as error:
        cause = getattr(error, "inner_exception", error)
        reason = ": ".join([type(cause).__name__, *str(cause).strip().splitlines()[:1]])
        message = f"the backend {backend} does not work here ({reason}): leave this out, the result is the same"
        raise UserError(Problem(message, key="torch_compile", value=True)) from error
