"""Contrasts of flow options for scripts/benchmarks/proof.py. Their runs are arms of scripts/benchmarks/conversions.py.

Each contrast converts the small model to a flow with three seeds, with an option and without it. Held-out losses have
uniform timesteps, no weights and noise of their own, whatever the training had.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scripts.benchmarks.conversions import Plan, Result, measure_all, two_of
from scripts.benchmarks.proof_reads import Mean
from scripts.benchmarks.proof_runs import SEEDS, Row, average, increase

Losses = Sequence[dict[str, float]]
SETTLED = 100
"""First optimizer step of the mean of training losses. Before it, the model is still being converted."""


def flow_times(folder: Path, plan: Plan | None = None) -> Row:
    """Logit-normal timesteps trade errors at both ends for errors in the middle."""
    plan = plan or Plan()
    folder, other, base = measured(folder, "flow", "flow-uniform", plan)
    losses, base_losses = last_losses(other), last_losses(base)
    middle, ends = (increase(losses, base_losses, f"loss/t{timestep}") for timestep in ("450", "050"))
    return Row(
        f"a flow with logit-normal timesteps, and with uniform ones; {plan.steps} steps, three seeds",
        "the middle of the path is trained more and the ends less, so that errors fall in the middle against those at"
        " little noise",
        f"{compared(other, base, plan)}; held-out loss at timestep 450 {middle}, at 50 {ends}",
        ends.above(middle),
    )


def flow_pairing(folder: Path, plan: Plan | None = None) -> Row:
    """Pairs of near noise and latents straighten the paths, so that less of the target is chance."""
    plan = plan or Plan()
    folder, other, base = measured(folder, "flow-paired", "flow", plan)
    trained, base_trained = (training_losses(folder, name, plan) for name in ("flow-paired", "flow"))
    less = increase(trained, base_trained)
    return Row(
        f"a flow with noise paired to latents (flow_use_ot), and with unpaired noise; {plan.steps} steps, three seeds",
        "paired paths cross less, so that the training loss falls; held-out images have unpaired noise, so that theirs"
        " need not",
        f"training loss {less} against unpaired; {compared(other, base, plan)}",
        Mean(-less.value, less.error).is_significant,
    )


def flow_weights(folder: Path, plan: Plan | None = None) -> Row:
    """Learned weights divide by the loss of each timestep, so that timesteps with small losses count more."""
    plan = plan or Plan()
    folder, other, base = measured(folder, "flow-weighted", "flow", plan)
    losses, base_losses = last_losses(other), last_losses(base)
    small, large = (increase(losses, base_losses, f"loss/t{timestep}") for timestep in ("450", "050"))
    return Row(
        f"a flow with learned loss weights (edm2_loss_weighting), and with none; {plan.steps} steps, three seeds",
        "every timestep counts alike, so that errors where the loss is small fall against those where it is large",
        f"{compared(other, base, plan)}; held-out loss at timestep 450 {small}, at 50 {large}",
        large.above(small),
    )


def measured(folder: Path, name: str, base: str, plan: Plan) -> tuple[Path, list[Result], list[Result]]:
    """Returns the folder of the runs, which is shared with scripts/benchmarks/objectives.py, and both arms' results."""
    folder = folder.with_name("objectives")
    seeds = [int(seed) for seed in SEEDS]
    results = measure_all(folder, [(arm, seed) for seed in seeds for arm in (name, base)], plan)
    return folder, [results[name, seed] for seed in seeds], [results[base, seed] for seed in seeds]


def last_losses(results: Sequence[Result]) -> Losses:
    """The losses of held-out images after the last step."""
    return [result.losses[max(result.losses)] for result in results]


def training_losses(folder: Path, name: str, plan: Plan) -> Losses:
    """The mean training loss of each seed's run, from the step SETTLED on."""
    means = []
    for seed in SEEDS:
        (log,) = (folder / f"{name}-{seed}" / "logs").glob("*/metrics.jsonl")
        rows = map(json.loads, log.read_text().splitlines())
        late = [row["loss"] for row in rows if "loss" in row and row["step"] >= min(SETTLED, plan.steps)]
        means.append({"loss": float(np.mean(late))})
    return means


def compared(results: Sequence[Result], base: Sequence[Result], plan: Plan) -> str:
    """Compares held-out losses, and the shares of pictures with the right objects at an early and at the last step."""
    losses, base_losses = last_losses(results), last_losses(base)
    steps = two_of(plan.judged)
    right, base_right = (
        ", ".join(f"{Mean.of([result.drawn[step].right.pair for result in group])}" for step in steps)
        for group in (results, base)
    )
    at = " and ".join(map(str, steps))
    return (
        f"held-out loss {average(losses):.4f} against {average(base_losses):.4f}, a difference of"
        f" {increase(losses, base_losses)}; right objects after {at} steps: {right} against {base_right}"
    )
