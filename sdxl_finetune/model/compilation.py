"""Compiles the U-Net's transformer blocks, which take most of a step's time. Results change only by rounding.

Each block is compiled in place, so that parameters keep their names. It is compiled by itself, so that gradient
checkpointing works around it. Image sizes are symbols (`dynamic`), because a dataset may have dozens of bucket shapes,
and each would be compiled again.

torch compiles one graph for each width, and further graphs for batches of one image and for evaluation. The text
encoders are not compiled: they are a twentieth of the arithmetic of a step at 1024 pixels.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.model.sdxl import SDXL

GRAPHS = 64
"""Graphs that torch may compile before it runs blocks uncompiled. Its own limit of 8 is just enough for the graphs
above."""


def check_compiler(backend: str, device: torch.device) -> None:
    """Compiles and differentiates one line of arithmetic.

    Raises UserError if that fails: a compiler is missing, the GPU is too old, or torch has no such backend.
    """
    with compiler_failures(backend, every=True):
        value = torch.ones(4, 4, device=device, requires_grad=True)
        torch.compile(_one_line, backend=backend, dynamic=True)(value).backward()


def _one_line(value: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(value @ value).sum()


def compile_blocks(model: SDXL, backend: str) -> None:
    """Marks each block to be compiled at its first use."""
    import torch._dynamo  # takes seconds to import, and only a run that compiles needs it

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    torch._dynamo.config.optimize_ddp = False  # it splits graphs at DDP's buckets; blocks are short enough without
    model.unet.compile_repeated_blocks(dynamic=True, backend=backend)


@contextmanager
def compiler_failures(backend: str, *, every: bool = False) -> Iterator[None]:
    """Turns exceptions of torch's compiler, or `every` exception, into a UserError of one line."""
    import torch._dynamo.exc

    kind: type[Exception] = Exception if every else torch._dynamo.exc.TorchDynamoException
    try:
        yield
    except kind as error:
        cause = getattr(error, "inner_exception", error)
        reason = ": ".join([type(cause).__name__, *str(cause).strip().splitlines()[:1]])
        message = f"the backend {backend} does not work here ({reason}): remove torch_compile, the result is the same"
        raise UserError(Problem(message, key="torch_compile", value=True)) from error
