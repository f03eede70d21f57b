"""A run: everything that training consists of, built from a config in the order in which it can fail.

Mistakes that cost nothing to find come first (optimizer, prompts, tokenizer, data, learning rate), then the
checkpoint is read and the latents are encoded, and the optimizer is built last.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import AutoencoderKL
from torch import Tensor, nn

from sdxl_finetune.batch import Batch, Position
from sdxl_finetune.config import Config, load_datasets
from sdxl_finetune.data.dataset import TrainingDataset, load_batches
from sdxl_finetune.data.index import Index, build_index, report_bad_images
from sdxl_finetune.data.latents import LatentStore, build_store, cache_latents
from sdxl_finetune.data.sampler import Plan, build_plan
from sdxl_finetune.data.tokens import Tokenizer, build_tokenizer
from sdxl_finetune.diffusion.draws import draw
from sdxl_finetune.diffusion.schedule import Schedule, build_schedule
from sdxl_finetune.model.keymap import KeyMap
from sdxl_finetune.model.load import load_checkpoint
from sdxl_finetune.model.memory import enable_gradient_checkpointing, use_attention
from sdxl_finetune.model.save import SaveAs
from sdxl_finetune.model.sdxl import SDXL
from sdxl_finetune.model.vae import encode, pixels_per_latent
from sdxl_finetune.optim.groups import Group, build_groups
from sdxl_finetune.optim.lr import Rate, build_lr
from sdxl_finetune.optim.optimizer import build_optimizer, optimizer_class, optimizer_name
from sdxl_finetune.output.log import Log, console, run_directory
from sdxl_finetune.output.metadata import load_thumbnail
from sdxl_finetune.output.prompts import Prompt, load_prompts
from sdxl_finetune.output.weights import kind_to_save
from sdxl_finetune.runtime import build_accelerator, shared_seed, weight_dtype

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the training loop works with."""

    config: Config
    seed: int
    accelerator: Accelerator
    plan: Plan
    steps: int
    """Optimizer steps of the whole run."""
    dataset: TrainingDataset
    sdxl: SDXL
    model: nn.Module
    """`sdxl` as accelerate prepared it."""
    vae: AutoencoderKL
    schedule: Schedule
    groups: Sequence[Group]
    optimizer: torch.optim.Optimizer
    lr: Rate
    tokenizer: Tokenizer
    prompts: Sequence[Prompt]
    thumbnail: str | None
    save_as: SaveAs
    log: Log

    @property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for group in self.groups for parameter in group.parameters.values()]

    @property
    def output_dir(self) -> Path:
        assert self.config.output_dir is not None
        return self.config.output_dir

    @property
    def epochs(self) -> int:
        """How many epochs the run enters; max_train_steps may cut the last one short."""
        return -(-self.steps // self.plan.steps_per_epoch)

    def epoch_ended_by(self, position: Position) -> int | None:
        """The number, from 1, of the epoch whose last step this is; None within an epoch."""
        done = position.step + 1
        return position.epoch + 1 if done % self.plan.steps_per_epoch == 0 or done == self.steps else None

    def batches(self) -> Iterator[Batch]:
        """This rank's batches, in order, from the first step to the last."""
        return load_batches(
            self.dataset,
            self.plan.micro_batches(0, self.steps),
            workers=self.config.max_data_loader_n_workers,
            pin_memory=self.accelerator.device.type == "cuda",
            on_bad_image=self.config.on_bad_image,
        )

    def latents(self, batch: Batch) -> Tensor:
        """The batch's latents as the U-Net sees them; encodes the images of a batch that has none cached."""
        latents = batch.latents
        if latents is None:
            assert batch.images is not None
            latents = encode(self.vae, batch.images, batch.encoding_noise)
        return latents * self.vae.config.scaling_factor


@contextmanager
def build_run(config: Config) -> Iterator[Run]:
    """Within it the run exists; its log is closed with the reason why it ended. Raises UserError."""
    accelerator = build_accelerator(config)
    with console(config, accelerator.process_index), _open_log(config, accelerator) as log:
        seed = shared_seed(config)
        torch.manual_seed(seed)  # for what draws outside of our control, as a user's own optimizer may
        optimizer_class(optimizer_name(config))
        tokenizer = build_tokenizer(
            max_token_length=config.max_token_length,
            weighted_captions=config.weighted_captions,
            tokenizer_cache_dir=config.tokenizer_cache_dir,
        )
        prompts = load_prompts(config.sample_prompts) if config.sample_prompts else ()
        thumbnail = load_thumbnail(config.metadata_thumbnail)
        index = _shared_index(config, accelerator)
        plan = _build_plan(config, index, seed, accelerator)
        lr = build_lr(config, total_steps(config, plan))
        assert config.pretrained_model_name_or_path is not None
        loaded = load_checkpoint(config.pretrained_model_name_or_path, dtype=weight_dtype(config), vae_path=config.vae)
        index, store = _encode_all(config, index, loaded.vae, accelerator)
        plan = _build_plan(config, index, seed, accelerator)
        steps = total_steps(config, plan)
        groups, model, optimizer = _prepare(config, loaded.model, accelerator)
        _say_what_is_trained(index, plan, steps, groups)
        log.begin(steps=steps, steps_per_epoch=plan.steps_per_epoch)
        yield Run(
            config=config,
            seed=seed,
            accelerator=accelerator,
            plan=plan,
            steps=steps,
            dataset=TrainingDataset(
                index=index,
                latents=store,
                tokenize=tokenizer,
                draw=partial(draw, config, seed, latent_scale=loaded.vae.config.scaling_factor),
                seed=seed,
                max_steps=steps,
                pixels_per_latent=pixels_per_latent(loaded.vae),
                rank=accelerator.process_index,
                ranks=accelerator.num_processes,
            ),
            sdxl=loaded.model,
            model=model,
            vae=loaded.vae,
            schedule=build_schedule(zero_terminal_snr=config.zero_terminal_snr).to(accelerator.device),
            groups=groups,
            optimizer=optimizer,
            lr=lr,
            tokenizer=tokenizer,
            prompts=prompts,
            thumbnail=thumbnail,
            save_as=kind_to_save(config, loaded.format),
            log=log,
        )
    accelerator.end_training()


def cache_dir(config: Config) -> Path:
    """Where the dataset index lies: cache_dir, or `cache` in output_dir."""
    assert config.output_dir is not None
    return config.cache_dir or config.output_dir / "cache"


def total_steps(config: Config, plan: Plan) -> int:
    """Optimizer steps of the whole run: max_train_epochs if given, else max_train_steps."""
    if config.max_train_epochs is None:
        return config.max_train_steps
    return config.max_train_epochs * plan.steps_per_epoch


def _open_log(config: Config, accelerator: Accelerator) -> Log:
    directory = [run_directory(config, datetime.now())]
    broadcast_object_list(directory)
    return Log(config, directory[0], rank=accelerator.process_index)


def _shared_index(config: Config, accelerator: Accelerator) -> Index:
    """The first rank looks at the files; the others map what it wrote."""
    shared: list[Index | None] = [None]
    if accelerator.is_main_process:
        shared = [build_index(load_datasets(config), cache_dir(config), on_bad_image=config.on_bad_image)]
    broadcast_object_list(shared)
    assert shared[0] is not None
    return shared[0]


def _build_plan(config: Config, index: Index, seed: int, accelerator: Accelerator) -> Plan:
    ranks, accumulation = accelerator.num_processes, config.gradient_accumulation_steps
    return build_plan(index, ranks=ranks, accumulation=accumulation, seed=seed)


def _encode_all(
    config: Config, index: Index, vae: AutoencoderKL, accelerator: Accelerator
) -> tuple[Index, LatentStore | None]:
    """With cache_latents the latents of all images, and the index without those that could not be read; the VAE then
    leaves the device.
    """
    vae.to(accelerator.device)
    if not config.cache_latents:
        return index, None

    def encode_on_device(images: Tensor, noise: Tensor) -> Tensor:
        return encode(vae, images.to(accelerator.device), noise.to(accelerator.device)).cpu()

    store = build_store(index, cache_dir(config))
    bad = cache_latents(store, encode_on_device, batch_size=config.vae_batch_size)
    report_bad_images(list(bad.values()), config.on_bad_image)
    vae.to("cpu")
    return index.without(bad), store


def _prepare(
    config: Config, sdxl: SDXL, accelerator: Accelerator
) -> tuple[list[Group], nn.Module, torch.optim.Optimizer]:
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(sdxl)
    use_attention(sdxl, "xformers" if config.xformers or config.diffusers_xformers else "sdpa")
    sdxl.train()
    groups = build_groups(config, _parts(sdxl))
    # The device first: an optimizer whose states are made when it is built makes them there.
    sdxl.to(accelerator.device)
    optimizer = build_optimizer(config, groups)
    model, optimizer = accelerator.prepare(sdxl, optimizer)
    return groups, model, optimizer


def _parts(sdxl: SDXL) -> Mapping[str, Mapping[str, nn.Parameter]]:
    """The parameters by part; the U-Net's under their checkpoint names, in which block_lr counts blocks."""
    keymap = KeyMap(sdxl.architecture.layout)
    return {
        "unet": {keymap.place(f"unet.{name}").key: parameter for name, parameter in sdxl.unet.named_parameters()},
        "text_encoder1": dict(sdxl.te1.named_parameters()),
        "text_encoder2": dict(sdxl.te2.named_parameters()),
    }


def _say_what_is_trained(index: Index, plan: Plan, steps: int, groups: Sequence[Group]) -> None:
    logger.info("%s", index.describe())
    logger.info(
        "%d batches and %d steps an epoch, %d steps in all",
        plan.batches_per_epoch,
        plan.steps_per_epoch,
        steps,
    )
    for group in groups:
        logger.info("training %s: %.1f million parameters at %g", group.name, group.size / 1e6, group.lr)
