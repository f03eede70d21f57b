"""The training loop. It reads from top to bottom as the algorithm does; what it is made of is built in run.py.

Everything that happens every so often is decided from the step's position alone. Nothing in `training_steps` waits
for the device: losses and norms stay there and are read a few steps later by the log. (With `ema_on_cpu` the average
does, which takes the weights in on the host.)
"""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from sdxl_finetune.batch import Batch, Position
from sdxl_finetune.config import Config
from sdxl_finetune.diffusion.objective import image_losses
from sdxl_finetune.errors import say_errors
from sdxl_finetune.model.compilation import compiler_failures
from sdxl_finetune.model.vae import batch_latents
from sdxl_finetune.optim.meter import Meter
from sdxl_finetune.optim.optimizer import set_lr
from sdxl_finetune.optim.update import total_norm
from sdxl_finetune.output.log import NonFiniteLoss
from sdxl_finetune.runtime.out_of_memory import OutOfMemory, name_the_batch
from sdxl_finetune.runtime.signals import Interrupt, StopRequest, stop_on_signals
from sdxl_finetune.training.hooks import (
    begin,
    is_finished,
    preview_if_due,
    save_final,
    save_if_due,
    save_interrupted,
    validate_if_due,
)
from sdxl_finetune.training.setup import Run, build_run

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step that was made."""

    position: Position
    loss: Tensor
    """Mean loss of the step's images, over all ranks; on the device, not waited for."""
    grad_norm: Tensor
    """Of all trained parameters before clipping; likewise."""
    stop: Tensor
    """Positive if any rank was asked to stop before the step ended; likewise."""
    measured: Mapping[str, Tensor]
    """More about the step; likewise."""
    rates: dict[str, float]
    """Learning rate of each group in this step."""
    images: int
    """Trained on, over all ranks."""
    data_wait: float
    """Seconds that the step waited for its batches."""


def train(config: Config) -> int:
    """Trains as `config` says; returns the exit status. Raises UserError for the user's mistakes."""
    try:
        compiling = compiler_failures(config.dynamo_backend) if config.torch_compile else nullcontext()
        with stop_on_signals() as stop, build_run(config, stop) as run, compiling:
            train_and_save(run, stop)
    except (NonFiniteLoss, OutOfMemory) as error:
        say_errors(error)
        return 1
    except Interrupt as interrupt:
        return interrupt.exit_status
    return 0


def train_and_save(run: Run, stop: StopRequest) -> None:
    """The run from its first step to its final weights."""
    if is_finished(run):
        logger.info("nothing is left to do: %d steps are made and saved", run.steps)
        return
    begin(run)
    stop.check()
    for step in training_steps(run, stop):
        done, epoch = step.position.step + 1, run.epoch_ended_by(step.position)
        record(run, step)
        preview_if_due(run, step=done, epoch=None)
        if epoch is not None:
            preview_if_due(run, step=done, epoch=epoch)
        validate_if_due(run, step=done, epoch=epoch)
        state_saved = save_if_due(run, step=done, epoch=epoch)
        if stop_is_due(run, stop):
            if not state_saved:
                save_interrupted(run, step=done)
            stop.end()
    save_final(run)


def stop_is_due(run: Run, stop: StopRequest) -> bool:
    """Whether to stop after this step: of several ranks all or none, when they all know that one was asked to."""
    return run.log.stop_seen if run.accelerator.num_processes > 1 else stop.number is not None


def training_steps(run: Run, stop: StopRequest) -> Iterator[Step]:
    """Makes the run's optimizer steps, one after the other, and yields each."""
    config, accelerator, update = run.config, run.accelerator, run.update
    loss, images, data_wait = torch.zeros((), device=accelerator.device), 0, 0.0
    meter = Meter(run.parameters, accelerator.device)
    for waited, batch in timed(run.batches()):
        position = batch.position
        rates = {group.name: run.lr(position.step, group.lr) for group in run.parameters.groups}
        set_lr(update.optimizer, list(rates.values()))
        if position.last_micro:
            meter.begin_step()
        with name_the_batch(batch, config):
            batch = batch.to(accelerator.device)
            with update.accumulate(last=position.last_micro, only=position.micros == 1):
                losses = image_losses(run.model, batch, batch_latents(batch, run.vae), run.schedule, config)
                micro_loss = (losses * batch.weights).sum()
                accelerator.backward(micro_loss)
            meter.add_losses(losses.detach(), batch.timesteps, batch.weights)
            loss, images, data_wait = loss + micro_loss.detach(), images + batch.images_in_step, data_wait + waited
            if not position.last_micro:
                continue
            norms = update.step()
            meter.end_step(norms)
            if run.ema:
                run.ema.update(position.step, images)
        asked = torch.full_like(loss, stop.number or 0)
        loss, asked, *sums = accelerator.reduce(torch.cat([torch.stack([loss, asked]), meter.sums]), "mean")
        yield Step(
            position=position,
            loss=loss,
            grad_norm=total_norm(norms),
            stop=asked,
            measured=meter.take(torch.stack(sums)),
            rates=rates,
            images=images,
            data_wait=data_wait,
        )
        loss, images, data_wait = torch.zeros_like(loss), 0, 0.0


def record(run: Run, step: Step) -> None:
    """Gives the step to the log, which reads its loss when it has arrived."""
    run.log.step(
        step=step.position.step + 1,
        epoch=step.position.epoch + 1,
        loss=step.loss,
        grad_norm=step.grad_norm,
        lr=step.rates,
        images=step.images,
        data_wait_seconds=step.data_wait,
        stop=step.stop if run.accelerator.num_processes > 1 else None,
        measured=step.measured,
    )


def timed(batches: Iterator[Batch]) -> Iterator[tuple[float, Batch]]:
    """Each batch with the seconds that it was waited for."""
    started = time.perf_counter()
    for batch in batches:
        yield time.perf_counter() - started, batch
        started = time.perf_counter()
