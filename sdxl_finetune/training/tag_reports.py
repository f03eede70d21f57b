"""Tag reports during training: which tags the model has learned so far.

A report never changes training: it draws no random number of the run, and the weights stay as they are. If it fails,
a warning says why and training goes on. A stopped run leaves its unfinished report; the resumed run completes it.
"""

import logging

from sdxl_finetune.diffusion.loss_weights import UNWEIGHTED
from sdxl_finetune.runtime.processes import on_first_rank
from sdxl_finetune.runtime.signals import StopRequest
from sdxl_finetune.tag_report.choice import choose
from sdxl_finetune.tag_report.making import Job, make_report, write_page_of
from sdxl_finetune.tag_report.measure import Subject, fixed_dataset
from sdxl_finetune.tag_report.scalars import tag_scalars
from sdxl_finetune.tag_report.schema import FOLDER, TAGS_ENDING, report_name
from sdxl_finetune.tag_report.tables import tag_rows
from sdxl_finetune.tag_report.terminal import describe_remarks
from sdxl_finetune.training.every import Moment, reports_every
from sdxl_finetune.training.setup import Run
from sdxl_finetune.training.write_saves import published_weights

logger = logging.getLogger(__name__)


def build_reports(run: Run) -> Job | None:
    """The job of all reports of a run; None if its options ask for none."""
    config, index = run.config, run.dataset.index
    if config.tag_report_every_n_epochs is None:
        return None
    choice = choose(config, index)
    logger.info("tag report: %s", choice.describe())
    return Job(
        config=config,
        index=index,
        choice=choice,
        dataset=fixed_dataset(run.dataset),
        accelerator=run.accelerator,
        folder=run.output_dir / FOLDER,
    )


def begin_reports(run: Run, job: Job | None, stop: StopRequest) -> None:
    """Reports on the untrained model, or makes the report that was due at the resumed step and is missing."""
    moment = run.timeline.after(run.timeline.first)
    if job is not None and (run.start is None or reports_every(run.config).is_due_by_epoch(moment)):
        report_tags(run, job, moment, stop)


def report_tags_if_due(run: Run, job: Job | None, moment: Moment, stop: StopRequest) -> None:
    """Makes the report that is due at this moment."""
    if job is not None and reports_every(run.config).is_due(moment):
        report_tags(run, job, moment, stop)


def report_tags(run: Run, job: Job, moment: Moment, stop: StopRequest) -> None:
    """Makes the report on the weights that are saved now. A failure is a warning, and training goes on."""
    learner, plan = run.learner, run.timeline.plan
    epochs, steps_into_epoch = plan.place(moment.step)
    facts = job.facts(
        f"{run.config.output_name or 'last'}.safetensors", step=moment.step, epoch=epochs + (steps_into_epoch > 0)
    )
    path = job.folder / f"{report_name(facts)}{TAGS_ENDING}"

    def is_wanted() -> bool:
        is_made = run.start and moment.is_first and path.exists()
        return not is_made and run.failed_saves.has_disk("tag report", moment.step)

    if not on_first_rank(run.accelerator, is_wanted):
        return
    subject = Subject(
        sdxl=learner.sdxl,
        vae=learner.vae,
        tokenize=run.tokenizer,
        objective=learner.objective,
        loss=run.config.model_copy(update=UNWEIGHTED),
        autocast=learner.autocast,
        device=run.accelerator.device,
    )
    run.log.flush()
    with run.log.pause(), published_weights(run, run.config.ema_save):
        try:
            done = epochs + steps_into_epoch / plan.steps_per_epoch
            report = make_report(job, subject, facts, epochs=done, stop=stop)
            if report is not None:
                run.log.tags(tag_scalars(tag_rows(report.tags)), step=moment.step, epoch=facts.epoch or 0)
                page = write_page_of(job, report)
                for line in describe_remarks(report, job.folder):
                    logger.info("tag report: %s", line)
                if page:
                    logger.info("tag report: open %s", page)
        except Exception as error:
            logger.warning("no tag report after step %d: %s. Training goes on", moment.step, error)
