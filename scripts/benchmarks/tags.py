"""Shows that tag reports find the tags that are not learned, and that underfitted.toml helps those tags.

    python -m scripts.benchmarks.tags [--seeds 9 10 11] [--folder build/tags] [--write]

For each seed the small model learns ten style tags (scripts/toy/palettes.py), and a tag report measures them. Pictures
are drawn with each tag, and plain code reads the styles off them. Then training goes on with the suggested repeats,
and all is measured again. Finished parts are kept in the folder. `--write` puts the tables into docs/proof.md.
`--timesteps` prints instead how well the report agrees with the pictures at each timestep: the table of docs/tags.md.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from scripts.benchmarks.proof_runs import CONFIG, ROOT, train
from scripts.toy.judge import draw_texts
from scripts.toy.palettes import SPOILT, captions_to_draw, palettes, styled_caption, write_styles
from sdxl_finetune.files import atomic_path
from sdxl_finetune.tag_report.schema import load_report, report_paths

PAGE = ROOT / "docs" / "proof.md"
BEGIN, END = "<!-- tag table -->", "<!-- end of tag table -->"
PICTURES, GUIDANCE = 64, 2.0
"""Pictures that are drawn with each tag, and their guidance scale."""
HELD_OUT = ["--validation_split", "0.1", "--validate_every_n_steps", "0"]
REPORT = ["--tags", "style_*", "--images", "32", "--others", "4", "--draw", "0"]
TIMESTEPS = ["500", "600", "700", "800", "850", "900", "950", "975", "999", "800,850,900,950", "900,950,975,999"]
"""Timesteps of the reports that `--timesteps` compares."""
FIRST = ["--max_train_epochs", "5"]
THEN = ["--max_train_epochs", "3"]
FIGURES = ("exposures", "gain", "gain_error", "accuracy", "accuracy_error", "state")


@dataclass(frozen=True)
class Row:
    """A tag before and after training on with the suggested repeats."""

    style: str
    exposures: int | None
    gain: float
    gain_error: float
    accuracy: float
    accuracy_error: float
    state: str
    drawn: float
    """Share of the drawn pictures that show the style."""
    then_gain: float | None = None
    then_accuracy: float | None = None
    then_state: str | None = None
    then_drawn: float | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[9, 10, 11])
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "tags")
    parser.add_argument("--first", action="store_true", help="only train and measure, without the suggested repeats")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/proof.md")
    parser.add_argument("--timesteps", action="store_true", help="print the agreement at each timestep")
    arguments = parser.parse_args()
    if arguments.timesteps:
        print(timestep_table([arguments.folder.resolve() / str(seed) for seed in arguments.seeds]))
        return
    then = () if arguments.first else THEN
    results = {seed: measure(arguments.folder.resolve() / str(seed), seed, then=then) for seed in arguments.seeds}
    text = "\n\n".join(
        [table(results), mean_correlations(results), *(seed_table(seed, rows) for seed, rows in results.items())]
    )
    print(text)
    if arguments.write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def measure(
    folder: Path, seed: int, first: Sequence[str] = FIRST, then: Sequence[str] = THEN, share: float = 1.0
) -> list[Row]:
    """Trains, measures, trains on and measures again; without `then` only the first half.

    `share` makes the data smaller.
    """
    kept = folder / "rows.json"
    if kept.exists():
        return [Row(**row) for row in json.loads(kept.read_text())]
    if not (folder / "pictures").exists():  # new files would be other images for an interrupted measurement
        with atomic_path(folder / "pictures") as pictures:
            write_styles(pictures, seed, share)
    asked = [*HELD_OUT, "--seed", str(seed), "--save_precision", "float"]
    model = train(folder, "first", *asked, *first, data="pictures")
    report = report_on(folder, model)
    repeats = report.with_name(report.name.replace(".parquet", ".underfitted.toml"))
    weights = ["--image_weights", str(repeats)] if repeats.exists() else []
    before, drawn = by_tag(report), shares(model, seed)
    after, then_drawn = {}, {}
    if then:
        later = train(folder, "then", *asked, *then, *weights, model=model, data="pictures")
        after, then_drawn = by_tag(report_on(folder, later, *weights)), shares(later, seed)
    rows = [
        Row(style=style, drawn=drawn[style], **{name: before[style][name] for name in FIGURES})
        for style in palettes(seed)
    ]
    if then:
        rows = [
            replace(
                row,
                then_gain=after[row.style]["gain"],
                then_accuracy=after[row.style]["accuracy"],
                then_state=after[row.style]["state"],
                then_drawn=then_drawn[row.style],
            )
            for row in rows
        ]
        kept.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return rows


def timestep_table(folders: Sequence[Path]) -> str:
    """The rank correlations of gain and accuracy with the drawn pictures, if the report measures at these timesteps."""
    lines = ["| timesteps | rank correlation of gain | of accuracy |", "|---|--:|--:|"]
    for timesteps in TIMESTEPS:
        rows = []
        for folder in folders:
            model = folder / "first" / "model.safetensors"
            options = ["--images", "16", "--timesteps", timesteps]
            figures = by_tag(report_on(folder, model, *options, name=f"at-{timesteps}"))
            drawn = shares(model, int(folder.name))
            rows += [[figures[style]["gain"], figures[style]["accuracy"], drawn[style]] for style in drawn]
        gains, accuracies, shown_in = zip(*rows, strict=True)
        agreements = [spearmanr(values, shown_in)[0] for values in (gains, accuracies)]
        lines.append(f"| {timesteps} | {agreements[0]:.2f} | {agreements[1]:.2f} |")
    return "\n".join(lines)


def report_on(folder: Path, model: Path, *options: str, name: str = "tags") -> Path:
    """Measures a model with sdxl-model tags, and returns its tag report. A report that exists is not made again.

    `options` win over REPORT. `name` is that of the folder of the report.
    """
    reports = model.parent / name
    if not (found := report_paths(reports)):
        data = ["--config", str(CONFIG), "--train_data_dir", str(folder / "pictures"), "--logging_dir", str(reports)]
        data += ["--output_dir", str(model.parent), "--output", str(reports), *HELD_OUT]
        main = "from sdxl_finetune.cli import model; model()"
        with (model.parent / f"{name}.log").open("w") as log:
            command = [sys.executable, "-c", main, "tags", str(model), *data, *REPORT, *options]
            subprocess.run(command, check=True, cwd=ROOT, stdout=log, stderr=log)
        found = report_paths(reports)
    return found[-1]


def by_tag(report: Path) -> dict[str, dict]:
    """The rows of a tags table by style."""
    return {row["tag"].removeprefix("style_"): row for row in load_report(report).tags.to_pylist()}


def shares(model: Path, seed: int) -> dict[str, float]:
    """The share of pictures drawn with each tag that show its palette.

    The result is kept beside the model.
    """
    kept = model.with_name("drawn.json")
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    scenes = captions_to_draw(PICTURES)
    own = palettes(seed)
    texts = [styled_caption(scene, style) for style in own for scene in scenes]
    pictures = draw_texts(model, texts, scale=GUIDANCE)
    found = np.array([own[style].is_shown(pictures[place * PICTURES + number]) for place, style in enumerate(own)
                      for number in range(PICTURES)])  # fmt: skip
    drawn = dict(zip(own, found.reshape(len(own), PICTURES).mean(axis=1).tolist(), strict=True))
    kept.write_text(json.dumps(drawn))
    return drawn


def correlations(rows: Sequence[Row]) -> tuple[float, float]:
    """Spearman's rank correlation of gain and of accuracy with the share of drawn pictures in the style."""
    drawn = [row.drawn for row in rows]
    gain, accuracy = (spearmanr([getattr(row, name) for row in rows], drawn)[0] for name in ("gain", "accuracy"))
    return float(gain), float(accuracy)


def mean_correlations(results: Mapping[int, Sequence[Row]]) -> str:
    """A sentence with the rank correlations of each tag's means over the seeds, which draw the palettes anew."""
    shown_in, gains, accuracies = (
        np.mean([[getattr(row, name) for row in rows] for rows in results.values()], axis=0)
        for name in ("drawn", "gain", "accuracy")
    )
    gain, accuracy = (spearmanr(values, shown_in)[0] for values in (gains, accuracies))
    return f"Rank correlations of each tag's means over the seeds: gain {gain:.2f}, accuracy {accuracy:.2f}."


def table(results: Mapping[int, Sequence[Row]]) -> str:
    """The table of the figures of each seed."""
    lines = [
        "| seed | rank correlation of gain | of accuracy | underfitted, of these drawn in less than half | spoilt tags"
        " | underfitted ones drawn, before and after | other clean ones |",
        "|---|---|---|---|---|---|---|",
    ]
    everything = [row for rows in results.values() for row in rows]
    named = {**{str(seed): rows for seed, rows in results.items()}, "all": everything}
    for seed, rows in named.items():
        gain, accuracy = correlations(rows)
        clean = [row for row in rows if row.style not in SPOILT]
        weak = [row for row in clean if row.drawn < 0.5]
        found = [row for row in clean if row.state == "underfitted"]
        rest = [row for row in clean if row not in found]
        spoilt = ", ".join(f"{row.style} {row.state}" for row in rows if row.style in SPOILT)
        if rows is everything:
            count = sum(row.state == "contradictory" for row in rows if row.style in SPOILT)
            wrong = sum(row.state == "contradictory" for row in clean)
            spoilt = f"{count} of {len(SPOILT) * len(results)} contradictory, and {wrong} of {len(clean)} clean ones"
        hits = sum(row in weak for row in found)
        lines.append(
            f"| {seed} | {gain:.2f} | {accuracy:.2f} | {len(found)} found, {hits} of the {len(weak)} | {spoilt}"
            f" | {mean(found)} | {mean(rest)} |"
        )
    return "\n".join(lines)


def mean(rows: Sequence[Row]) -> str:
    """The mean share of drawn pictures in the style, before and after training on."""
    if not rows:
        return "none"
    shown = [[row.drawn for row in rows], [row.then_drawn for row in rows]]
    return ", ".join("–" if None in each else f"{np.mean(each):.0%}" for each in shown)  # type: ignore[arg-type]


def seed_table(seed: int, rows: Sequence[Row]) -> str:
    """The table of the tags of one seed."""
    lines = [
        f"Seed {seed}:\n",
        "| tag | exposures | gain | accuracy | state | drawn | then: gain | accuracy | state | drawn |",
        "|---|--:|--:|--:|---|--:|--:|--:|---|--:|",
    ]
    lines += [
        f"| {row.style} | {row.exposures} | {row.gain:.2f} ± {row.gain_error:.2f} | {row.accuracy:.2f} ±"
        f" {row.accuracy_error:.2f} | {row.state} | {row.drawn:.0%} | {shown(row.then_gain, '.2f')} |"
        f" {shown(row.then_accuracy, '.2f')} | {row.then_state or '–'} | {shown(row.then_drawn, '.0%')} |"
        for row in rows
    ]
    return "\n".join(lines)


def shown(value: float | None, form: str) -> str:
    """A number in this form, or a dash."""
    return "–" if value is None else format(value, form)


if __name__ == "__main__":
    main()
