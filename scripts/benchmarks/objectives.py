"""Converts the small model that draws to velocity and to a flow, and shows what happens on the way.

    python -m scripts.benchmarks.objectives [--seeds 0 1 2] [--folder build/objectives] [--write]

The small model (tests/toy) predicts noise. It is converted with the recipes of configs/, and trained on as it is for as
many steps. Checkpoints on the way draw held-out captions, and plain code reads the pictures. Finished parts are kept in
the folder. `--write` puts tables and contact sheets into docs/. The contrasts of flow options are lines of
scripts/benchmarks/proof.py, and share the runs of this folder.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from scripts.benchmarks.conversions import ARMS, Drawn, Plan, Result, draw_with, measure_all, workers
from scripts.benchmarks.proof_reads import Mean
from scripts.benchmarks.proof_runs import ROOT, TOY
from scripts.toy.judge import held_out_scenes
from scripts.toy.world import caption
from sdxl_finetune.diffusion.objective import Objective, build_objective
from sdxl_finetune.output.colours import NAMES
from sdxl_finetune.output.contact_sheet import stack

DOCS = ROOT / "docs"
CONVERSIONS = ("noise", "velocity", "flow")
"""Arms of conversions.py that this page is about. The first is the control."""
SLACK = 0.08
"""Share of captions that may be wrong in addition to those that the model got wrong before: two standard errors of 100
pictures."""
WRONG: Mapping[str, Mapping[str, Objective]] = {
    "velocity": {
        "drawn as a model of noise": build_objective("noise"),
        "drawn without zero terminal SNR": build_objective("velocity"),
    },
    "flow": {
        "drawn as a model of noise": build_objective("noise"),
        "drawn as a model of velocity": build_objective("velocity", zero_terminal_snr=True),
    },
}
"""Wrong settings in an interface, by the kind of the model."""
Results = Mapping[str, Sequence[Result]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "objectives")
    parser.add_argument("--write", action="store_true", help="write tables and pictures into docs/")
    arguments = parser.parse_args()
    plan, folder = Plan(), arguments.folder.resolve()
    measured = measure_all(folder, [(arm, seed) for seed in arguments.seeds for arm in CONVERSIONS], plan)
    results = {arm: [measured[arm, seed] for seed in arguments.seeds] for arm in CONVERSIONS}
    others = draw_others(folder, arguments.seeds[0], plan)
    parts = tables(results, others, plan)
    print("\n\n".join(parts.values()))
    for kind in CONVERSIONS[1:]:
        page = contact_sheet(kind, results[kind][0], others, plan)
        page.save(folder / f"objectives-{kind}.png")
        if arguments.write:
            page.save(DOCS / f"objectives-{kind}.png", optimize=True)
    if arguments.write:
        text = (DOCS / "objectives.md").read_text(encoding="utf-8")
        (DOCS / "objectives.md").write_text(with_parts(text, parts), encoding="utf-8")


def draw_others(folder: Path, seed: int, plan: Plan) -> dict[str, Drawn]:
    """Draws with the model before its conversion, as one of each objective, and with converted ones in wrong ways."""
    jobs = {f"before as {kind}": (TOY, ARMS[kind].objective) for kind in CONVERSIONS}
    for kind, ways in WRONG.items():
        converted = folder / f"{kind}-{seed}" / "model.safetensors"
        jobs |= {f"{kind} {way}": (converted, objective) for way, objective in ways.items()}
    with workers() as pool:
        futures = {
            name: pool.submit(draw_with, model, folder / f"{name.replace(' ', '-')}.json", objective, plan)
            for name, (model, objective) in jobs.items()
        }
        return {name: future.result() for name, future in futures.items()}


def tables(results: Results, others: Mapping[str, Drawn], plan: Plan) -> dict[str, str]:
    """The tables of docs/objectives.md by the names of their places on the page."""
    return {
        "captions": captions_table(results, others, plan),
        "equal steps": equal_steps(results, plan),
        "colours": colours_table(results, others, plan),
        "losses": losses_table(results),
        "wrong settings": wrong_table(others),
    }


def captions_table(results: Results, others: Mapping[str, Drawn], plan: Plan) -> str:
    """The share of captions whose objects are right, by step, and the steps that this takes."""
    before = others[f"before as {CONVERSIONS[0]}"].right.pair
    lines = [heading("objective", ["before", *map(str, plan.judged), "steps until captions are followed as before"])]
    for kind, runs in results.items():
        cells = [f"{others[f'before as {kind}'].right.pair:.0%}"]
        cells += [percent([run.drawn[step].right.pair for run in runs]) for step in plan.judged]
        needed = "–" if kind == CONVERSIONS[0] else steps_needed(runs, before, plan)
        lines.append(row(kind, [*cells, needed]))
    return "\n".join(lines)


def steps_needed(runs: Sequence[Result], before: float, plan: Plan) -> str:
    """The first judged step from which on captions are followed as before, less SLACK, by seed, and their mean."""
    steps = []
    for run in runs:
        short = [step for step in plan.judged if run.drawn[step].right.pair < before - SLACK]
        later = [step for step in plan.judged if not short or step > short[-1]]
        if not later:
            return f"not within {plan.steps}"
        steps.append(later[0])
    listed = ", ".join(map(str, steps))
    return listed if len(steps) < 2 else f"{listed}: {number(steps, '.0f')}"


def equal_steps(results: Results, plan: Plan) -> str:
    """Compares each conversion with the control after the last step, seed by seed."""
    control = [run.drawn[plan.steps].right for run in results[CONVERSIONS[0]]]
    lines = [heading("after " + str(plan.steps) + " steps", ["objects", "colour", "shape", "background"])]
    for kind, runs in results.items():
        scores = [run.drawn[plan.steps].right for run in runs]
        lines.append(
            row(kind, [percent([getattr(s, name) for s in scores]) for name in ("pair", "colour", "shape", "ground")])
        )
    for kind in CONVERSIONS[1:]:
        scores = [run.drawn[plan.steps].right for run in results[kind]]
        cells = [
            percent([getattr(a, name) - getattr(b, name) for a, b in zip(scores, control, strict=True)])
            for name in ("pair", "colour", "shape", "ground")
        ]
        lines.append(row(f"{kind} less {CONVERSIONS[0]}", cells))
    return "\n".join(lines)


def colours_table(results: Results, others: Mapping[str, Drawn], plan: Plan) -> str:
    """The drift of mean, contrast and saturation by step."""
    lines = [heading("objective", ["drift of", "before", *map(str, plan.judged)])]
    for kind, runs in results.items():
        for name in NAMES:
            cells = [f"{others[f'before as {kind}'].colours[name]:+.3f}"]
            cells += [f"{np.mean([run.drawn[step].colours[name] for run in runs]):+.3f}" for step in plan.judged]
            lines.append(row(kind, [name, *cells]))
    return "\n".join(lines)


def losses_table(results: Results) -> str:
    """The losses of held-out images by timestep, before, on the way and after."""
    timesteps = [name.removeprefix("loss/t") for name in results["flow"][0].losses[0] if name.startswith("loss/t")]
    lines = [heading("objective", ["step", *(f"t = {int(timestep)}" for timestep in timesteps)])]
    for kind, runs in results.items():
        for step in runs[0].losses:
            means = [np.mean([run.losses[step][f"loss/t{timestep}"] for run in runs]) for timestep in timesteps]
            lines.append(row(kind, [str(step), *(f"{mean:.3f}" for mean in means)]))
    return "\n".join(lines)


def wrong_table(others: Mapping[str, Drawn]) -> str:
    """Captions and colours of pictures that were drawn with wrong settings."""
    lines = [heading("model", ["how", "objects right", "mean", "contrast", "saturation"])]
    for kind, ways in WRONG.items():
        for way in ways:
            drawn = others[f"{kind} {way}"]
            lines.append(
                row(kind, [way, f"{drawn.right.pair:.0%}", *(f"{drawn.colours[name]:+.3f}" for name in NAMES)])
            )
    return "\n".join(lines)


def heading(first: str, others: Sequence[str]) -> str:
    return f"{row(first, others)}\n|---|{'--:|' * len(others)}"


def row(first: str, cells: Sequence[str]) -> str:
    return f"| {first} | {' | '.join(cells)} |"


def percent(values: Sequence[float]) -> str:
    """The mean of shares in percent, with its standard error if there are several."""
    return f"{values[0]:.0%}" if len(values) < 2 else number([100 * value for value in values], ".0f", " %")


def number(values: Sequence[float], form: str, unit: str = "") -> str:
    mean = Mean.of(values)
    return f"{format(mean.value, form)}{unit} ± {format(mean.error, form)}"


def contact_sheet(kind: str, run: Result, others: Mapping[str, Drawn], plan: Plan) -> Image.Image:
    """Puts the first pictures of every other judged step below each other, and those of wrong settings at the end."""
    shown = dict.fromkeys([*plan.judged[::2], plan.steps])
    rows = [
        ("before, drawn as what it is, a model of noise", others[f"before as {CONVERSIONS[0]}"]),
        (f"step 0, drawn as {'a flow' if kind == 'flow' else f'a model of {kind}'}", others[f"before as {kind}"]),
        *((f"step {step}", run.drawn[step]) for step in shown),
        *((f"step {plan.steps}, {way}", others[f"{kind} {way}"]) for way in WRONG[kind]),
    ]
    texts = [caption(scene) for scene in held_out_scenes(plan.shown)]
    legend = "\n".join(f"{number}. {text}" for number, text in enumerate(texts, 1))
    return stack([(label, enlarged(drawn.row)) for label, drawn in rows], legend)


def enlarged(path: str, times: int = 2) -> Image.Image:
    """Opens a picture and enlarges it, so that single pixels can be seen."""
    with Image.open(path) as image:
        return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def with_parts(text: str, parts: Mapping[str, str]) -> str:
    """Replaces the tables of a page, each of which stands between two comments with its name."""
    for name, part in parts.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, found, rest = text.partition(begin)
        assert found and end in rest, f"the page has no place for {name}"
        text = f"{before}{begin}\n{part}\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    main()
