"""Trackers show scalars and previews of a run: TensorBoard and Weights & Biases, behind the same methods.

`log_with` chooses the trackers. Without this option, a run with a `logging_dir` uses TensorBoard. As in sd-scripts,
`log_tracker_name` names the runs, and the file `log_tracker_config` holds a table of arguments for each tracker.
"""

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import toml
from jaxtyping import Float64, Int64
from PIL.Image import Image

from sdxl_finetune.config import LoggingOptions
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.output.log_file import LogFile, said_if_it_fails
from sdxl_finetune.printable import encodable

DEFAULT_NAME = "finetuning"
SETTINGS = {"log_dir", "comment", "purge_step", "max_queue", "flush_secs", "filename_suffix"}
"""Arguments of torch's SummaryWriter, which log_tracker_config may set."""
Counts: TypeAlias = Int64[np.ndarray, " n"]
"""Number of values in each bar of a histogram."""
Edges: TypeAlias = Float64[np.ndarray, " n+1"]
"""Edges of the bars."""


class Tracker(Protocol):
    """Shows one run. Steps count from the start of training."""

    def scalars(self, values: Mapping[str, float], step: int) -> None: ...

    def epoch_loss(self, loss: float, epoch: int, step: int) -> None: ...

    def histogram(self, tag: str, counts: Counts, edges: Edges, step: int) -> None: ...

    def image(self, tag: str, image: Image, prompt: str, step: int) -> None: ...

    def flush(self) -> None:
        """Writes everything so far to the files, if the tracker has files."""

    def close(self) -> None: ...


def build_trackers(
    options: LoggingOptions, directory: Path | None, done: int, options_to_show: Mapping[str, Any]
) -> list[Tracker]:
    """Starts the trackers that the options ask for. Raises UserError if one of them cannot start.

    `directory` is the run's log folder. `done` is the number of optimizer steps that a resumed run has made before.
    `options_to_show` is sent to the trackers if `log_config` is set.
    """
    chosen = options.log_with or ("tensorboard" if directory else None)
    if chosen in ("tensorboard", "all") and directory is None:
        raise UserError(Problem("TensorBoard needs logging_dir. Set it to a folder", key="log_with", value=chosen))
    arguments = _load_arguments(options)
    shown = options_to_show if options.log_config else {}
    trackers: list[Tracker] = []
    if chosen in ("wandb", "all"):
        trackers.append(WeightsAndBiases(options, directory, shown, arguments.get("wandb", {})))
    if chosen in ("tensorboard", "all") and directory:
        folder = directory / (options.log_tracker_name or DEFAULT_NAME)
        trackers.append(TensorBoard(folder, done, shown, arguments.get("tensorboard", {})))
    return trackers


def _load_arguments(options: LoggingOptions) -> dict[str, dict[str, Any]]:
    """Loads the arguments of each tracker from the file `log_tracker_config`. Raises UserError."""
    path = options.log_tracker_config
    if path is None:
        return {}
    try:
        arguments = toml.loads(path.read_text(encoding="utf-8"))
        if wrong := [name for name in ("tensorboard", "wandb") if not isinstance(arguments.get(name, {}), dict)]:
            raise ValueError(f"{wrong[0]} must be a table of arguments")
    except Exception as error:  # the parser, which is that of the reference, raises errors of any kind
        message = f"the file cannot be read: {error}"
        raise UserError(Problem(message, key="log_tracker_config", value=str(path))) from error
    return arguments


class TensorBoard:
    """Writes TensorBoard's event files.

    The summaries are those of torch's SummaryWriter. Its thread that writes them would end at the first error.
    """

    def __init__(self, folder: Path, done: int, options: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
        """`arguments` are those of SummaryWriter. `max_queue` has no effect, because nothing waits for a thread."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]
        from torch.utils.tensorboard import summary

        settings = {"flush_secs": 20, "purge_step": done + 1 if done else None, "filename_suffix": ""} | dict(arguments)
        if unknown := sorted(set(settings) - SETTINGS):
            message = f"tensorboard has no setting {unknown[0]}: choose from {', '.join(sorted(SETTINGS))}"
            raise UserError(Problem(message, key="log_tracker_config"))
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        name = f"events.out.tfevents.{seconds:010d}.{socket.gethostname()}.{os.getpid()}.{nanoseconds}"
        file = LogFile(folder / f"{name}{settings['filename_suffix']}", every=settings["flush_secs"])
        self._summary, self._event, self._records = summary, Event, RecordWriter(file)
        self._write(file_version="brain.Event:2")
        if purge := settings["purge_step"]:
            # A TensorBoard server may have read steps of an interrupted run that are repeated now. It removes them.
            self._write(step=purge, file_version="brain.Event:2")
            self._write(step=purge, session_log=SessionLog(status=SessionLog.START))
        if options and not done:
            self._write(summary=summary.text("config", encodable(f"```toml\n{toml.dumps(options)}\n```")))

    def _write(self, **values: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **values).SerializeToString())

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self._write(summary=self._summary.scalar(tag, value), step=step)

    def epoch_loss(self, loss: float, epoch: int, step: int) -> None:
        self._write(summary=self._summary.scalar("loss/epoch", loss), step=epoch)

    def histogram(self, tag: str, counts: Counts, edges: Edges, step: int) -> None:
        middles = (edges[:-1] + edges[1:]) / 2
        drawn = self._summary.histogram_raw(
            tag,
            min=edges[0],
            max=edges[-1],
            num=counts.sum(),
            sum=counts @ middles,
            sum_squares=counts @ middles**2,
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
        )
        self._write(summary=drawn, step=step)

    def image(self, tag: str, image: Image, prompt: str, step: int) -> None:
        self._write(summary=self._summary.image(tag, np.asarray(image), dataformats="HWC"), step=step)
        if prompt:
            self._write(summary=self._summary.text(f"{tag}/prompt", encodable(prompt)), step=step)

    def flush(self) -> None:
        self._records.flush()

    def close(self) -> None:
        self._records.close()


class WeightsAndBiases:
    """Sends a run to Weights & Biases, or stores it offline if wandb is set up so.

    The file `wandb_run` in the log folder holds the id of the run, so that a resumed run continues it.
    """

    def __init__(
        self, options: LoggingOptions, directory: Path | None, shown: Mapping[str, Any], arguments: Mapping[str, Any]
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            message = "wandb is not installed. Run: pip install wandb, or set log_with to tensorboard"
            raise UserError(Problem(message, key="log_with", value=options.log_with)) from error
        self._wandb = wandb
        if options.wandb_api_key:
            wandb.login(key=options.wandb_api_key)
        settings = {
            "project": options.log_tracker_name or DEFAULT_NAME,
            "name": options.wandb_run_name,
            "dir": str(directory) if directory else None,
            "config": dict(shown) or None,
        }
        id_file = directory / "wandb_run" if directory else None
        if id_file and id_file.is_file():
            settings |= {"id": id_file.read_text(encoding="utf-8"), "resume": "allow"}
        self._run = wandb.init(**(settings | dict(arguments)))
        if id_file:
            with said_if_it_fails(id_file):
                id_file.write_text(self._run.id, encoding="utf-8")

    def _send(self, values: Mapping[str, Any], step: int) -> None:
        with said_if_it_fails("the run at Weights & Biases"):
            self._run.log(dict(values), step=step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._send(values, step)

    def epoch_loss(self, loss: float, epoch: int, step: int) -> None:
        # wandb accepts no step before the newest, so the loss of an epoch stands at the epoch's last step.
        self._send({"loss/epoch": loss, "epoch": epoch}, step)

    def histogram(self, tag: str, counts: Counts, edges: Edges, step: int) -> None:
        self._send({tag: self._wandb.Histogram(np_histogram=(counts, edges))}, step)

    def image(self, tag: str, image: Image, prompt: str, step: int) -> None:
        with said_if_it_fails("a picture at Weights & Biases"):  # wandb writes pictures to files
            self._send({tag: self._wandb.Image(image, caption=encodable(prompt))}, step)

    def flush(self) -> None:
        """Does nothing: wandb sends its data by itself and cannot take steps back."""

    def close(self) -> None:
        with said_if_it_fails("the end of the run at Weights & Biases"):
            self._run.finish()
