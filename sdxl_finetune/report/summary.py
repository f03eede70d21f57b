"""The summary of a report in plain words: what to look at first."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from sdxl_finetune.pages.words import number, percent
from sdxl_finetune.report.collect import Report

SMALL = 0.001
"""Share of the images below which a finding is not in the summary, unless files cannot be used at all."""


@dataclass(frozen=True)
class Remark:
    """A sentence of the summary, with the section of the page that shows more."""

    level: Literal["problem", "warning", "note"]
    text: str
    section: str


def summarize(report: Report) -> list[Remark]:
    """The remarks of a report, the most serious ones first."""
    remarks = [*_on_findings(report), *_on_duplicates(report), *_on_buckets(report), *_on_tags(report)]
    order = {"problem": 0, "warning": 1, "note": 2}
    return sorted(remarks, key=lambda remark: order[remark.level])


def _on_findings(report: Report) -> Iterator[Remark]:
    if unusable := sum(finding.count for finding in report.findings if finding.is_problem):
        kinds = number(sum(finding.is_problem for finding in report.findings), "kind of problem", "kinds of problems")
        yield Remark("problem", f"{number(unusable, 'file')} cannot be used, with {kinds}.", "problems")
    for finding in report.findings:
        if not finding.is_problem and finding.share >= SMALL:
            among = "" if finding.total == len(report.index) else f" of a sample of {finding.total:,}"
            text = (
                f"{number(finding.count, 'image')} {finding.title} ({percent(finding.share)}{among}). {finding.remedy}"
            )
            yield Remark("warning", text, "problems")


def _on_duplicates(report: Report) -> Iterator[Remark]:
    found = report.duplicates
    if found.is_content and found.groups.surplus:
        files = number(found.groups.surplus, "file is a copy of another one", "files are copies of others")
        yield Remark("warning", f"{files}: they are trained more often than the rest.", "duplicates")
    elif found.confirmed:
        text = f"{found.confirmed:,} of {found.read:,} files that may be duplicates were read and are duplicates."
        yield Remark("warning", text, "duplicates")
    share = report.equal_captions.rows / len(report.index)
    if share >= 0.01:
        yield Remark("note", f"{percent(share)} of the images have the same caption as another image.", "duplicates")


def _on_buckets(report: Report) -> Iterator[Remark]:
    small = [bucket for bucket in report.sizes.buckets if 0 < bucket.occurrences < bucket.batch_size]
    if small:
        have = "bucket has" if len(small) == 1 else "buckets have"
        yield Remark("note", f"{len(small)} {have} fewer images than a batch: their batches are not full.", "sizes")
    if len(report.sizes.subsets) > 1:
        first = report.sizes.subsets[0]
        total = sum(subset.occurrences for subset in report.sizes.subsets)
        if total and first.occurrences / total > 0.8:
            text = (
                f"One of {len(report.sizes.subsets)} folders makes up {percent(first.occurrences / total)} of an epoch."
            )
            yield Remark("note", text, "repeats")


def _on_tags(report: Report) -> Iterator[Remark]:
    if report.rare_tags:
        share = report.rare_tags / len(report.tags.names)
        text = f"{number(report.rare_tags, 'tag')} ({percent(share)} of all) stand in fewer than {report.rare} images."
        yield Remark("note", f"{text} The model can hardly learn them.", "rare")
