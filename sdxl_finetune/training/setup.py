"""A run: everything that training consists of.

All mistakes that can be found without decoding an image are reported first (checks.py). Then the checkpoint is read and
the latents are encoded, and the optimizer is built last.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL

from sdxl_finetune.batch import Batch
from sdxl_finetune.config import Config, HardwareOptions, with_local_models
from sdxl_finetune.data.batch_plan import build_plan
from sdxl_finetune.data.caption_lengths import measure_captions
from sdxl_finetune.data.index import Index
from sdxl_finetune.data.kept_files import publish_index, remove_unused
from sdxl_finetune.data.loader import TrainingDataset, load_batches
from sdxl_finetune.data.mount_points import with_folders_of_this_machine
from sdxl_finetune.data.tokens import Tokenizer
from sdxl_finetune.diffusion.pairing import draw_paired_noise
from sdxl_finetune.diffusion.timesteps import draw_timesteps
from sdxl_finetune.errors import Problems, counted
from sdxl_finetune.files import size_text
from sdxl_finetune.latents.captions import prepare_text
from sdxl_finetune.latents.masks import MaskStore, prepare_masks
from sdxl_finetune.latents.preparing import prepare
from sdxl_finetune.latents.store import LatentStore, TextStore
from sdxl_finetune.model.attention import enable_gradient_checkpointing, use_attention
from sdxl_finetune.model.compilation import compile_blocks
from sdxl_finetune.model.declared import marker_tensors
from sdxl_finetune.model.load import Format, Loaded, load_checkpoint
from sdxl_finetune.model.save import SaveAs
from sdxl_finetune.model.sdxl import SDXL
from sdxl_finetune.model.vae import latent_scale, latent_size
from sdxl_finetune.optim.lr import build_lr
from sdxl_finetune.optim.optimizer import state_bytes
from sdxl_finetune.output.checkpoints import format_to_save
from sdxl_finetune.output.console import console
from sdxl_finetune.output.hub import check_access
from sdxl_finetune.output.log import Log
from sdxl_finetune.output.log_history import run_directory
from sdxl_finetune.output.prompts import Prompt, with_size
from sdxl_finetune.output.samplers import sampler_remarks
from sdxl_finetune.output.stages import StageRecord
from sdxl_finetune.output.uploads import Uploads, open_uploads
from sdxl_finetune.runtime.processes import (
    build_accelerator,
    on_every_rank,
    on_first_rank,
    shared_seed,
    trained_dtype,
    weight_dtype,
)
from sdxl_finetune.runtime.signals import StopRequest
from sdxl_finetune.storage import Address
from sdxl_finetune.storage.folders import fetch_to
from sdxl_finetune.training import resume
from sdxl_finetune.training.checks import Inputs, index_images, read_inputs
from sdxl_finetune.training.colours import ColourCheck, build_colour_check
from sdxl_finetune.training.dumps import build_watch
from sdxl_finetune.training.every import Timeline, first_step, saves_every, total_steps
from sdxl_finetune.training.failed_saves import FailedSaves
from sdxl_finetune.training.guards import guarded
from sdxl_finetune.training.learned_weights import build_learned_weights
from sdxl_finetune.training.learner import Learner, build_learner
from sdxl_finetune.training.option_files import saved_options
from sdxl_finetune.training.requests import Requests
from sdxl_finetune.training.restoring import restore
from sdxl_finetune.training.resume import Start
from sdxl_finetune.training.stage import begin_stage
from sdxl_finetune.training.stored_saves import StoredSaves, build_uploads
from sdxl_finetune.training.text_encoder import TextEncoders
from sdxl_finetune.training.vae_encoder import VaeEncoder
from sdxl_finetune.training.validation import Validation, build_validation

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that the training loop and its hooks work with."""

    config: Config
    options: Mapping[str, Any]
    """The options that training states save, with digests of files as they were at the start."""
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
    colours: ColourCheck | None
    """None if the options ask for no colour check."""
    log: Log
    stages: StageRecord
    """The stages of training so far, for the metadata of checkpoints."""
    uploads: Uploads
    stored: StoredSaves
    """Saves that the store held at the start, for the first rank. What is removed since is taken out."""
    failed_saves: FailedSaves
    requests: Requests

    @property
    def output_dir(self) -> Path:
        return self.config.output_folder

    def batches(self) -> Iterator[Batch]:
        """This rank's batches, in order, from the first step that is still to be made to the last."""
        return load_batches(
            self.dataset,
            self.timeline.plan.micro_batches(self.timeline.first, self.timeline.steps),
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
    problems = Problems()
    with console(config, accelerator.process_index), guarded(config, accelerator, problems):
        config = problems.attempt(on_every_rank, partial(with_local_models, config)) or config
        problems.attempt(on_first_rank, accelerator, lambda: check_access(config))
        start = problems.attempt(on_first_rank, accelerator, lambda: resume.find_start(config))
        start = start and problems.attempt(on_every_rank, partial(resume.start_here, start, config))
        if problems.found:
            _read_inputs(config, accelerator, None, problems)
        with _open_log(config, accelerator, start) as log:
            requests = Requests(config, accelerator, stop or StopRequest())
            run = _build(config, accelerator, start, log, requests)
            with open_uploads(run.uploads, stop):
                yield run
    accelerator.end_training()


def _read_inputs(config: Config, accelerator: Accelerator, start: Start | None, problems: Problems) -> Inputs:
    """Raises UserError with the problems of all inputs and those that `problems` holds already."""
    if start and start.is_state:
        problems.attempt(resume.check_options, start, config)
    share = partial(_share_index, config, accelerator)
    weights = start.weights if start else None
    inputs = read_inputs(config, accelerator.device, problems, weights=weights, share=share)
    problems.raise_if_any()
    return inputs


def _build(config: Config, accelerator: Accelerator, start: Start | None, log: Log, requests: Requests) -> Run:
    failed_saves = FailedSaves(config)  # it remembers the disks before images are encoded, which may take hours
    seed = _run_seed(config, start)
    torch.manual_seed(seed)  # for code outside of our control that draws, such as a user's own optimizer
    inputs = _read_inputs(config, accelerator, start, Problems())
    index, tokenizer, prompts = inputs.index, inputs.tokenizer, inputs.prompts or ()
    assert index is not None and tokenizer is not None
    loaded = load_model(config, start)
    index, latents, masks = prepare_latents(config, index, loaded.vae, accelerator, requests.stop)
    text = _prepare_text(config, index, loaded.model, tokenizer, accelerator, requests.stop)
    ranks = accelerator.num_processes
    timeline, order = _timeline(config, index, start, ranks=ranks, seed=seed)
    learner = build_restored_learner(config, loaded, accelerator, start, timeline.steps)
    dataset = TrainingDataset(
        index=index,
        read_latents=latents.read if latents else None,
        tokenize=tokenizer,
        read_masks=masks.read if masks else None,
        read_text=text.read if text else None,
        draw_noise=partial(draw_paired_noise, config, config, seed),
        draw_timesteps=partial(draw_timesteps, config, seed),
        seed=seed,
        max_steps=timeline.steps,
        scale_latents=latent_scale(loaded.vae).scaled if config.noise_needs_latents else None,
        contrastive=config.contrastive_flow_matching,
        latent_size=latent_size(loaded.vae),
        rank=accelerator.process_index,
        ranks=ranks,
    )
    log.watch = build_watch(config, seed, dataset, timeline, learner.parameters, failed_saves)
    _log_beginning(config, log, index, timeline, learner, prompts)
    _log_captions(index, tokenizer, accelerator)
    uploads, stored = build_uploads(config, accelerator)
    failed_saves.begin(timeline.first)
    return Run(
        config=config,
        options=saved_options(config),
        seed=seed,
        accelerator=accelerator,
        start=start,
        timeline=timeline,
        data_order=order,
        dataset=dataset,
        learner=learner,
        tokenizer=tokenizer,
        prompts=with_size(prompts, index.resolution),
        thumbnail=inputs.thumbnail,
        checkpoint_format=loaded.format,
        save_as=format_to_save(config, loaded.format),
        validation=build_validation(config, dataset),
        colours=build_colour_check(config, dataset),
        log=log,
        stages=begin_stage(config, start, index, accelerator),
        uploads=uploads,
        stored=stored,
        failed_saves=failed_saves,
        requests=requests,
    )


def _timeline(
    config: Config, index: Index, start: Start | None, *, ranks: int, seed: int
) -> tuple[Timeline, Mapping[str, Any]]:
    """The steps of the run, and the facts that the order of its images depends on."""
    plan = build_plan(index, ranks=ranks, accumulation=config.gradient_accumulation_steps, seed=seed)
    order = resume.data_order(index, plan)
    if start:
        plan = replace(plan, origin=resume.resumed_origin(start, order, config))
    steps = total_steps(config, plan)
    return Timeline(plan, steps, start.state.step if start else first_step(config, plan, steps)), order


def _run_seed(config: Config, start: Start | None) -> int:
    """The seed of the config, or of the run that is resumed, or one that all ranks draw together."""
    if start and config.seed is None and start.state.seed is not None:
        return start.state.seed
    return shared_seed(config)


def shared_index(config: Config, accelerator: Accelerator) -> Index:
    """The dataset index. The first rank scans the files, and the other ranks map the index that it wrote.

    With `cache_dir` at an address, machines that share no folder receive the index through the store.
    """
    return _share_index(config, accelerator, lambda: index_images(config))


def _share_index(config: Config, accelerator: Accelerator, build: Callable[[], Index]) -> Index:
    location = config.cache_location

    def build_and_publish() -> Index:
        index = build()
        if isinstance(location, Address):
            publish_index(index.path, location / "indexes")
        return index

    index = on_first_rank(accelerator, build_and_publish)
    if isinstance(location, Address) and not accelerator.is_main_process:
        index = replace(index, path=config.cache_folder / index.path.name)
        fetch_to(location / "indexes" / index.path.name, index.path)
        if accelerator.is_local_main_process:
            remove_unused(config.cache_folder)
    return index if accelerator.is_main_process else with_folders_of_this_machine(index, config)


def _open_log(config: Config, accelerator: Accelerator, start: Start | None) -> Log:
    resumed = (start.state.log, start.state.step) if start and start.state.log else None
    is_own = start is None or start.is_of(config)
    find = partial(run_directory, config, datetime.now(), resumed=resumed, is_own=is_own)
    directory = on_first_rank(accelerator, find)
    done = start.state.step if start else 0
    return Log(config, directory, rank=accelerator.process_index, done=done)


def load_model(config: Config, start: Start | None) -> Loaded:
    """Loads the model that the config names, or the one to resume from.

    Checkpoints hold the VAE in their own precision. A run that resumes from a checkpoint therefore reads the VAE that
    training began with.
    """
    path, vae = config.model_path, config.vae_path
    assert path is not None
    if start:
        vae = None if start.is_state else vae or path
        path = start.weights
    loaded = load_checkpoint(path, dtype=weight_dtype(config), vae_path=vae, exact=config.keeps_masters, options=config)
    for remark in loaded.declared.contradictions(
        path,
        objective=config.objective,
        zero_terminal_snr=config.zero_terminal_snr,
        use_zero_cond=config.use_zero_cond,
    ):
        logger.warning("%s", remark)
    loaded.model.zero_cond = config.use_zero_cond
    loaded.model.markers = marker_tensors(config.objective, zero_terminal_snr=config.zero_terminal_snr, flow=config)
    if start and start.state.checkpoint_format:
        return replace(loaded, format=start.state.checkpoint_format)
    return loaded


def prepare_latents(
    config: Config, index: Index, vae: AutoencoderKL, accelerator: Accelerator, stop: StopRequest | None
) -> tuple[Index, LatentStore | None, MaskStore | None]:
    """The caches of latents and masks, if the config asks for them. Without them, batches hold images and masks."""
    if config.cache_latents:
        index, masks = prepare_masks(index, config, accelerator, latent_size(vae).pixels, stop)
        index, latents = prepare(index, VaeEncoder(vae, accelerator.device), config, accelerator, stop)
        return index, latents, masks
    vae.to(accelerator.device)
    return index, None, None


def _prepare_text(
    config: Config, index: Index, sdxl: SDXL, tokenizer: Tokenizer, accelerator: Accelerator, stop: StopRequest | None
) -> TextStore | None:
    """The cached outputs of the text encoders, which then leave the model; None if the config asks for no cache."""
    if not config.cache_text_encoder_outputs:
        return None
    text = prepare_text(index, TextEncoders(sdxl, tokenizer, accelerator.device), config, accelerator, stop)
    sdxl.detach_text_encoders()
    return text


def build_restored_learner(
    config: Config, loaded: Loaded, accelerator: Accelerator, start: Start | None, steps: int
) -> Learner:
    """The learner of a run of `steps` optimizer steps, with the state of the run that it continues."""
    _prepare_model(config, loaded.model, accelerator)
    learner = build_learner(config, loaded.model, loaded.vae, accelerator, build_lr(config, steps))
    loss_weights = build_learned_weights(config, learner.objective, accelerator.device, steps)
    learner = replace(learner, loss_weights=loss_weights)
    restore(start, learner)
    return learner


def _prepare_model(config: HardwareOptions, sdxl: SDXL, accelerator: Accelerator) -> None:
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(sdxl)
    use_attention(sdxl, "xformers" if config.xformers or config.diffusers_xformers else "sdpa")
    if config.torch_compile:
        compile_blocks(sdxl, config.dynamo_backend)
    sdxl.train()
    # Moved before the optimizer is built, because some optimizers make their states then, on the parameters' device.
    sdxl.to(accelerator.device)


def _log_captions(index: Index, tokenizer: Tokenizer, accelerator: Accelerator) -> None:
    """Logs once how many captions are cut off."""
    if not accelerator.is_main_process:
        return
    lengths = measure_captions(index, tokenizer)
    for number, sentence in enumerate(lengths.describe()):
        logger.log(logging.WARNING if lengths.cut or number else logging.INFO, "captions: %s", sentence)


def _log_beginning(
    config: Config, log: Log, index: Index, timeline: Timeline, learner: Learner, prompts: Sequence[Prompt]
) -> None:
    plan, steps = timeline.plan, timeline.steps
    logger.info("%s", index.describe())
    logger.info(
        "%s and %s an epoch, %s in all",
        counted(plan.batches_per_epoch, "batch"),
        counted(plan.steps_per_epoch, "step"),
        counted(steps, "step"),
    )
    if unsized := sum(prompt.width is None or prompt.height is None for prompt in prompts):
        size = "x".join(map(str, index.resolution))
        prompts_text = counted(unsized, "preview prompt")
        logger.info("%s without a size: drawn at the training resolution, %s", prompts_text, size)
    samplers = {prompt.sampler or config.sample_sampler for prompt in prompts}
    if config.colour_check_every_n_epochs or config.colour_check_every_n_steps:
        samplers.add(config.sample_sampler)
    for remark in sampler_remarks(samplers, learner.objective):
        logger.info("%s", remark)
    for group in learner.parameters.groups:
        logger.info("training %s: %.1f million parameters at %g", group.name, group.size / 1e6, group.lr)
    with suppress(Exception):  # a user's own optimizer may not step on a small tensor
        states = state_bytes(config, trained_dtype(config)) * sum(group.size for group in learner.parameters.groups)
        logger.info("%s keeps %s of optimizer states in each process", config.optimizer_name, size_text(states))
    log.begin(
        first_step=timeline.first,
        steps=steps,
        steps_per_epoch=plan.steps_per_epoch,
        first_epoch_at=plan.origin[0],
        epochs=timeline.epochs,
        next_save=partial(saves_every(config, timeline.epochs).next_step, timeline),
    )
