"""The lines of sdxl-check on parameters that are frozen or trained by name."""

from collections.abc import Iterable, Iterator

from torch.nn import Parameter

from sdxl_finetune.config import Config
from sdxl_finetune.errors import counted
from sdxl_finetune.files import size_text
from sdxl_finetune.optim.ema import uses_ema
from sdxl_finetune.optim.freezing import find_selections
from sdxl_finetune.optim.parameters import all_groups
from sdxl_finetune.runtime.processes import weight_dtype
from sdxl_finetune.training.checks import Outline


def selection_lines(config: Config, model: Outline) -> Iterator[str]:
    """Yields a line for each block number and each pattern, with its share of the parameters of each part."""
    selections = find_selections(config, model.parts)
    totals = {part: _size(named.values()) for part, named in model.parts.items()}
    for each in (*selections.frozen, *selections.trained):
        sizes = {part: _size(named.values()) for part, named in each.parts.items()}
        counts = {part: counted(len(named), "tensor") for part, named in each.parts.items()}
        shares = [
            f"{size:,} parameters in {counts[part]}, {size / totals[part]:.1%} of {part}"
            for part, size in sizes.items()
        ]
        yield f"{each.option} {each.text}: {', '.join(shares)}"


def saving_lines(config: Config, model: Outline, state_bytes: float) -> Iterator[str]:
    """Yields a line on the memory that freezing by name saves, given the bytes of optimizer states for each element.

    It counts what is kept for a trained parameter in each process. Activations are left out.
    """
    selections = find_selections(config, model.parts)
    if not selections:
        return
    rated = [group for group in all_groups(config, model.parts) if group.lr]
    frozen = sum(
        _size(one for name, one in group.parameters.items() if selections.freeze(group.part, name)) for group in rated
    )
    saved = {"optimizer states": state_bytes * frozen}
    if not config.is_fused:
        saved["gradients"] = frozen * weight_dtype(config).itemsize
    if config.keeps_masters:
        saved["master weights"] = 2 * frozen
    if uses_ema(config) and not config.ema_on_cpu:
        saved["the EMA"] = 4 * frozen
    share = frozen / sum(group.size for group in rated) if rated else 0
    sizes = ", ".join(f"{size_text(size)} of {what}" for what, size in saved.items() if size)
    yield f"{frozen / 1e6:.1f} million parameters that have a rate are frozen by name ({share:.1%}). Saved: {sizes}"


def _size(parameters: Iterable[Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
