"""The training loop. It reads from top to bottom as the algorithm does; setup.py builds the parts.

Whatever happens only now and then (previews, validation, saves) is decided from the number of steps alone. Nothing in
`training_steps` waits for the device: losses and norms stay there, and the log reads them a few steps later. There are
two exceptions. `ema_on_cpu` copies the weights to the host after each step, and fp16 looks for gradients that overflow
before each step.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import nullcontext

import torch

from sdxl_finetune.batch import Batch
from sdxl_finetune.config import Config
from sdxl_finetune.data.loader import timed
from sdxl_finetune.data.workers import WorkersDied
from sdxl_finetune.diffusion.image_loss import image_losses
from sdxl_finetune.errors import say_errors
from sdxl_finetune.model.compilation import compiler_failures
from sdxl_finetune.model.vae import batch_latents
from sdxl_finetune.optim.lr import used_rates
from sdxl_finetune.optim.meter import Meter
from sdxl_finetune.optim.optimizer import set_lr
from sdxl_finetune.optim.update import total_norm
from sdxl_finetune.output.log import Step
from sdxl_finetune.output.watch import WrongNumbers
from sdxl_finetune.runtime.out_of_memory import OutOfMemory, name_the_batch
from sdxl_finetune.runtime.signals import Interrupt, StopRequest, stop_on_signals
from sdxl_finetune.training import hooks, learned_weights, tag_reports
from sdxl_finetune.training.debug_dataset import draw_dataset
from sdxl_finetune.training.failed_saves import SaveFailed
from sdxl_finetune.training.learner import Learner
from sdxl_finetune.training.rank_check import RankCheck
from sdxl_finetune.training.reproduce import reproduce
from sdxl_finetune.training.setup import Run, build_run

logger = logging.getLogger(__name__)


def train(config: Config) -> int:
    """Trains as `config` says; returns the exit status. Raises UserError for the user's mistakes."""
    if config.debug_dataset:
        return draw_dataset(config)
    if config.reproduce:
        return reproduce(config, training_steps)
    try:
        compiling = compiler_failures(config.dynamo_backend) if config.torch_compile else nullcontext()
        with stop_on_signals() as stop, build_run(config, stop) as run, compiling, hooks.saved_if_data_fails(run):
            train_and_save(run, stop)
    except (WrongNumbers, OutOfMemory, SaveFailed, WorkersDied) as error:
        say_errors(error)
        return 1
    except Interrupt as interrupt:
        return interrupt.exit_status
    return 0


def train_and_save(run: Run, stop: StopRequest) -> None:
    """Runs from the first step to the final checkpoint, with previews, validation and saves in between."""
    if hooks.is_finished(run):
        logger.info("nothing to do: all %d steps are made and the final checkpoint is saved", run.timeline.steps)
        return
    reports = tag_reports.build_reports(run)
    hooks.begin(run)
    tag_reports.begin_reports(run, reports, stop)
    if cause := run.requests.cause():
        logger.warning("%s before the first step: there is nothing new to save", cause)
        raise cause
    for step in training_steps(run.learner, run.batches(), stop):
        moment = run.timeline.after(step.number)
        run.log.record(step)
        run.requests.receive(step.requests)
        hooks.preview_if_due(run, moment)
        hooks.validate_if_due(run, moment)
        hooks.check_colours_if_due(run, moment)
        hooks.draw_weights_if_due(run, moment)
        written = hooks.save_if_due(run, moment)
        tag_reports.report_tags_if_due(run, reports, moment, stop)
        if run.requests.is_stop_due and (cause := run.requests.cause()):
            hooks.save_stopped(run, moment, written, cause)
            raise cause
    hooks.save_final(run)


def training_steps(learner: Learner, batches: Iterable[Batch], stop: StopRequest) -> Iterator[Step]:
    """Makes and yields optimizer steps. The positions of the batches say which micro-batches form a step."""
    config, accelerator, update = learner.config, learner.accelerator, learner.update
    loss, images, data_wait = torch.zeros((), device=accelerator.device), 0, 0.0
    timesteps: list[float] = []
    meter = Meter(learner.parameters, accelerator.device, accelerator.num_processes)
    rank_check = RankCheck(config, learner.parameters, accelerator)
    for waited, batch in timed(batches):
        position = batch.position
        rates = {group.name: learner.lr(position.step, group.lr) for group in learner.parameters.groups}
        set_lr(update.optimizer, list(rates.values()))
        if position.is_last_micro_batch:
            meter.begin_step()
        with name_the_batch(batch, config):
            batch = batch.to(accelerator.device)
            with update.accumulate(last=position.is_last_micro_batch, only=position.micro_batches_in_step == 1):
                latents = batch_latents(batch, learner.vae)
                losses = image_losses(learner.model, batch, latents, learner.objective, config)
                micro_loss = (losses * batch.weights).sum()
                trained = learner.loss_weights.weighted(losses, batch) if learner.loss_weights else micro_loss
                accelerator.backward(update.loss_scale.scaled(trained) if update.loss_scale else trained)
            meter.add_losses(losses.detach(), batch)
            loss, images, data_wait = loss + micro_loss.detach(), images + batch.images_in_step, data_wait + waited
            timesteps += batch.timesteps_of_ranks
            if not position.is_last_micro_batch:
                continue
            norms = update.step()
            meter.end_step(norms, update.loss_scale)
            if learner.ema:
                learner.ema.update(position.step, images)
            used, learned = used_rates(update.optimizer, rates), {}
            if learner.loss_weights:
                used[learned_weights.NAME] = learner.loss_weights.rate(position.step)
                learned = learner.loss_weights.step(position.step, accelerator)
        asked = [torch.full_like(loss, value) for value in (stop.cause is not None, stop.take_wish())]
        means = accelerator.reduce(torch.cat([torch.stack([loss, *asked]), meter.sums]), "mean")
        yield Step(
            position=position,
            loss=means[0],
            grad_norm=total_norm(norms),
            measured={**meter.take(means[3:]), **learned},
            requests=means[1:3],
            lr=used,
            images=images,
            timesteps=timesteps,
            vectors={**meter.vectors(means[3:], update.parameter_norms), **rank_check.after(position.step + 1)},
            data_wait_seconds=data_wait,
        )
        loss, images, data_wait, timesteps = torch.zeros_like(loss), 0, 0.0, []
