"""`sdxl-model tags`: measures which tags a checkpoint has learned, on the images of a config."""

import argparse
import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from sdxl_finetune.commands.data import load_data_config
from sdxl_finetune.config import Config, with_local_models
from sdxl_finetune.data.batch_plan import build_plan
from sdxl_finetune.data.index import Index
from sdxl_finetune.data.loader import TrainingDataset
from sdxl_finetune.data.tokens import tokenizer_of
from sdxl_finetune.data.unchanged import no_noise, no_timesteps
from sdxl_finetune.diffusion.loss_weights import UNWEIGHTED
from sdxl_finetune.diffusion.objective import Objective, build_objective
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.files import auto_v2
from sdxl_finetune.model.load import Loaded, load_checkpoint
from sdxl_finetune.model.vae import latent_size
from sdxl_finetune.output.console import console
from sdxl_finetune.output.metadata import PREFIX
from sdxl_finetune.output.previews import PreviewModel
from sdxl_finetune.printable import printable
from sdxl_finetune.runtime.processes import autocast, build_accelerator, weight_dtype
from sdxl_finetune.runtime.signals import Interrupt, StopRequest, stop_on_signals
from sdxl_finetune.tag_report.choice import choose
from sdxl_finetune.tag_report.gallery import DrawOptions
from sdxl_finetune.tag_report.making import Job, make_report, write_page_of
from sdxl_finetune.tag_report.measure import MeasurementFailed, Subject, fixed_dataset
from sdxl_finetune.tag_report.scalars import log_scalars
from sdxl_finetune.tag_report.schema import FOLDER, Facts, Report, load_report
from sdxl_finetune.tag_report.tables import tag_rows
from sdxl_finetune.tag_report.terminal import describe
from sdxl_finetune.training.setup import prepare_latents, shared_index
from sdxl_finetune.training.state import TrainingState

logger = logging.getLogger(__name__)

SHORT = ("tags", "tags_file", "min_images", "images", "others", "timesteps", "budget")
"""Options of the command that are options of the config with `tag_report_` before their names."""

LISTS = ("tags", "tags_file", "min_images")
"""Options of which one names the tags."""


def tags(arguments: argparse.Namespace, options: Sequence[str]) -> int:
    """Measures the model, writes the report and prints it. Returns the exit status. Raises UserError."""
    given = [f"--tag_report_{name}={value}" for name in SHORT if (value := getattr(arguments, name)) is not None]
    if any(getattr(arguments, name) is not None for name in LISTS):  # replaces the list of the config
        given += [f"--tag_report_{name}=" for name in LISTS if getattr(arguments, name) is None]
    model = ["--pretrained_model_name_or_path", arguments.model, "--tag_report_every_n_epochs", "1"]
    config = load_data_config(["--config", arguments.config, *options, *model, *given], "sdxl-model tags")
    if config is None:
        return 0
    try:
        with stop_on_signals() as stop, console(config, int(os.environ.get("RANK", 0))):
            _run(config, arguments, stop)
    except MeasurementFailed as error:
        logger.error("the model cannot be measured: %s", error)
        return 1
    except Interrupt as interrupt:
        return interrupt.exit_status
    return 0


def _run(config: Config, arguments: argparse.Namespace, stop: StopRequest) -> None:
    accelerator = build_accelerator(config)
    config = with_local_models(config)
    base, base_model = _read_base(arguments.base)
    if arguments.output is None and config.output_dir is None:
        raise UserError(Problem("is missing: name the folder of the report, or set output_dir", key="output"))
    index = shared_index(config, accelerator)
    choice = choose(config, index)
    logger.info("tag report: %s", choice.describe())
    loaded = _load(config, config.model_path)
    training = _dataset(config, index, np.array([unit.row for unit in choice.units]), loaded, accelerator, stop)
    job = Job(
        config=config,
        index=index,
        choice=choice,
        dataset=fixed_dataset(training),
        accelerator=accelerator,
        folder=arguments.output or config.output_folder / FOLDER,
    )
    if base_model is not None:
        base = _measure(job, base_model, _load(config, base_model), None, stop)
    report = _measure(job, config.model_path, loaded, base, stop)
    if report is not None:
        model = _preview_model(config, loaded, accelerator)
        page = write_page_of(job, report, model, DrawOptions(tags=arguments.draw))
        log_scalars(config, tag_rows(report.tags), report.facts.step or 0)
        for line in describe(report, job.folder):
            print(printable(line))
        if page:
            print(f"page: {page}")
    accelerator.end_training()


def _read_base(path: Path | None) -> tuple[Report | None, Path | None]:
    """The report or the model that is compared with."""
    if path is None:
        return None, None
    if path.suffix.lower() == ".parquet":
        return load_report(path), None
    if not path.exists():
        message = "no such model or tag report: check the path"
        raise UserError(Problem(message, key="base", value=str(path)))
    return None, path


def _load(config: Config, path: Path) -> Loaded:
    loaded = load_checkpoint(path, dtype=weight_dtype(config), vae_path=config.vae_path, options=config)
    said = loaded.declared.zero_cond
    loaded.model.zero_cond = config.use_zero_cond if said is None else said
    return loaded


def _dataset(
    config: Config, index: Index, rows: np.ndarray, loaded: Loaded, accelerator: Accelerator, stop: StopRequest
) -> TrainingDataset:
    """The images of these rows. Of all other images no latents are encoded."""
    others = np.ones(len(index), bool)
    others[rows] = False
    measured, latents, masks = prepare_latents(
        config, index.without(np.flatnonzero(others).tolist()), loaded.vae, accelerator, stop
    )
    return TrainingDataset(
        index=measured,
        read_latents=latents.read if latents else None,
        tokenize=tokenizer_of(config),
        read_masks=masks.read if masks else None,
        draw_noise=no_noise,
        draw_timesteps=no_timesteps,
        seed=0,
        max_steps=1,
        latent_size=latent_size(loaded.vae),
    )


def _measure(job: Job, path: Path, loaded: Loaded, base: Report | None, stop: StopRequest) -> Report | None:
    """The report on a model, on the first process. Raises Interrupt."""
    config, device = job.config, job.accelerator.device
    facts, epochs = _facts(job, path, loaded)
    if base is not None and base.facts.options != facts.options:
        logger.warning("the report on %s measured something else, so no change since it is shown", base.facts.model)
        base = None
    subject = Subject(
        sdxl=loaded.model.to(device),
        vae=loaded.vae.to(device),
        tokenize=tokenizer_of(config),
        objective=_objective(config, loaded).to(device),
        loss=config.model_copy(update=UNWEIGHTED),
        autocast=partial(autocast, config, device),
        device=device,
    )
    report = make_report(job, subject, facts, epochs=epochs, base=base, stop=stop)
    stop.check()
    return report


def _objective(config: Config, loaded: Loaded) -> Objective:
    """The objective of the model, as it says itself, or else as the config says."""
    terminal_snr = loaded.declared.zero_terminal_snr
    return build_objective(
        loaded.declared.objective or config.objective,
        zero_terminal_snr=config.zero_terminal_snr if terminal_snr is None else terminal_snr,
    )


def _facts(job: Job, path: Path, loaded: Loaded) -> tuple[Facts, float | None]:
    """The facts of the report, and the epochs that the model was trained for, if it was trained on these images."""
    metadata = loaded.metadata
    step, epoch = (int(value) if (value := metadata.get(PREFIX + name)) else None for name in ("step", "epoch"))
    model_hash = auto_v2(path).lower() if path.is_file() else None
    facts = job.facts(path.name, model_hash=model_hash, step=step, epoch=epoch)
    if step is None or epoch is None:
        return facts, None
    state = TrainingState.from_metadata(step=step, epoch=epoch, seed=None, position=metadata.get(PREFIX + "resume"))
    order = state.data_order or {}
    changed = [name for name, value in job.index.facts().items() if order.get(name) != value]
    if changed:
        message = "%s was trained on other images than the config names (%s), so exposures are unknown"
        logger.warning(message, path, ", ".join(changed))
        return facts, None
    steps = (step - state.steps_into_epoch) / epoch if epoch else _steps_per_epoch(job)
    return facts, epoch + state.steps_into_epoch / steps


def _steps_per_epoch(job: Job) -> int:
    accumulation = job.config.gradient_accumulation_steps
    return build_plan(job.index, ranks=job.accelerator.num_processes, accumulation=accumulation, seed=0).steps_per_epoch


def _preview_model(config: Config, loaded: Loaded, accelerator: Accelerator) -> PreviewModel:
    return PreviewModel(
        sdxl=loaded.model,
        vae=loaded.vae,
        tokenizer=tokenizer_of(config),
        objective=_objective(config, loaded),
        flow=config,
        autocast=partial(autocast, config, accelerator.device),
    )
