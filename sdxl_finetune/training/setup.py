"""A run: everything that training consists of. Cheap checks come first.

Mistakes that cost nothing to find come first (optimizer, prompts, tokenizer, data, learning rate). Then the checkpoint
is read and the latents are encoded, and the optimizer is built last.
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

from sdxl_finetune.batch import Batch
from sdxl_finetune.config import Config, HardwareOptions, LengthOptions, ModelOptions, load_datasets
from sdxl_finetune.data.batch_plan import Plan, build_plan
from sdxl_finetune.data.index import Index, build_index
from sdxl_finetune.data.loader import TrainingDataset, load_batches
from sdxl_finetune.data.tokens import Tokenizer, build_tokenizer
from sdxl_finetune.diffusion.noise import draw_noise
from sdxl_finetune.diffusion.timesteps import draw_timesteps
from sdxl_finetune.latents.captions import prepare_text
from sdxl_finetune.latents.preparing import prepare
from sdxl_finetune.latents.store import LatentStore
from sdxl_finetune.model.attention import enable_gradient_checkpointing, use_attention
from sdxl_finetune.model.compilation import check_compiler, compile_blocks
from sdxl_finetune.model.load import Format, Loaded, load_checkpoint
from sdxl_finetune.model.save import SaveAs
from sdxl_finetune.model.sdxl import SDXL
from sdxl_finetune.model.vae import pixels_per_latent
from sdxl_finetune.optim.lr import build_lr
from sdxl_finetune.optim.optimizer import optimizer_class
from sdxl_finetune.optim.update import check_update
from sdxl_finetune.output.checkpoints import format_to_save
from sdxl_finetune.output.console import console
from sdxl_finetune.output.log import Log, run_directory
from sdxl_finetune.output.metadata import load_thumbnail
from sdxl_finetune.output.prompts import Prompt, load_prompts
from sdxl_finetune.runtime.processes import build_accelerator, shared_seed, weight_dtype
from sdxl_finetune.runtime.signals import StopRequest
from sdxl_finetune.training import resume
from sdxl_finetune.training.every import Timeline, saves_every
from sdxl_finetune.training.learner import Learner, build_learner
from sdxl_finetune.training.optimizer_state import load_ema, restore_optimizer_state
from sdxl_finetune.training.resume import Start
from sdxl_finetune.training.text_encoder import TextEncoders
from sdxl_finetune.training.vae_encoder import VaeEncoder
from sdxl_finetune.training.validation import Validation, build_validation

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that the training loop and its hooks work with."""

    config: Config
    seed: int
    accelerator: Accelerator
    start: Start | None
    """The training state or checkpoint that the run continues from."""
    timeline: Timeline
    data_order: Mapping[str, Any]
    """The facts that the order of images depends on, saved to compare them on resume."""
    dataset: TrainingDataset
    learner: Learner
    tokenizer: Tokenizer
    prompts: Sequence[Prompt]
    thumbnail: str | None
    """Data URL of the picture in the metadata."""
    checkpoint_format: Format
    """Format of the model that training started from, before any resume."""
    save_as: SaveAs
    validation: Validation | None
    """None if no images are held out."""
    log: Log

    @property
    def output_dir(self) -> Path:
        assert self.config.output_dir is not None
        return self.config.output_dir

    def batches(self) -> Iterator[Batch]:
        """This rank's batches, in order, from the first step that is still to be made to the last."""
        first_step = self.start.state.step if self.start else 0
        return load_batches(
            self.dataset,
            self.timeline.plan.micro_batches(first_step, self.timeline.steps),
            workers=self.config.max_data_loader_n_workers,
            pin_memory=self.accelerator.device.type == "cuda",
            on_bad_image=self.config.on_bad_image,
        )


@contextmanager
def build_run(config: Config, stop: StopRequest | None = None) -> Iterator[Run]:
    """Builds the run, and closes its log with the reason for the end when the context ends.

    Raises UserError for the user's mistakes, and Interrupt if a stop is requested while images are encoded.
    """
    accelerator = build_accelerator(config)
    with console(config, accelerator.process_index):
        start = _on_first_rank(accelerator, lambda: resume.find_start(config))
        with _open_log(config, accelerator, start) as log:
            yield _build(config, accelerator, start, log, stop)
    accelerator.end_training()


def _build(config: Config, accelerator: Accelerator, start: Start | None, log: Log, stop: StopRequest | None) -> Run:
    seed = start.state.seed if start and config.seed is None else None
    seed = shared_seed(config) if seed is None else seed
    torch.manual_seed(seed)  # for code outside of our control that draws, such as a user's own optimizer
    check_optimization(config, accelerator.device)
    if start and start.is_state:
        resume.check_options(start, config)
    tokenizer = tokenizer_of(config)
    prompts = load_prompts(config.sample_prompts) if config.sample_prompts else ()
    thumbnail = load_thumbnail(config.metadata_thumbnail)
    index = shared_index(config, accelerator)
    loaded = _load_model(config, start)
    index, latents = _prepare_latents(config, index, loaded.vae, accelerator, stop)
    text = None
    if config.cache_text_encoder_outputs:
        text = prepare_text(index, TextEncoders(loaded.model, tokenizer, accelerator.device), config, accelerator, stop)
        loaded.model.detach_text_encoders()
    ranks = accelerator.num_processes
    plan = build_plan(index, ranks=ranks, accumulation=config.gradient_accumulation_steps, seed=seed)
    order = resume.data_order(index, plan)
    if start:
        plan = replace(plan, origin=resume.resumed_origin(start, order, config))
    timeline = Timeline(plan, total_steps(config, plan))
    _prepare_model(config, loaded.model, accelerator)
    learner = build_learner(config, loaded.model, loaded.vae, accelerator, build_lr(config, timeline.steps))
    if start and start.is_state:
        _restore(start, learner)
    dataset = TrainingDataset(
        index=index,
        read_latents=latents.read if latents else None,
        tokenize=tokenizer,
        read_text=text.read if text else None,
        draw_noise=partial(draw_noise, config, seed),
        draw_timesteps=partial(draw_timesteps, config, seed),
        seed=seed,
        max_steps=timeline.steps,
        noise_needs_latents=config.adaptive_noise_scale is not None,
        pixels_per_latent=pixels_per_latent(loaded.vae),
        rank=accelerator.process_index,
        ranks=ranks,
    )
    _log_beginning(config, log, index, timeline, learner)
    return Run(
        config=config,
        seed=seed,
        accelerator=accelerator,
        start=start,
        timeline=timeline,
        data_order=order,
        dataset=dataset,
        learner=learner,
        tokenizer=tokenizer,
        prompts=prompts,
        thumbnail=thumbnail,
        checkpoint_format=loaded.format,
        save_as=format_to_save(config, loaded.format),
        validation=build_validation(config, dataset),
        log=log,
    )


def check_optimization(config: Config, device: torch.device) -> None:
    """Raises UserError for an optimizer, learning-rate schedule or compiler that cannot be used as the config says."""
    optimizer_class(config.optimizer_name)
    check_update(config, device)
    build_lr(config, total_steps=1)  # the number of steps is known later, and no other mistake depends on it
    if config.torch_compile:
        check_compiler(config.dynamo_backend, device)


def shared_index(config: Config, accelerator: Accelerator) -> Index:
    """The dataset index. The first rank scans the files, and the other ranks map the index that it wrote."""

    def build() -> Index:
        skip = config.skip_cache_check
        return build_index(load_datasets(config), config.cache_folder, config.on_bad_image, skip_check=skip)

    return _on_first_rank(accelerator, build)


def tokenizer_of(config: ModelOptions) -> Tokenizer:
    """The tokenizer of a run. Raises UserError if a saved tokenizer is not CLIP's."""
    return build_tokenizer(
        max_token_length=config.max_token_length,
        weighted_captions=config.weighted_captions,
        tokenizer_cache_dir=config.tokenizer_cache_dir,
    )


def total_steps(options: LengthOptions, plan: Plan) -> int:
    """Optimizer steps of the whole run: from `max_train_epochs` if it is set, else `max_train_steps`."""
    if options.max_train_epochs is None:
        return options.max_train_steps
    return plan.steps_until(options.max_train_epochs)


def _on_first_rank(accelerator: Accelerator, find: Callable[[], T]) -> T:
    """Calls `find` on the first rank only, and returns its result on all ranks."""
    results = [find() if accelerator.is_main_process else None]
    broadcast_object_list(results)
    return cast(T, results[0])


def _open_log(config: Config, accelerator: Accelerator, start: Start | None) -> Log:
    resumed = (start.state.log, start.state.step) if start and start.state.log else None
    directory = _on_first_rank(accelerator, lambda: run_directory(config, datetime.now(), resumed=resumed))
    done = start.state.step if start else 0
    return Log(config, directory, rank=accelerator.process_index, ranks=accelerator.num_processes, done=done)


def _load_model(config: Config, start: Start | None) -> Loaded:
    """Loads the model that the config names, or the one to resume from.

    Checkpoints hold the VAE in their own precision. A run that resumes from a checkpoint therefore reads the VAE that
    training began with.
    """
    path, vae = config.pretrained_model_name_or_path, config.vae
    assert path is not None
    if start:
        vae = None if start.is_state else vae or path
        path = start.weights
    loaded = load_checkpoint(path, dtype=weight_dtype(config), vae_path=vae, exact=config.keeps_masters)
    if start and start.state.checkpoint_format:
        return replace(loaded, format=start.state.checkpoint_format)
    return loaded


def _prepare_latents(
    config: Config, index: Index, vae: AutoencoderKL, accelerator: Accelerator, stop: StopRequest | None
) -> tuple[Index, LatentStore | None]:
    """The latent cache, if the config asks for one. Without it, batches are encoded on the device as they come."""
    if config.cache_latents:
        return prepare(index, VaeEncoder(vae, accelerator.device), config, accelerator, stop)
    vae.to(accelerator.device)
    return index, None


def _prepare_model(config: HardwareOptions, sdxl: SDXL, accelerator: Accelerator) -> None:
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(sdxl)
    use_attention(sdxl, "xformers" if config.xformers or config.diffusers_xformers else "sdpa")
    if config.torch_compile:
        compile_blocks(sdxl, config.dynamo_backend)
    sdxl.train()
    # Moved before the optimizer is built, because some optimizers make their states then, on the parameters' device.
    sdxl.to(accelerator.device)


def _restore(start: Start, learner: Learner) -> None:
    """Gives the learner the optimizer state, gradient scaler and EMA of a training state."""
    update, scaler = learner.update, learner.accelerator.scaler
    changed = resume.changed_optimizer_args(start, learner.config)
    saved_scaler, unknown = restore_optimizer_state(
        start.optimizer, update.optimizer, update.optimizer_groups, changed=changed
    )
    if unknown:
        logger.info("%d parameters start without optimizer state, for example %s", len(unknown), unknown[0])
    if saved_scaler is not None and scaler is not None:
        scaler.load_state_dict(saved_scaler)
    if learner.ema and (unknown := learner.ema.load(load_ema(start.optimizer))):
        logger.info("the EMA of %d parameters starts with their values, for example %s", len(unknown), unknown[0])


def _log_beginning(config: Config, log: Log, index: Index, timeline: Timeline, learner: Learner) -> None:
    plan, steps = timeline.plan, timeline.steps
    logger.info("%s", index.describe())
    logger.info(
        "%d batches and %d steps an epoch, %d steps in all", plan.batches_per_epoch, plan.steps_per_epoch, steps
    )
    for group in learner.parameters.groups:
        logger.info("training %s: %.1f million parameters at %g", group.name, group.size / 1e6, group.lr)
    log.begin(
        steps=steps,
        steps_per_epoch=plan.steps_per_epoch,
        first_epoch_at=plan.origin[0],
        epochs=timeline.epochs,
        next_save=partial(saves_every(config, timeline.epochs).next_step, timeline),
    )
