"""Writes what is made from a tag report: CSV file, suggested repeats and page, beside the report's own tables.

The page comes last, because pictures for it may take minutes. Without the libraries of the page the rest is written.
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from sdxl_finetune.pages.rendering import missing_libraries, write_page
from sdxl_finetune.tag_report import underfitted
from sdxl_finetune.tag_report.gallery import Exhibit
from sdxl_finetune.tag_report.schema import Report, report_name
from sdxl_finetune.tag_report.tables import tag_rows, write_csv
from sdxl_finetune.tag_report.trends import read_moments

logger = logging.getLogger(__name__)

CSV_ENDING, PAGE_ENDING = ".csv", ".html"


def write_files(folder: Path, report: Report, in_use: Iterable[Path | None] = ()) -> list[Path]:
    """Writes the CSV file, and the file of suggested repeats if there are some. Returns their paths. Raises OSError.

    A file of repeats among `in_use`, which the config names as `image_weights`, stays as it is. A resumed run
    would otherwise find other repeats.
    """
    name = report_name(report.facts)
    table, repeats = folder / f"{name}{CSV_ENDING}", folder / f"{name}{underfitted.ENDING}"
    write_csv(table, report.tags)
    if any(path is not None and path.resolve() == repeats.resolve() for path in in_use):
        message = "image_weights = %s: the tag report would replace this file, so it leaves its repeats out. %s"
        logger.warning(message, repeats, "Copy the file to another folder, and name the copy")
        return [table]
    has_repeats = underfitted.write_underfitted(repeats, tag_rows(report.tags), report.facts)
    return [table, repeats] if has_repeats else [table]


def write_tag_page(folder: Path, report: Report, exhibits: Sequence[Exhibit] = ()) -> Path | None:
    """Writes the page, with the trends over the earlier reports in the folder. Raises OSError.

    Returns None, after a warning that says what to install, if a library of the page is missing.
    """
    if missing := missing_libraries():
        logger.warning("the page of the tag report %s", missing)
        return None
    from sdxl_finetune.tag_report.page import render_page

    name = report_name(report.facts)
    moments = read_moments(folder, report)
    repeats = underfitted.path_in_config(folder / f"{name}{underfitted.ENDING}")
    page = render_page(report.facts, tag_rows(report.tags), moments, exhibits, repeats)
    write_page(page, folder / f"{name}{PAGE_ENDING}")
    return folder / f"{name}{PAGE_ENDING}"
