"""Options for numbers that go wrong: NaN and infinite numbers, loss spikes, ranks whose weights differ."""

from typing import Annotated, Literal

from pydantic import Field

from sdxl_finetune.config.fields import FilePath, OnlyWith, Options


class NumbersOptions(Options):
    """Numbers that go wrong"""

    non_finite_steps: Literal["stop", "skip"] = "stop"
    """At a loss or gradient that is NaN or infinite: end the run, or leave the step out. Not in sd-scripts."""
    max_non_finite_steps: Annotated[int, OnlyWith("non_finite_steps", ("skip",))] = Field(5, ge=1)
    """Steps in a row that `non_finite_steps = "skip"` leaves out at most before the run ends. Not in sd-scripts."""
    loss_spike_factor: float = Field(10.0, ge=0)
    """Warn of a loss that is N times the running median for its timesteps. 0: never. Not in sd-scripts."""
    rank_check_every_n_steps: int = Field(100, ge=0)
    """Several processes: compare their weights every N steps, end if they differ. 0: never. Not in sd-scripts."""
    reproduce: FilePath | None = None
    """Folder in `dumps` of a run with NaN: run that step again. Exit status 3 if all is finite. Not in sd-scripts."""
