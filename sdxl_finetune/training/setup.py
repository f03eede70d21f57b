"""A run: everything that training consists of, built from a config in the order in which it can fail.

Mistakes that cost nothing to find come first (optimizer, prompts, tokenizer, data, learning rate), then the
checkpoint is read and the latents are encoded, and the optimizer is built last.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import AutoencoderKL
from torch import nn

from sdxl_finetune.batch import Batch, Position
from sdxl_finetune.config import Config
from sdxl_finetune.data.batch_plan import Plan, build_plan
from sdxl_finetune.data.index import Index
from sdxl_finetune.data.loader import TrainingDataset, load_batches
from sdxl_finetune.data.tokens import Tokenizer, build_tokenizer
from sdxl_finetune.diffusion.draws import draw
from sdxl_finetune.diffusion.schedule import Schedule, build_schedule
from sdxl_finetune.latents.encoding import LatentStore
from sdxl_finetune.latents.preparing import encode_dataset, shared_index
from sdxl_finetune.model.attention import enable_gradient_checkpointing, use_attention
from sdxl_finetune.model.compilation import check_compiler, compile_blocks
from sdxl_finetune.model.load import Format, Loaded, load_checkpoint
from sdxl_finetune.model.save import SaveAs
from sdxl_finetune.model.sdxl import SDXL
from sdxl_finetune.model.vae import pixels_per_latent
from sdxl_finetune.optim.ema import Ema, build_ema
from sdxl_finetune.optim.lr import Rate, build_lr
from sdxl_finetune.optim.optimizer import optimizer_class, optimizer_name
from sdxl_finetune.optim.parameters import TrainedParameters, trained_parameters
from sdxl_finetune.optim.update import Update, build_update, check_update
from sdxl_finetune.output.checkpoints import epochs_between_saves, kind_to_save
from sdxl_finetune.output.log import Log, console, run_directory
from sdxl_finetune.output.metadata import load_thumbnail
from sdxl_finetune.output.prompts import Prompt, load_prompts
from sdxl_finetune.runtime.processes import build_accelerator, shared_seed, weight_dtype
from sdxl_finetune.runtime.signals import StopRequest
from sdxl_finetune.training.resume import (
    Start,
    changed_arguments,
    check_options,
    find_start,
    order_facts,
    settle_origin,
)
from sdxl_finetune.training.state import load_average, load_optimizer
from sdxl_finetune.training.validation import Validation, build_validation

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the training loop works with."""

    config: Config
    seed: int
    accelerator: Accelerator
    plan: Plan
    start: Start | None
    """What the run goes on from."""
    order: Mapping[str, Any]
    """What the order of images depends on."""
    steps: int
    """Optimizer steps of the whole run, from the start of training."""
    dataset: TrainingDataset
    sdxl: SDXL
    model: nn.Module
    """`sdxl` as accelerate prepared it."""
    vae: AutoencoderKL
    schedule: Schedule
    parameters: TrainedParameters
    update: Update
    ema: Ema | None
    lr: Rate
    tokenizer: Tokenizer
    prompts: Sequence[Prompt]
    thumbnail: str | None
    checkpoint_format: Format
    """Of the model that training started from, before any resume."""
    save_as: SaveAs
    validation: Validation | None
    """Of held out images, if there are any."""
    log: Log

    @property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.parameters.named()]

    @property
    def output_dir(self) -> Path:
        assert self.config.output_dir is not None
        return self.config.output_dir

    @property
    def first_step(self) -> int:
        """Steps that were made before, by the run that this one goes on from."""
        return self.start.step if self.start else 0

    @property
    def epochs(self) -> int:
        """How many epochs the run enters; max_train_steps may cut the last one short."""
        return epochs_of(self.plan, self.steps)

    def epoch_ended_by(self, position: Position) -> int | None:
        """The number, from 1, of the epoch whose last step this is; None within an epoch."""
        done = position.step + 1
        return position.epoch + 1 if self.plan.place(done)[1] == 0 or done == self.steps else None

    def batches(self) -> Iterator[Batch]:
        """This rank's batches, in order, from the first step that is still to be made to the last."""
        return load_batches(
            self.dataset,
            self.plan.micro_batches(self.first_step, self.steps),
            workers=self.config.max_data_loader_n_workers,
            pin_memory=self.accelerator.device.type == "cuda",
            on_bad_image=self.config.on_bad_image,
        )


@contextmanager
def build_run(config: Config, stop: StopRequest | None = None) -> Iterator[Run]:
    """Within it the run exists; its log is closed with the reason why it ended. Raises UserError, and Interrupt if a
    stop is asked for while images are encoded.
    """
    accelerator = build_accelerator(config)
    with console(config, accelerator.process_index):
        start = _on_first_rank(accelerator, lambda: find_start(config))
        with _open_log(config, accelerator, start) as log:
            yield _build(config, accelerator, start, log, stop)
    accelerator.end_training()


def _build(config: Config, accelerator: Accelerator, start: Start | None, log: Log, stop: StopRequest | None) -> Run:
    seed = start.seed if start and start.seed is not None and config.seed is None else shared_seed(config)
    torch.manual_seed(seed)  # for what draws outside of our control, as a user's own optimizer may
    optimizer_class(optimizer_name(config))
    check_update(config, accelerator.device)
    if config.torch_compile:
        check_compiler(config.dynamo_backend, accelerator.device)
    if start:
        check_options(start, config)
    tokenizer = build_tokenizer(
        max_token_length=config.max_token_length,
        weighted_captions=config.weighted_captions,
        tokenizer_cache_dir=config.tokenizer_cache_dir,
    )
    prompts = load_prompts(config.sample_prompts) if config.sample_prompts else ()
    thumbnail = load_thumbnail(config.metadata_thumbnail)
    index = shared_index(config, accelerator)
    build_lr(config, total_steps(config, _plan(config, index, seed, accelerator)))
    loaded = _load(config, start)
    index, store = encode_dataset(config, index, loaded.vae, accelerator, stop)
    plan = _plan(config, index, seed, accelerator)
    order = order_facts(index, plan)
    if start:
        plan = replace(plan, origin=settle_origin(start, order, config))
    steps = total_steps(config, plan)
    lr = build_lr(config, steps)
    parameters, model, update = _prepare(config, loaded.model, accelerator)
    ema = build_ema(parameters, config)
    if start and start.is_state:
        _restore(config, start, update, ema, accelerator)
    schedule = build_schedule(zero_terminal_snr=config.zero_terminal_snr).to(accelerator.device)
    share = {"rank": accelerator.process_index, "ranks": accelerator.num_processes}
    validation = build_validation(config, index, store, tokenizer, loaded.vae, schedule, **share)
    _say_what_is_trained(index, plan, steps, parameters)
    _begin_log(config, log, plan, steps)
    return Run(
        config=config,
        seed=seed,
        accelerator=accelerator,
        plan=plan,
        start=start,
        order=order,
        steps=steps,
        dataset=_dataset(config, accelerator, index, store, tokenizer, loaded.vae, seed, steps),
        sdxl=loaded.model,
        model=model,
        vae=loaded.vae,
        schedule=schedule,
        parameters=parameters,
        update=update,
        ema=ema,
        lr=lr,
        tokenizer=tokenizer,
        prompts=prompts,
        thumbnail=thumbnail,
        checkpoint_format=loaded.format,
        save_as=kind_to_save(config, loaded.format),
        validation=validation,
        log=log,
    )


def _dataset(
    config: Config,
    accelerator: Accelerator,
    index: Index,
    store: LatentStore | None,
    tokenizer: Tokenizer,
    vae: AutoencoderKL,
    seed: int,
    steps: int,
) -> TrainingDataset:
    return TrainingDataset(
        index=index,
        latents=store,
        tokenize=tokenizer,
        draw=partial(draw, config, seed, latent_scale=vae.config.scaling_factor),
        seed=seed,
        max_steps=steps,
        all_latents=config.adaptive_noise_scale is not None,
        pixels_per_latent=pixels_per_latent(vae),
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
    )


def epochs_of(plan: Plan, steps: int) -> int:
    """How many epochs a run of so many steps enters."""
    whole, more = plan.place(steps)
    return whole + (more > 0)


def _next_save(config: Config, plan: Plan, steps: int, step: int) -> int:
    """The step, after `step`, at which weights are saved next."""
    times = [steps]
    if every := config.save_every_n_steps:
        times.append((step // every + 1) * every)
    epochs = epochs_of(plan, steps)
    if (every := epochs_between_saves(config, epochs)) and (
        epoch := (plan.place(step)[0] // every + 1) * every
    ) < epochs:
        times.append(plan.steps_until(epoch))
    return min(times)


def total_steps(config: Config, plan: Plan) -> int:
    """Optimizer steps of the whole run: max_train_epochs if given, else max_train_steps."""
    return config.max_train_steps if config.max_train_epochs is None else plan.steps_until(config.max_train_epochs)


def _on_first_rank(accelerator: Accelerator, look: Callable[[], T]) -> T:
    """What the first rank finds, on all ranks."""
    found = [look() if accelerator.is_main_process else None]
    broadcast_object_list(found)
    return cast(T, found[0])


def _open_log(config: Config, accelerator: Accelerator, start: Start | None) -> Log:
    resumed = (start.log, start.step) if start and start.log else None
    directory = _on_first_rank(accelerator, lambda: run_directory(config, datetime.now(), resumed=resumed))
    return Log(config, directory, rank=accelerator.process_index, done=start.step if start else 0)


def _begin_log(config: Config, log: Log, plan: Plan, steps: int) -> None:
    log.begin(
        steps=steps,
        steps_per_epoch=plan.steps_per_epoch,
        first_epoch_at=plan.origin[0],
        epochs=epochs_of(plan, steps),
        next_save=partial(_next_save, config, plan, steps),
    )


def _plan(config: Config, index: Index, seed: int, accelerator: Accelerator) -> Plan:
    ranks, accumulation = accelerator.num_processes, config.gradient_accumulation_steps
    return build_plan(index, ranks=ranks, accumulation=accumulation, seed=seed)


def _load(config: Config, start: Start | None) -> Loaded:
    """The model to train: the one that the config names, or the one to go on from. Saved weights hold the VAE in their
    own precision, so that the one that training began with is read again.
    """
    given = config.pretrained_model_name_or_path
    assert given is not None
    if start is None:
        return load_checkpoint(given, dtype=weight_dtype(config), vae_path=config.vae, exact=config.keeps_masters)
    vae = None if start.is_state else config.vae or given
    exact = config.keeps_masters
    loaded = load_checkpoint(start.weights, dtype=weight_dtype(config), vae_path=vae, exact=exact)
    return replace(loaded, format=start.about["checkpoint"]) if start.is_state else loaded


def _restore(
    config: Config,
    start: Start,
    update: Update,
    ema: Ema | None,
    accelerator: Accelerator,
) -> None:
    changed = changed_arguments(start, config)
    scaler, unknown = load_optimizer(start.path, update.optimizer, update.optimizer_groups, changed=changed)
    if unknown:
        logger.info("%d parameters begin without optimizer state, as %s", len(unknown), unknown[0])
    if scaler is not None and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(scaler)
    if ema and (new := ema.load(load_average(start.path))):
        logger.info("the average of %d parameters begins with their values, as of %s", len(new), new[0])


def _prepare(config: Config, sdxl: SDXL, accelerator: Accelerator) -> tuple[TrainedParameters, nn.Module, Update]:
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(sdxl)
    use_attention(sdxl, "xformers" if config.xformers or config.diffusers_xformers else "sdpa")
    if config.torch_compile:
        compile_blocks(sdxl, config.dynamo_backend)
    sdxl.train()
    parameters = trained_parameters(config, sdxl.parameters_by_part(), sdxl.masters)
    # The device first: an optimizer whose states are made when it is built makes them there.
    sdxl.to(accelerator.device)
    return parameters, *build_update(config, parameters, sdxl, accelerator)


def _say_what_is_trained(index: Index, plan: Plan, steps: int, parameters: TrainedParameters) -> None:
    logger.info("%s", index.describe())
    logger.info(
        "%d batches and %d steps an epoch, %d steps in all",
        plan.batches_per_epoch,
        plan.steps_per_epoch,
        steps,
    )
    for group in parameters.groups:
        logger.info("training %s: %.1f million parameters at %g", group.name, group.size / 1e6, group.lr)
