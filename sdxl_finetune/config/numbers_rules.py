"""The rule over several options for numbers that go wrong."""

from collections.abc import Iterator

from sdxl_finetune.config.options import Config


def numbers_problems(config: Config) -> Iterator[tuple[str, str]]:
    """Yields options for steps that are not finite and cannot be used together."""
    if config.non_finite_steps == "skip" and config.is_fused:
        fused = "fused_backward_pass" if config.fused_backward_pass else "fused_optimizer_groups"
        message = f"cannot leave out a step with {fused}, which changes weights before all gradients are known"
        yield f"non_finite_steps {fused}", f'{message}: remove {fused}, or use "stop"'
