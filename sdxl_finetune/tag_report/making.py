"""Makes a report: measures, decides the states, compares with earlier reports and writes the files."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from sdxl_finetune.config import Config
from sdxl_finetune.data.index import Index
from sdxl_finetune.data.loader import TrainingDataset
from sdxl_finetune.output.previews import PreviewModel
from sdxl_finetune.progress import duration
from sdxl_finetune.runtime.signals import StopRequest
from sdxl_finetune.tag_report.choice import Choice, image_name
from sdxl_finetune.tag_report.finished import open_finished
from sdxl_finetune.tag_report.gallery import DrawOptions, Example, make_exhibits, tags_to_show
from sdxl_finetune.tag_report.measure import Subject, measure
from sdxl_finetune.tag_report.outputs import write_files, write_tag_page
from sdxl_finetune.tag_report.results import build_report, earlier_reports, with_changes
from sdxl_finetune.tag_report.schema import Facts, Report, save_report
from sdxl_finetune.tag_report.states import bounds

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything about reports that does not depend on the model."""

    config: Config
    index: Index
    choice: Choice
    dataset: TrainingDataset
    """That of `measure.fixed_dataset`."""
    accelerator: Accelerator
    folder: Path

    def facts(self, model: str, *, model_hash: str | None = None, step: int | None, epoch: int | None) -> Facts:
        """The facts of a report on a model."""
        return Facts(
            model=model,
            model_hash=model_hash,
            step=step,
            epoch=epoch,
            options=self.choice.facts(self.index),
            bounds=bounds(self.config),
        )


def make_report(
    job: Job,
    subject: Subject,
    facts: Facts,
    *,
    epochs: float | None,
    base: Report | None = None,
    stop: StopRequest | None = None,
) -> Report | None:
    """Measures a model on all processes and saves the report. Returns the report on the first process.

    `epochs` is how many epochs of the images the model was trained for, None if unknown. The report is compared with
    `base`, and with the last report in the folder that measured the same; the first one there is the default base.
    Returns None, too, if one of the processes was asked to stop. Raises MeasurementFailed.
    """
    choice, accelerator, began = job.choice, job.accelerator, time.monotonic()
    computation = f"{job.config.mixed_precision} {subject.objective.kind} {subject.objective.ends_in_noise}"
    computation += " zero_cond" * subject.sdxl.zero_cond
    rank = accelerator.process_index
    finished = open_finished(job.folder, subject.sdxl, choice, job.index, computation, rank)
    losses = measure(subject, choice, job.dataset, accelerator, finished, stop)
    if losses is None or not accelerator.is_main_process:
        return None
    report = build_report(choice, losses, job.index, job.config, facts, epochs)
    first, last = earlier_reports(job.folder, facts)
    report = with_changes(report, base or first, last)
    path = save_report(job.folder, report)
    finished.remove()
    weights = {subset.image_weights for subset in job.index.subsets}
    write_files(job.folder, report, [path for path in weights if isinstance(path, Path)])
    logger.info("tag report: %s written after %s", path, duration(time.monotonic() - began))
    return report


def write_page_of(
    job: Job, report: Report, model: PreviewModel | None = None, options: DrawOptions | None = None
) -> Path | None:
    """Writes the page of a report with its images, and with pictures that the model draws. Returns its path."""
    index, listed = job.dataset.index, job.choice.listed
    found = {}
    for pair in job.choice.pairs:
        unit = job.choice.units[pair.unit]
        found[listed.names[pair.tag], image_name(index, unit.row)] = (pair, unit)

    def example_of(tag: str, image: str) -> Example | None:
        if (tag, image) not in found:
            return None
        pair, unit = found[tag, image]
        entry = index[unit.row]
        whole, without = unit.captions[pair.whole], unit.captions[pair.without]
        return Example(
            caption=whole, without=without, width=entry.bucket.width, height=entry.bucket.height, read=entry.read
        )

    options = options or DrawOptions(tags=0)
    exhibits = make_exhibits(tags_to_show(report, options), report, example_of, model, options)
    return write_tag_page(job.folder, report, exhibits)
