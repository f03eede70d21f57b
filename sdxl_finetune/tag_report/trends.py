"""Figures of all tags together, over the reports of a folder."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdxl_finetune.errors import UserError
from sdxl_finetune.tag_report.schema import STATES, Report, load_report, report_name, report_paths
from sdxl_finetune.tag_report.tables import TagRow, tag_rows, worst_tenth

logger = logging.getLogger(__name__)

MOST_REPORTS = 40
"""Reports that trends show, evenly chosen among all: more would not be told apart in a chart."""


@dataclass(frozen=True)
class Moment:
    """The figures of one report."""

    name: str
    """Name of the report's files."""
    step: int
    """Optimizer steps of the model; 0 if the model does not say them."""
    rows: Mapping[str, TagRow]
    """By tag."""

    @property
    def overall(self) -> Mapping[str, float]:
        """The figures of all tags together, by name."""
        return overall(list(self.rows.values()))


def overall(rows: Sequence[TagRow]) -> dict[str, float]:
    """Median and worst tenth of gain and accuracy, and the number of tags in each state, by name.

    A list without tags gives only the numbers.
    """
    figures: dict[str, float] = {}
    for name in ("gain", "accuracy") if rows else ():
        values = [getattr(row, name) for row in rows]
        figures |= {f"{name}/median": float(np.median(values)), f"{name}/worst_tenth": worst_tenth(values)}
    return figures | {f"states/{state}": sum(row.state == state for row in rows) for state in STATES}


def read_moments(folder: Path, report: Report) -> list[Moment]:
    """The reports of a folder up to `report` by steps, oldest first and `report` last.

    Left out are reports with other options of the measurement, because their figures do not compare, and reports of
    models that do not say their step. A file that is no report is named in a warning.
    """
    if report.facts.step is None:
        return [_moment(report)]
    earlier = []
    for path in report_paths(folder):
        try:
            found = load_report(path)
        except UserError as error:
            logger.warning("the trends leave out a file: %s", error)
            continue
        step, options = found.facts.step, found.facts.options
        if step is not None and step < report.facts.step and options == report.facts.options:
            earlier.append(found)
    earlier.sort(key=lambda one: one.facts.step or 0)
    if len(earlier) >= MOST_REPORTS:
        places = np.linspace(0, len(earlier) - 1, MOST_REPORTS - 1).round().astype(int)
        earlier = [earlier[place] for place in places]
    return [_moment(one) for one in (*earlier, report)]


def _moment(report: Report) -> Moment:
    rows = {row.tag: row for row in tag_rows(report.tags)}
    return Moment(report_name(report.facts), report.facts.step or 0, rows)
