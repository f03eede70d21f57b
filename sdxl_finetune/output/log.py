"""What a run leaves to read: TensorBoard, metrics.jsonl, the console log of each rank, config, versions, its end.

All of it lies in one run directory under logging_dir; without logging_dir a run shows progress and messages on the
console and leaves nothing, as in the reference. Tag names are the reference's: loss, lr/unet, loss/epoch, ... (read in
its sdxl_train.py). Scalars come from the device when they have arrived by themselves: nothing here makes the host
wait for a step that is still being computed.
"""

import json
import logging
import math
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Generic, TypeVar

import torch
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from sdxl_finetune.config import Config, to_toml
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.files import atomic_path
from sdxl_finetune.output.contact_sheet import contact_sheet
from sdxl_finetune.output.log_history import METRICS, go_back, last_losses, note_save
from sdxl_finetune.output.metadata import versions
from sdxl_finetune.output.trackers import build_trackers

logger = logging.getLogger(__name__)

T = TypeVar("T")


class NonFiniteLoss(ArithmeticError):
    """The loss of `step`, or its gradient's norm, is infinite or not a number: the weights are spoilt from there on."""

    def __init__(self, step: int, value: float, name: str = "loss") -> None:
        self.step = step
        super().__init__(f"the {name} of step {step} is {value}; nothing was saved after it")


class DelayedScalars(Generic[T]):
    """Scalars on their way from the device to the host, each set with the record that it belongs to.

    A set is copied to pinned memory as soon as the device gets there and handed out `delay` pushes later: the copy
    has then long been made, and waiting for its event only keeps the host from running further ahead. The lag is
    fixed, so that all ranks see a set at the same step. Scalars on the CPU are handed out at once.
    """

    def __init__(self, delay: int = 4) -> None:
        self.delay = delay
        self._queue: deque[tuple[T, list[str], Tensor, torch.cuda.Event | None]] = deque()

    def push(self, record: T, scalars: Mapping[str, Tensor]) -> list[tuple[T, dict[str, float]]]:
        """Takes one set (tensors of one element, on one device); returns those that have arrived, oldest first."""
        values = torch.stack([scalar.detach().float().reshape(()) for scalar in scalars.values()])
        event = None
        if values.is_cuda:
            pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = pinned.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._queue.append((record, list(scalars), values, event))
        return self._take(left=self.delay if event else 0)

    def flush(self) -> list[tuple[T, dict[str, float]]]:
        """Waits for all that is on its way."""
        return self._take(left=0)

    def _take(self, left: int) -> list[tuple[T, dict[str, float]]]:
        taken = []
        while len(self._queue) > left:
            record, names, values, event = self._queue.popleft()
            if event is not None:
                event.synchronize()
            taken.append((record, dict(zip(names, values.tolist(), strict=True))))
        return taken


@dataclass(frozen=True, kw_only=True)
class _Step:
    """What the host knows of an optimizer step when it has been asked for."""

    step: int
    epoch: int
    lr: Mapping[str, float]
    images_per_second: float
    data_wait_seconds: float
    peak_memory_bytes: int


def run_directory(config: Config, now: datetime, *, resumed: tuple[str, int] | None = None) -> Path | None:
    """Where a run writes: `logging_dir/{log_prefix}{timestamp}`; or, for one `resumed` from a save, the folder of that
    name, cut back to that step, if it is there and knows of the save. One rank decides and tells the others.
    """
    if config.logging_dir is None:
        return None
    if resumed:
        name, step = resumed
        if go_back(config.logging_dir / name, step):
            return config.logging_dir / name
        logger.warning("%s holds no log of the run up to step %d; a new one begins", config.logging_dir / name, step)
    return config.logging_dir / f"{config.log_prefix or ''}{now:%Y%m%d%H%M%S}"


class _Console(logging.Handler):
    """Messages on stderr, above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


@contextmanager
def console(config: Config, rank: int) -> Iterator[None]:
    """Within it, messages go to the terminal, or to console_log_file. Of ranks other than the first only warnings
    do, with the rank before them.
    """
    if config.console_log_file:
        config.console_log_file.parent.mkdir(parents=True, exist_ok=True)
        handler: logging.Handler = logging.FileHandler(config.console_log_file, encoding="utf-8")
    else:
        handler = _Console()
    level = logging.getLevelName(config.console_log_level or "INFO")
    where = f"[rank {rank}] " if rank else ""
    layout = "%(message)s" if config.console_log_simple else "%(asctime)s %(levelname)-7s %(message)s"
    handler.setFormatter(logging.Formatter(where + layout, datefmt="%Y-%m-%d %H:%M:%S"))
    handler.setLevel(max(level, logging.WARNING) if rank else level)
    root = logging.getLogger()
    previous = root.level
    root.setLevel(level)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(previous)
        handler.close()


class Log:
    """The log of one rank of one run, from start to end; only the first rank writes scalars and pictures.

    With `with`, the reason for the end is what left the block: nothing, or the exception.
    """

    def __init__(self, config: Config, directory: Path | None, *, rank: int, done: int = 0) -> None:
        """`done` steps were made before, by the run that this one goes on from."""
        self._directory = directory
        self._rank = rank
        self._delayed: DelayedScalars[_Step] = DelayedScalars()
        self._stops: DelayedScalars[None] = DelayedScalars(delay=1)
        self._scaled = config.mixed_precision == "fp16"  # a scaler makes gradients overflow, and skips those steps
        self._losses: deque[float] = deque()
        self._loss_sum = 0.0
        self._last_step = self._done = done
        self._steps = self._steps_per_epoch = 1
        self._first_epoch_at, self._epochs = 0, 1
        self._next_save: Callable[[int], int] | None = None
        self.stop_seen = False
        """Whether a step has arrived in which some rank was asked to stop: all ranks see it at the same step."""
        self._progress: tqdm | None = None
        self._since = time.perf_counter()
        self._file = self._metrics = None
        self._closed = False
        if directory:
            _make_directory(directory)
        self._trackers = build_trackers(config, directory, done) if rank == 0 else []
        if directory:
            self._file = logging.FileHandler(directory / f"console_rank{rank}.log", encoding="utf-8")
            self._file.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
            logging.getLogger().addHandler(self._file)
        if directory and rank == 0:
            _write(directory / "config.toml", to_toml(config))
            _write(directory / "versions.json", json.dumps(versions(), indent=2) + "\n")
            (directory / "ended.json").unlink(missing_ok=True)
            self._metrics = (directory / METRICS).open("a", buffering=1, encoding="utf-8")

    def __enter__(self) -> "Log":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("finished" if error is None else f"{type(error).__name__}: {error}")

    @property
    def name(self) -> str | None:
        """Of the run's folder in logging_dir."""
        return self._directory.name if self._directory else None

    def begin(
        self,
        *,
        steps: int,
        steps_per_epoch: int,
        first_epoch_at: int = 0,
        epochs: int = 1,
        next_save: Callable[[int], int] | None = None,
    ) -> None:
        """Training starts now, and ends when the run has made `steps` optimizer steps, in its epoch `epochs`. Epochs
        are counted off from the step `first_epoch_at`; `next_save` says after which step there is something to save.
        """
        self._steps, self._steps_per_epoch, self._first_epoch_at = steps, steps_per_epoch, first_epoch_at
        self._epochs, self._next_save = epochs, next_save
        past = last_losses(self._directory, steps_per_epoch) if self._directory and self._done else ()
        self._losses, self._loss_sum = deque(past, maxlen=steps_per_epoch), math.fsum(past)
        if self._rank == 0:
            # A terminal is redrawn, a file grows by each line.
            interval = 0.2 if sys.stderr.isatty() else 30.0
            self._progress = tqdm(
                total=steps, initial=self._done, desc="steps", smoothing=0.05, mininterval=interval, maxinterval=60
            )
        self._since = time.perf_counter()

    def step(
        self,
        *,
        step: int,
        epoch: int,
        loss: Tensor,
        grad_norm: Tensor | None,
        lr: Mapping[str, float],
        images: int,
        data_wait_seconds: float,
        stop: Tensor | None = None,
        measured: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Records an optimizer step that has been asked of the device. `step` and `epoch` count from 1; `lr` is by
        the reference's name of the part ("unet", "text_encoder1", ...); `images` over all ranks; `stop` is positive
        if a rank was asked to stop; `measured` is whatever else, left out where it is not a number. Raises
        NonFiniteLoss for this step or, on a GPU, an earlier one.
        """
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        record = _Step(
            step=step,
            epoch=epoch,
            lr=dict(lr),
            images_per_second=images / max(seconds, 1e-9),
            data_wait_seconds=data_wait_seconds,
            peak_memory_bytes=peak_memory_bytes(loss.device),
        )
        for _, arrived in self._stops.push(None, {"stop": stop}) if stop is not None else ():
            self.stop_seen |= arrived["stop"] > 0
        scalars = {"loss": loss, "grad_norm": grad_norm, **(measured or {})}
        given = {name: scalar for name, scalar in scalars.items() if scalar is not None}
        self._read(self._delayed.push(record, given))

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What is done within it (saving, previews) does not count as time of a step."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - started

    def flush(self) -> None:
        """Waits for every step that was recorded, so that nothing is saved on top of a loss that nobody has seen.
        Raises NonFiniteLoss.
        """
        self._read(self._delayed.flush())

    def note_save(self, step: int) -> None:
        """The weights or the state of `step` are about to be saved: a run that goes on from them will cut the log
        off here. Raises NonFiniteLoss.
        """
        self.flush()
        for tracker in self._trackers:
            tracker.flush()
        if self._metrics and self._directory:
            note_save(self._directory, step)

    def previews(self, drawn: Sequence[tuple[int, Image, str]], step: int) -> None:
        """Shows the previews of prompts by their place in the prompt file, drawn after `step` steps: each on its own,
        and all on one sheet.
        """
        self.flush()
        if not self._trackers:
            return
        sheet = contact_sheet([image for _, image, _ in drawn], [prompt for *_, prompt in drawn], across=4)
        for tracker in self._trackers:
            for index, image, prompt in drawn:
                tracker.image(f"sample_{index}", image, prompt, step)
            tracker.image("previews", sheet, "", step)

    def validation(self, losses: Mapping[str, float], *, step: int, epoch: int) -> None:
        """The losses of a validation after `step` steps, the last in `epoch` (0: none yet), by what they are of."""
        logger.info("validation after step %d: loss %.5g", step, losses["loss"])
        if self._metrics:
            row = {"step": step, "epoch": epoch, "validation": _without_infinities(dict(losses))}
            self._metrics.write(json.dumps(row) + "\n")
        for tracker in self._trackers:
            tracker.scalars({f"validation/{name}": loss for name, loss in losses.items()}, step)

    def close(self, reason: str) -> None:
        """Writes what is still to be written and why the run ended; does nothing the second time."""
        if self._closed:
            return
        self._closed = True
        with suppress(NonFiniteLoss, RuntimeError):  # the reason is known already, and a lost device says no more
            self.flush()
        if self._progress is not None:
            self._progress.close()
        for tracker in self._trackers:
            tracker.close()
        if self._metrics and self._directory:
            self._metrics.close()
            ended = {"reason": reason, "step": self._last_step, "time": datetime.now().astimezone().isoformat()}
            _write(self._directory / "ended.json", json.dumps(ended, indent=2) + "\n")
        if self._file:
            logging.getLogger().removeHandler(self._file)
            self._file.close()

    def _read(self, arrived: list[tuple[_Step, dict[str, float]]]) -> None:
        for record, scalars in arrived:
            self._last_step = record.step
            scalars = {name: value for name, value in scalars.items() if "/" not in name or not math.isnan(value)}
            average = self._average(scalars["loss"])
            if self._rank == 0:
                self._write_step(record, scalars, average)
            if not math.isfinite(scalars["loss"]):
                raise NonFiniteLoss(record.step, scalars["loss"])
            if not (self._scaled or math.isfinite(scalars.get("grad_norm", 0.0))):
                raise NonFiniteLoss(record.step, scalars["grad_norm"], "gradient's norm")

    def _average(self, loss: float) -> float:
        """The mean of the last epoch's worth of losses: the reference's avr_loss and loss/epoch."""
        if len(self._losses) == self._losses.maxlen:
            self._loss_sum -= self._losses[0]
        self._losses.append(loss)
        self._loss_sum += loss
        return self._loss_sum / len(self._losses)

    def _write_step(self, record: _Step, scalars: Mapping[str, float], average: float) -> None:
        speed = {
            "images_per_second": record.images_per_second,
            "data_wait_seconds": record.data_wait_seconds,
            "peak_memory_bytes": record.peak_memory_bytes,
        }
        if self._metrics:
            row = {"step": record.step, "epoch": record.epoch, **scalars, "lr": record.lr, **speed}
            self._metrics.write(json.dumps(_without_infinities(row)) + "\n")
        rates = {f"lr/{part}": rate for part, rate in record.lr.items()}
        for tracker in self._trackers:
            tracker.scalars({**scalars, **rates, **speed}, record.step)
            if (record.step - self._first_epoch_at) % self._steps_per_epoch == 0 or record.step == self._steps:
                # Summed anew: a run that was resumed in the epoch has added up other sums.
                tracker.epoch_loss(math.fsum(self._losses) / len(self._losses), record.epoch, record.step)
        if self._progress is not None:
            parts = [f"epoch {record.epoch}/{self._epochs}", f"avr_loss={average:.4g}"]
            parts += [f"images/s={record.images_per_second:.3g}"]
            if self._next_save and record.step < self._steps:
                parts += [f"next save in {self._next_save(record.step) - record.step} steps"]
            self._progress.set_postfix_str(", ".join(parts), refresh=False)
            self._progress.update(record.step - self._progress.n)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory in use since the start: of `device`, or of this process when that is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _without_infinities(row: dict[str, object]) -> dict[str, object]:
    """JSON has no words for infinite and not a number: null."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"cannot be made: {error.strerror}"
        raise UserError(Problem(message, key="logging_dir", value=str(directory))) from error


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
