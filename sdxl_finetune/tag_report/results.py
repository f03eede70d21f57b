"""From losses to the tables of a report: gain, accuracy, their standard errors, and the state of each tag.

For an image i with a tag, L(c, t) is the loss with caption c at timestep t, always with the same noise:

    gain_i     = mean over t of 1 - L(with the tag, t) / L(without it, t)
    accuracy_i = share of the timesteps at which L(with the tag, t) is below L(with another tag in its place, t), for
                 each of the K other tags (K = 0: 1)

The figures of a tag are means over its images. The mean of ratios weighs all timesteps alike. A ratio at one timestep
is the same for noise prediction and v-prediction, because both losses differ by a factor that depends on the timestep
alone. The tag with the lowest loss is the answer of a diffusion classifier (Li et al., arXiv 2303.16203). Li et al. sum
the losses of all timesteps before they compare. Here each timestep is one trial. The sum is right for nearly all images
as soon as a tag is half learned, and then no longer tells tags apart (docs/proof.md).
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float64

from sdxl_finetune.config.tag_options import TagReportOptions
from sdxl_finetune.data.index import Index
from sdxl_finetune.errors import UserError
from sdxl_finetune.tag_report.choice import Choice, image_name
from sdxl_finetune.tag_report.finished import Losses
from sdxl_finetune.tag_report.schema import CHANGES, IMAGES, TAGS, Facts, Report, load_report, report_paths
from sdxl_finetune.tag_report.states import Figures, find_states


@dataclass(frozen=True)
class Measured:
    """A tag on an image."""

    tag: int
    row: int
    gain: float
    accuracy: float
    rank: int
    """Other tags whose loss is lower, over all timesteps together."""


def measure_pairs(choice: Choice, losses: Mapping[int, Losses]) -> list[Measured]:
    """The figures of each pair whose image could be read, in float64."""
    measured = []
    for pair in choice.pairs:
        if pair.unit in losses:
            of_unit: Float64[np.ndarray, "timesteps captions"] = losses[pair.unit].astype(np.float64)
            relative = of_unit / of_unit[:, [pair.without]]
            right, others = relative[:, pair.whole], relative[:, list(pair.others)]
            wins = (right[:, None] < others).all(axis=1)
            rank = int((others.mean(axis=0) < right.mean()).sum())
            row = choice.units[pair.unit].row
            measured.append(Measured(pair.tag, row, float(1 - right.mean()), float(wins.mean()), rank))
    return measured


def build_report(
    choice: Choice,
    losses: Mapping[int, Losses],
    index: Index,
    options: TagReportOptions,
    facts: Facts,
    epochs: float | None,
) -> Report:
    """The report on one model. `epochs` is how many epochs it was trained for, None if that is not known.

    The facts get the options of the measurement and the bounds of the states. Tags of which no image could be read are
    left out.
    """
    measured = measure_pairs(choice, losses)
    by_tag: dict[int, list[Measured]] = {}
    for one in measured:
        by_tag.setdefault(one.tag, []).append(one)
    tags = [_row(choice, tag, own, index, epochs) for tag, own in sorted(by_tag.items())]
    figures = [Figures.of_row(row) for row in tags]
    for row, state in zip(tags, find_states(figures, options), strict=True):
        row["state"] = state
    images = [
        {
            "tag": choice.listed.names[one.tag],
            "image": image_name(index, one.row),
            "held_out": bool(index.held_out[one.row]),
            "gain": one.gain,
            "rank": one.rank,
            "exposures": None if epochs is None else round(int(index.repeats[one.row]) * epochs),
        }
        for one in measured
    ]
    return Report(facts, pa.Table.from_pylist(tags, TAGS), pa.Table.from_pylist(images, IMAGES))


def _row(choice: Choice, tag: int, own: Sequence[Measured], index: Index, epochs: float | None) -> dict[str, Any]:
    gains, count, listed = np.array([one.gain for one in own]), len(own), choice.listed
    shares = np.array([one.accuracy for one in own])
    return {
        "tag": listed.names[tag],
        "images": count,
        "held_out": int(sum(index.held_out[one.row] for one in own)),
        "exposures": None if epochs is None else round(int(listed.per_epoch[tag]) * epochs),
        "repeats": float(listed.per_epoch[tag] / listed.own_repeats[tag]) if listed.own_repeats[tag] else None,
        "gain": float(gains.mean()),
        "gain_error": float(gains.std(ddof=1) / np.sqrt(count)) if count > 1 else None,
        "accuracy": float(shares.mean()),
        "accuracy_error": share_error(shares) if count > 1 else None,
        "chance": 1 / (choice.others_of(tag) + 1),
        **dict.fromkeys(CHANGES),
    }


def share_error(shares: Float64[np.ndarray, " images"]) -> float:
    """Standard error of the mean of the images' shares.

    Two images that are right at all timesteps and two that never are right are added, as Agresti and Coull (1998) do
    for proportions. Without them eight images that are all right would have no error.
    """
    padded = np.concatenate([shares, [0, 0, 1, 1]])
    return float(padded.std(ddof=1) / np.sqrt(len(padded)))


def with_changes(report: Report, base: Report | None, last: Report | None) -> Report:
    """The report with the changes since the base and since the last report; None: nothing to compare with.

    A tag that the earlier report lacks has no change. The caller checks that the reports measured the same.
    """
    tags = report.tags
    for when, earlier in (("base", base), ("last", last)):
        for figure in ("gain", "accuracy"):
            before = _by_tag(earlier, figure) if earlier else {}
            changes = [now - before[tag] if tag in before else None for tag, now in _by_tag(report, figure).items()]
            name = f"{figure}_since_{when}"
            column = pa.array(changes, pa.float32())
            tags = tags.set_column(tags.column_names.index(name), TAGS.field(name), column)
    return Report(report.facts, tags, report.images)


def _by_tag(report: Report, figure: str) -> dict[str, float]:
    return dict(zip(report.tags["tag"].to_pylist(), report.tags[figure].to_pylist(), strict=True))


def earlier_reports(folder: Path, facts: Facts) -> tuple[Report | None, Report | None]:
    """The first and the last report in a folder with fewer steps that measured the same; None if there is none."""
    found = []
    for path in report_paths(folder):
        with suppress(UserError):
            report = load_report(path)
            step, is_same = report.facts.step, report.facts.options == facts.options
            if step is not None and facts.step is not None and step < facts.step and is_same:
                found.append(report)
    found.sort(key=lambda report: report.facts.step or 0)
    return (found[0], found[-1]) if found else (None, None)
