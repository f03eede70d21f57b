"""`--reproduce`: runs a dumped step again, and says where its numbers go wrong.

The step's batches are first computed with the weights of the newest training state or checkpoint before the step, or
of the base model. If all numbers are finite, the cause lies in the steps between. These are then trained again from
that save. Nothing is saved, and no log is written.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from sdxl_finetune.batch import Batch
from sdxl_finetune.config import Config, with_local_models
from sdxl_finetune.diffusion.image_loss import image_losses
from sdxl_finetune.errors import counted, listed
from sdxl_finetune.model.vae import batch_latents, latent_size
from sdxl_finetune.output.console import console
from sdxl_finetune.output.log import Step
from sdxl_finetune.output.watch import WrongNumbers, depth
from sdxl_finetune.printable import printable
from sdxl_finetune.runtime.processes import Autocast, build_accelerator, on_every_rank
from sdxl_finetune.runtime.signals import Interrupt, StopRequest, stop_on_signals
from sdxl_finetune.training.dump_reading import check_fit, read_dump
from sdxl_finetune.training.dumps import Dump, DumpedBatch
from sdxl_finetune.training.learner import Learner
from sdxl_finetune.training.resume import Start, find_start_before
from sdxl_finetune.training.setup import build_restored_learner, build_run, load_model

logger = logging.getLogger(__name__)

TrainingSteps = Callable[[Learner, Iterable[Batch], StopRequest], Iterator[Step]]
"""The function `training_steps` of loop.py, which imports this module."""
NOT_REPRODUCED = 3
"""Exit status if all numbers are finite. A script can tell it from 1, a failure, and from 2, wrong input."""
WITHOUT_EFFECTS: dict[str, Any] = {
    **dict.fromkeys(["logging_dir", "log_with", "sample_prompts", "huggingface_repo_id"]),
    "torch_compile": False,
}
"""Options with which a run writes and uploads nothing, and in which every layer can be watched."""


@dataclass
class Findings:
    """Everything that is not finite when the batches of a step are computed, by the names of the model's modules."""

    losses: list[tuple[str, float, float]] = field(default_factory=list)
    """Image, timestep and loss."""
    inputs: list[str] = field(default_factory=list)
    """Tensors of the batches."""
    weights: list[str] = field(default_factory=list)
    """Parameters."""
    module: str | None = None
    """The first module in the forward pass with such an output."""
    gradients: list[str] = field(default_factory=list)
    """Parameters with such a gradient or gradient norm, in the order of the backward pass by `depth`."""

    @property
    def is_wrong(self) -> bool:
        return bool(self.inputs or self.weights or self.module or self.gradients)


def reproduce(config: Config, training_steps: TrainingSteps) -> int:
    """Runs the step of the dump `config.reproduce` again and prints what it finds; returns the exit status.

    The status is 0 if numbers go wrong again, and NOT_REPRODUCED if all of them are finite. Raises UserError if the
    dump, the weights or, for the steps between, the images cannot be read.
    """
    assert config.reproduce is not None
    dump = read_dump(config.reproduce)
    config = config.model_copy(update=WITHOUT_EFFECTS | {"seed": dump.seed})
    try:
        with stop_on_signals() as stop:
            findings, start = _with_saved_weights(config, dump)
            made = start.state.step if start else 0
            if not findings.is_wrong and made < dump.step - 1:
                findings = _after_the_steps_between(config, dump, start, training_steps, stop)
            _say("reproduced" if findings.is_wrong else "not reproduced: all numbers are finite")
            return 0 if findings.is_wrong else NOT_REPRODUCED
    except WrongNumbers as error:
        _say(f"the numbers go wrong before step {dump.step}: {error}")
        return 0
    except Interrupt as interrupt:
        return interrupt.exit_status


def _with_saved_weights(config: Config, dump: Dump) -> tuple[Findings, Start | None]:
    """Computes the step with the weights of the newest save before it, which is returned."""
    accelerator = build_accelerator(config)
    with console(config, accelerator.process_index):
        config = on_every_rank(partial(with_local_models, config))
        start = find_start_before(config, dump.step)
        loaded = load_model(config, start)
        assert config.reproduce is not None
        check_fit(dump, config.reproduce, config, loaded.model.architecture, latent_size(loaded.vae))
        if config.cache_text_encoder_outputs:
            loaded.model.detach_text_encoders()
        learner = build_restored_learner(config, loaded, accelerator, start, dump.steps)
        learner.vae.to(accelerator.device)
        source = f"{start.path}, {start.progress}" if start else f"the base model {config.model_path}"
        _say(f"step {dump.step} with the weights of {source}:")
        return examine(learner, dump.batches), start


def _after_the_steps_between(
    config: Config, dump: Dump, start: Start | None, training_steps: TrainingSteps, stop: StopRequest
) -> Findings:
    """Trains from the save up to the step, and computes the step with the weights that it had in the run."""
    made = start.state.step if start else 0
    _say(f"all numbers are finite; training steps {made + 1} to {dump.step - 1} again, and then the step:")
    config = config.model_copy(update={"resume": start.path if start else None, "resume_from_huggingface": False})
    with build_run(config, stop) as run:
        batches = takewhile(lambda batch: batch.position.step < dump.step - 1, run.batches())
        for step in training_steps(run.learner, batches, stop):
            run.log.record(step)
            stop.check()
        run.log.flush()
        return examine(run.learner, dump.batches)


def examine(learner: Learner, batches: Sequence[DumpedBatch]) -> Findings:
    """Computes losses and gradients of the batches, changes nothing, and prints and returns what is not finite."""
    findings = Findings()
    named = list(learner.parameters.named())
    values = [(name, learner.parameters.value(parameter)) for name, parameter in named]
    findings.weights = [name for name, value in values if not _is_finite(value)]
    del values
    wrong = set[str]()
    for dumped in batches:
        findings.inputs += [name for name, value in vars(dumped.batch).items() if not _is_finite(value)]
        with _first_wrong_output(learner.sdxl, named, findings):
            norms = _gradient_norms(learner, dumped, findings)
        wrong |= {name for (name, _), norm in zip(named, norms, strict=True) if not _is_finite(norm)}
    # Of one depth, the last parameter has its gradient first.
    findings.gradients = sorted((name for name, _ in reversed(named) if name in wrong), key=depth, reverse=True)
    _say_findings(findings, len(named))
    return findings


def _gradient_norms(learner: Learner, dumped: DumpedBatch, findings: Findings) -> Sequence[Tensor | None]:
    """The norm of each gradient of a micro-batch, in float32 as in a step. The update never sees these gradients.

    A norm may overflow although all elements are finite.
    """
    batch = dumped.batch.to(learner.accelerator.device)
    model = Autocast(learner.sdxl, learner.autocast)  # without DDP, which expects all ranks to compute the same layers
    losses = image_losses(model, batch, batch_latents(batch, learner.vae), learner.objective, learner.config)
    findings.losses += zip(dumped.images, batch.timesteps.tolist(), losses.tolist(), strict=True)
    loss, scale = (losses * batch.weights).sum(), learner.update.loss_scale
    parameters = [parameter for _, parameter in learner.parameters.named()]
    gradients = torch.autograd.grad(scale.scaled(loss) if scale else loss, parameters, allow_unused=True)
    return [each if each is None else torch.linalg.vector_norm(each, dtype=torch.float32) for each in gradients]


@contextmanager
def _first_wrong_output(
    model: nn.Module, named: Sequence[tuple[str, nn.Parameter]], findings: Findings
) -> Iterator[None]:
    """Within the context, notes the first module with an output that is not finite. Inner modules come first.

    Its name is that of its trained parameters, or else its place in the model.
    """
    names = {id(parameter): name.rpartition(".")[0] for name, parameter in named}

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(module: nn.Module, _inputs: Any, output: Any) -> None:
            if findings.module is None and not _is_finite(output):
                own = [names[id(each)] for each in module.parameters(recurse=False) if id(each) in names]
                findings.module = own[0] if own else name

        return note

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_finite(value: object) -> bool:
    """False if the tensor, or a tensor in the tuple or mapping, has an element that is not finite."""
    if isinstance(value, Tensor):
        return bool(value.isfinite().all())
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    return all(map(_is_finite, value)) if isinstance(value, tuple | list) else True


def _say_findings(findings: Findings, parameters: int) -> None:
    for image, timestep, loss in findings.losses:
        _say(f"  {image}, timestep {timestep:g}: loss {loss:.5g}")
    if findings.inputs:
        _say(f"  inputs that are not finite: {listed(dict.fromkeys(findings.inputs))}")
    if findings.weights:
        _say(f"  weights that are not finite: {listed(findings.weights)}")
    if findings.module:
        _say(f"  first layer with an output that is not finite: {findings.module}")
    if findings.gradients:
        count = f"{len(findings.gradients)} of {counted(parameters, 'gradient')}"
        _say(f"  {count} are not finite, the first in {findings.gradients[0]}")


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(printable(text), flush=True)
