"""Scalars of a tag report for TensorBoard and other trackers."""

import re
from collections.abc import Sequence
from pathlib import Path

from sdxl_finetune.config import LoggingOptions
from sdxl_finetune.output.trackers import build_trackers
from sdxl_finetune.tag_report.tables import TagRow
from sdxl_finetune.tag_report.trends import overall

MOST_TAGS = 50
"""Tags up to which each tag has curves of its own. TensorBoard shows each curve as a chart."""
FOLDER = "tags"
"""Folder in `logging_dir` of the scalars that no training run writes."""


def tag_scalars(rows: Sequence[TagRow]) -> dict[str, float]:
    """The scalars by name, without the leading `tags/`.

    They are `gain/median`, `gain/worst_tenth`, `accuracy/...` and `states/learned`, ..., and for a list of at most
    MOST_TAGS also `gain_of/TAG` and `accuracy_of/TAG`.
    """
    figures = overall(rows)
    if len(rows) <= MOST_TAGS:
        for row, name in zip(rows, _names([row.tag for row in rows]), strict=True):
            figures |= {f"gain_of/{name}": row.gain, f"accuracy_of/{name}": row.accuracy}
    return figures


def log_scalars(options: LoggingOptions, rows: Sequence[TagRow], step: int) -> Path | None:
    """Shows the scalars of a report that no training run makes, in the trackers that the options choose.

    They go into the folder `tags` of `logging_dir`, so that reports on several checkpoints make one curve. Returns this
    folder, or None if the options choose no tracker. Raises UserError if a tracker cannot start.
    """
    directory = options.logging_dir / FOLDER if options.logging_dir else None
    trackers = build_trackers(options, directory, 0, {})
    for tracker in trackers:
        tracker.scalars({f"tags/{name}": value for name, value in tag_scalars(rows).items()}, step)
        tracker.close()
    return directory if trackers else None


def _names(tags: Sequence[str]) -> list[str]:
    """Names of tags that TensorBoard shows as they are. Tags whose names would be equal get numbers."""
    names: list[str] = []
    for tag in tags:
        name = re.sub(r"[^\w.\-]", "_", tag)
        same = sum(re.fullmatch(rf"{re.escape(name)}(~\d+)?", other) is not None for other in names)
        names.append(f"{name}~{same + 1}" if same else name)
    return names
