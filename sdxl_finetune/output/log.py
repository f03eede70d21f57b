"""The log of a run: TensorBoard, metrics.jsonl, the console log of each rank, config, versions, why the run ended.

All of it lies in one run directory under `logging_dir`. Without `logging_dir` a run shows progress and messages on the
console and writes no log, as in the reference. Tag names are the reference's: loss, lr/unet, loss/epoch, ... (read in
its sdxl_train.py). Scalars are read from the device after they have arrived: nothing here makes the host wait for a
step that is still being computed.
"""

import json
import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import TracebackType

import torch
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from sdxl_finetune import __version__
from sdxl_finetune.batch import Position
from sdxl_finetune.config import Config, to_toml
from sdxl_finetune.config.options import secrets_of
from sdxl_finetune.errors import Problem, UserError, counted
from sdxl_finetune.files import mount_of
from sdxl_finetune.output.colours import Drift
from sdxl_finetune.output.console import RedactingFormatter
from sdxl_finetune.output.contact_sheet import contact_sheet
from sdxl_finetune.output.curve import draw_curve
from sdxl_finetune.output.delayed_scalars import Arrived, DelayedScalars
from sdxl_finetune.output.histograms import EDGES, PERIOD, TimestepCounts
from sdxl_finetune.output.log_file import LogFile, MessageFile, said_if_it_fails, write_text
from sdxl_finetune.output.log_history import LOCK, METRICS, SAVES, last_losses, note_save
from sdxl_finetune.output.metadata import shareable, versions
from sdxl_finetune.output.trackers import build_trackers
from sdxl_finetune.output.watch import Watch, WrongNumbers
from sdxl_finetune.redaction import redacted
from sdxl_finetune.runtime import host
from sdxl_finetune.runtime.locks import Lock, Locked

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step as the training loop made it. Tensors have one element and are still on the device."""

    position: Position
    loss: Tensor
    """Mean loss of the step's images, over all ranks."""
    grad_norm: Tensor
    """Norm of the gradients of all trained parameters, before clipping."""
    measured: Mapping[str, Tensor]
    """Further scalars by their tag names (see optim/meter.py); NaN where there was nothing to measure."""
    lr: Mapping[str, float]
    """Learning rate of each parameter group, by the reference's names (unet, text_encoder1, ...)."""
    images: int
    """Number of images trained on, over all ranks."""
    data_wait_seconds: float
    """Seconds that this rank waited for its batches."""
    timesteps: Sequence[float] = ()
    """Timesteps of the step's images, over all ranks."""
    requests: Tensor | None = None
    """Shape (2,): mean over all ranks of their requests to stop (0 or 1) and of what they want to be saved (Wish)."""
    vectors: Mapping[str, Tensor] = field(default_factory=dict)
    """Further numbers that the watch checks (see output/watch.py)."""

    @property
    def number(self) -> int:
        """Optimizer steps made with this one, from the start of training."""
        return self.position.step + 1

    @property
    def epoch(self) -> int:
        """Number of the step's epoch, from 1."""
        return self.position.epoch + 1


@dataclass(frozen=True, kw_only=True)
class _Record:
    """A step, and what the host measured when the step was asked of the device."""

    step: Step
    images_per_second: float
    peak_memory_bytes: int

    def speed(self) -> dict[str, float]:
        return {
            "images_per_second": self.images_per_second,
            "data_wait_seconds": self.step.data_wait_seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
        }


class Log:
    """The log of one rank of one run, from start to end. Only the first rank writes scalars and pictures.

    As a context manager it records why the run ended: "finished", or the exception that left the context.
    """

    def __init__(self, config: Config, directory: Path | None, *, rank: int, done: int = 0) -> None:
        """`done` is the number of optimizer steps made before this run resumed."""
        self._directory = directory
        self._rank = rank
        self.watch = Watch(config)
        """Checks the numbers of each step when they have arrived."""
        self._delayed: DelayedScalars[_Record] = DelayedScalars()
        self._losses: deque[float] = deque()
        self._loss_sum = 0.0
        self._last_step = self._done = done
        self._steps = self._steps_per_epoch = 1
        self._timesteps = TimestepCounts()
        self._first_epoch_at, self._epochs = 0, 1
        self._next_save: Callable[[int], int] | None = None
        self._progress: tqdm | None = None
        self._since = time.perf_counter()
        self._file: MessageFile | None = None
        self._metrics: LogFile | None = None
        self._closed = False
        if directory:
            _make_directory(directory)
        self._trackers = build_trackers(config, directory, done, shareable(config)) if rank == 0 else []
        self._secrets = secrets_of(config)
        if directory:
            self._file = MessageFile(directory / f"console_rank{rank}.log")
            self._file.setFormatter(RedactingFormatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s", config))
            logging.getLogger().addHandler(self._file)
        if directory and rank == 0:
            write_text(directory / "config.toml", f"# sdxl_finetune {__version__}\n{to_toml(config)}")
            write_text(directory / "versions.json", json.dumps(versions(), indent=2) + "\n")
            with said_if_it_fails(directory / "ended.json"):
                (directory / "ended.json").unlink(missing_ok=True)
            self._metrics = LogFile(directory / METRICS)
            self._mount, self._lock = mount_of(directory), Lock(directory / LOCK)
            with suppress(Locked):  # two runs have resumed from one state in the same instant
                self._lock.acquire()

    def __enter__(self) -> "Log":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("finished" if error is None else f"{type(error).__name__}: {error}")

    @property
    def name(self) -> str | None:
        """Name of the run's folder in `logging_dir`."""
        return self._directory.name if self._directory else None

    @property
    def last_step(self) -> int:
        """Number of optimizer steps made with the last one whose scalars have arrived."""
        return self._last_step

    def begin(
        self,
        *,
        steps: int,
        steps_per_epoch: int,
        first_step: int = 0,
        first_epoch_at: int = 0,
        epochs: int = 1,
        next_save: Callable[[int], int] | None = None,
    ) -> None:
        """Starts the progress bar and the clock of the first step.

        The run has `steps` optimizer steps in `epochs` epochs, which are counted from the step `first_epoch_at`.
        `first_step` is the number of steps made before the first one.
        `next_save` returns the step of the next save after a given step.
        """
        self._steps, self._steps_per_epoch, self._first_epoch_at = steps, steps_per_epoch, first_epoch_at
        self._epochs, self._next_save = epochs, next_save
        past = last_losses(self._directory, steps_per_epoch) if self._directory and self._done else ()
        self._losses, self._loss_sum = deque(past, maxlen=steps_per_epoch), math.fsum(past)
        if self._rank == 0:
            # A terminal is redrawn in place; a file grows by a line at each refresh.
            interval = 0.2 if sys.stderr.isatty() else 30.0
            self._progress = tqdm(
                total=steps, initial=first_step, desc="steps", smoothing=0.05, mininterval=interval, maxinterval=60
            )
        self._since = time.perf_counter()

    def record(self, step: Step) -> None:
        """Records a step that was asked of the device. Its scalars are written when they have arrived.

        Raises WrongNumbers for this step or, on a GPU, for an earlier one.
        """
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        record = _Record(
            step=step,
            images_per_second=step.images / max(seconds, 1e-9),
            peak_memory_bytes=peak_memory_bytes(step.loss.device),
        )
        scalars = {"loss": step.loss, "grad_norm": step.grad_norm, **step.measured}
        self._read(self._delayed.push(record, scalars, step.vectors))

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the time spent in the context (saving, previews) from the time of the next step."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - started

    def flush(self) -> None:
        """Waits for the scalars of all recorded steps, so that every loss is checked before a checkpoint is saved.

        Raises WrongNumbers.
        """
        self._read(self._delayed.flush())

    def note_save(self, step: int) -> None:
        """Records that a checkpoint or training state of `step` is about to be saved.

        A run that resumes from it cuts the log back to this point. Raises WrongNumbers.
        """
        self.flush()
        self._write_histogram(step)
        for tracker in self._trackers:
            tracker.flush()
        if self._metrics and self._directory:
            self._metrics.flush()
            with said_if_it_fails(self._directory / SAVES):
                note_save(self._directory, step)

    def previews(self, drawn: Sequence[tuple[int, Image, str]], step: int) -> None:
        """Shows previews that were drawn after `step` steps: each by itself, and all on one sheet.

        `drawn` has for each preview: its number in the prompt file, the image, the prompt.
        """
        self.flush()
        if not self._trackers:
            return
        sheet = contact_sheet([image for _, image, _ in drawn], [prompt for *_, prompt in drawn], columns=4)
        for tracker in self._trackers:
            for index, image, prompt in drawn:
                tracker.image(f"sample_{index}", image, prompt, step)
            tracker.image("previews", sheet, "", step)

    def validation(self, losses: Mapping[str, float], *, step: int, epoch: int) -> None:
        """Writes validation losses after `step` steps, by tag name. `epoch` is that of the last step, or 0."""
        logger.info("validation after step %d: loss %.5g", step, losses["loss"])
        self._measured("validation", losses, step, epoch)

    def tags(self, scalars: Mapping[str, float], *, step: int, epoch: int) -> None:
        """Writes the scalars of a tag report after `step` steps, by name. `epoch` is that of the last step, or 0."""
        self._measured("tags", scalars, step, epoch)

    def _measured(self, kind: str, scalars: Mapping[str, float], step: int, epoch: int) -> None:
        self._write_row({"step": step, "epoch": epoch, kind: dict(scalars)})
        for tracker in self._trackers:
            tracker.scalars({f"{kind}/{name}": value for name, value in scalars.items()}, step)

    def colours(self, drifts: Sequence[Drift], *, step: int, epoch: int) -> None:
        """Writes the colours of drawn pictures, of the images of the same captions, and the drift after `step` steps.

        `epoch` is that of the last step, or 0.
        """
        if not drifts:
            return
        logger.info("colours after step %d: %s", step, ", ".join(f"{d.name} {d.value:+.3f}" for d in drifts))
        figures = {f"drift/{drift.name}": drift.value for drift in drifts}
        figures |= {f"drawn/{drift.name}": drift.drawn for drift in drifts}
        figures |= {f"images/{drift.name}": drift.expected for drift in drifts}
        self._measured("colours", figures, step, epoch)

    def loss_weights(self, curve: Mapping[float, float], *, step: int, epoch: int) -> None:
        """Writes learned loss weights by timestep after `step` steps, and shows their curve."""
        weights = {f"t{timestep:05.1f}": weight for timestep, weight in curve.items()}
        self._write_row({"step": step, "epoch": epoch, "loss_weights": weights})
        if self._trackers:
            picture = draw_curve(curve, f"learned loss weights by timestep after {counted(step, 'step')}")
            for tracker in self._trackers:
                tracker.image("loss_weights", picture, "", step)

    def close(self, reason: str) -> None:
        """Writes all pending scalars and why the run ended. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        with suppress(WrongNumbers, RuntimeError):  # the reason is known, and a lost device has no more scalars
            self.flush()
        if self._progress is not None:
            with suppress(OSError):
                self._progress.close()
        for tracker in self._trackers:
            tracker.close()
        if self._metrics and self._directory:
            self._metrics.close()
            reason = redacted(reason, self._secrets)
            ended = {"reason": reason, "step": self._last_step, "time": datetime.now().astimezone().isoformat()}
            write_text(self._directory / "ended.json", json.dumps(ended, indent=2) + "\n", self._mount)
            self._lock.release()
        if self._file:
            logging.getLogger().removeHandler(self._file)
            self._file.close()

    def _read(self, arrived: list[Arrived[_Record]]) -> None:
        for each in arrived:
            record = each.record
            self._last_step = record.step.number
            scalars = {name: value for name, value in each.scalars.items() if "/" not in name or not math.isnan(value)}
            mean_loss = self._mean_loss(scalars["loss"])
            if self._rank == 0:
                self._write_step(record, scalars, mean_loss)
            self.watch.check(record.step.number, scalars, record.step.timesteps, each.vectors)

    def _mean_loss(self, loss: float) -> float:
        """Mean loss of the last steps, as many as an epoch has: the reference's avr_loss and loss/epoch.

        A loss that is not finite does not count, because no later mean would be finite.
        """
        if not math.isfinite(loss):
            return loss
        if len(self._losses) == self._losses.maxlen:
            self._loss_sum -= self._losses[0]
        self._losses.append(loss)
        self._loss_sum += loss
        return self._loss_sum / len(self._losses)

    def _write_step(self, record: _Record, scalars: Mapping[str, float], mean_loss: float) -> None:
        number, epoch, lr, speed = record.step.number, record.step.epoch, record.step.lr, record.speed()
        self._write_row({"step": number, "epoch": epoch, **scalars, "lr": dict(lr), **speed})
        rates = {f"lr/{name}": rate for name, rate in lr.items()}
        for tracker in self._trackers:
            tracker.scalars({**scalars, **rates, **speed}, number)
            if self._losses and ((number - self._first_epoch_at) % self._steps_per_epoch == 0 or number == self._steps):
                # Summed anew, because a run that was resumed within the epoch has a running sum of other rounding.
                tracker.epoch_loss(math.fsum(self._losses) / len(self._losses), epoch, number)
        self._timesteps.add(record.step.timesteps)
        if number % PERIOD == 0 or number == self._steps:
            self._write_histogram(number)
        if self._progress is not None:
            parts = [f"epoch {epoch}/{self._epochs}", f"avr_loss={mean_loss:.4g}"]
            parts += [f"images/s={record.images_per_second:.3g}"]
            if self._next_save and number < self._steps:
                parts += [f"next save in {counted(self._next_save(number) - number, 'step')}"]
            self._progress.set_postfix_str(", ".join(parts), refresh=False)
            with suppress(OSError):  # the terminal may be a file on a full disk
                self._progress.update(number - self._progress.n)

    def _write_row(self, row: dict[str, object]) -> None:
        if self._metrics:
            self._metrics.write((json.dumps(_without_infinities(row)) + "\n").encode())

    def _write_histogram(self, step: int) -> None:
        """Writes the timesteps drawn since the last histogram, in a window that also ends at each save.

        A run that resumes from a save then writes the histograms of an uninterrupted run.
        """
        if (counts := self._timesteps.take()) is not None:
            for tracker in self._trackers:
                tracker.histogram("timesteps", counts, EDGES, step)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory in use since the start: of the GPU, or of this process if the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return host.peak_memory_bytes()


def _without_infinities(value: object) -> object:
    """Replaces infinities and NaN by null, because JSON has no words for them."""
    if isinstance(value, dict):
        return {name: _without_infinities(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"the folder cannot be created ({error.strerror}): choose another one"
        raise UserError(Problem(message, key="logging_dir", value=str(directory))) from error
