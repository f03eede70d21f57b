"""Guards of a run: its processes watch one another, and no other run saves under its `output_name`."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

from accelerate import Accelerator

from sdxl_finetune.config import Config
from sdxl_finetune.errors import Problem, Problems, UserError
from sdxl_finetune.output.checkpoints import final_name
from sdxl_finetune.runtime.locks import Lock, Locked
from sdxl_finetune.runtime.processes import on_first_rank
from sdxl_finetune.runtime.watch import watched


@contextmanager
def guarded(config: Config, accelerator: Accelerator, problems: Problems) -> Iterator[None]:
    """Within the context, both guards are on. Adds a problem if another run saves under the same names.

    A run with `reproduce` saves nothing. It may stand beside the run that wrote the dump.
    """
    names = nullcontext() if config.reproduce else _own_output(config, accelerator, problems)
    with watched(config, accelerator), names:
        yield


@contextmanager
def _own_output(config: Config, accelerator: Accelerator, problems: Problems) -> Iterator[None]:
    """Within the context, no other run saves under these names. Adds a problem if another run does so already.

    All processes call this together. The first one holds a lock in each folder into which the run saves.
    """
    locks = [Lock(folder / f".{final_name(config)}.lock") for folder in config.save_folders]

    def acquire(lock: Lock, option: str) -> None:
        try:
            lock.acquire()
        except Locked as other:
            message = f"{other} saves there under this output_name: end that run, or set another output_name"
            raise UserError(Problem(message, key=option, value=str(getattr(config, option)))) from None

    try:
        for lock, option in zip(locks, ("output_dir", "save_fallback_dir"), strict=False):
            problems.attempt(on_first_rank, accelerator, partial(acquire, lock, option))
        yield
    finally:
        for lock in locks:
            lock.release()
