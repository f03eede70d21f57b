"""Where scalars and previews are shown: TensorBoard and Weights & Biases, behind the same methods.

Which of them: log_with; without it TensorBoard, when there is a logging_dir. Runs are named after log_tracker_name
("finetuning" by default), and log_tracker_config holds arguments for the trackers, one table each, as in the
reference.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import toml
from PIL.Image import Image

from sdxl_finetune.config import Config, LoggingOptions
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.output.metadata import shareable

DEFAULT_NAME = "finetuning"


class Tracker(Protocol):
    """One place to show a run. Steps count from the start of training."""

    def scalars(self, values: Mapping[str, float], step: int) -> None: ...

    def epoch_loss(self, loss: float, epoch: int, step: int) -> None: ...

    def image(self, tag: str, image: Image, prompt: str, step: int) -> None: ...

    def flush(self) -> None:
        """Everything shown so far is in the files, as far as there are any."""

    def close(self) -> None: ...


def build_trackers(config: Config, directory: Path | None, done: int = 0) -> list[Tracker]:
    """The trackers that the config asks for; UserError if one cannot start. The run goes on after `done` steps."""
    chosen = config.log_with or ("tensorboard" if directory else None)
    if chosen in ("tensorboard", "all") and directory is None:
        raise UserError(Problem("TensorBoard needs logging_dir", key="log_with", value=chosen))
    arguments = _tracker_arguments(config)
    trackers: list[Tracker] = []
    if chosen in ("wandb", "all"):
        trackers.append(WeightsAndBiases(config, directory, arguments.get("wandb", {})))
    if chosen in ("tensorboard", "all") and directory:
        trackers.append(TensorBoard(config, directory, arguments.get("tensorboard", {}), done))
    return trackers


def _tracker_arguments(config: LoggingOptions) -> dict[str, dict[str, Any]]:
    if config.log_tracker_config is None:
        return {}
    try:
        return toml.loads(config.log_tracker_config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            Problem(f"cannot be read: {error}", key="log_tracker_config", value=str(config.log_tracker_config))
        ) from error


class TensorBoard:
    """Event files in a folder of the run directory."""

    def __init__(self, config: Config, directory: Path, arguments: Mapping[str, Any], done: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = directory / (config.log_tracker_name or DEFAULT_NAME)
        # The purge is for a TensorBoard that has read what the interrupted run wrote after its last save.
        settings = {"flush_secs": 20, "purge_step": done + 1 if done else None} | dict(arguments)
        self._writer: Any = SummaryWriter(str(folder), **settings)
        if config.log_config and not done:
            self._writer.add_text("config", f"```toml\n{toml.dumps(shareable(config))}\n```")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def epoch_loss(self, loss: float, epoch: int, step: int) -> None:
        self._writer.add_scalar("loss/epoch", loss, epoch)

    def image(self, tag: str, image: Image, prompt: str, step: int) -> None:
        self._writer.add_image(tag, np.asarray(image), step, dataformats="HWC")
        if prompt:
            self._writer.add_text(f"{tag}/prompt", prompt, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run at wandb.ai (or offline, as wandb itself is told)."""

    def __init__(self, config: Config, directory: Path | None, arguments: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            remedy = "wandb is not installed; pip install wandb, or take tensorboard"
            raise UserError(Problem(remedy, key="log_with", value=config.log_with)) from error
        self._wandb = wandb
        if config.wandb_api_key:
            wandb.login(key=config.wandb_api_key)
        settings = {
            "project": config.log_tracker_name or DEFAULT_NAME,
            "name": config.wandb_run_name,
            "dir": str(directory) if directory else None,
            "config": shareable(config) if config.log_config else None,
        }
        known = directory / "wandb_run" if directory else None
        if known and known.is_file():
            settings |= {"id": known.read_text(encoding="utf-8"), "resume": "allow"}
        self._run = wandb.init(**(settings | dict(arguments)))
        if known:
            known.write_text(self._run.id, encoding="utf-8")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def epoch_loss(self, loss: float, epoch: int, step: int) -> None:
        # Its steps may not go back, so that an epoch's loss stands at the epoch's last step.
        self._run.log({"loss/epoch": loss, "epoch": epoch}, step=step)

    def image(self, tag: str, image: Image, prompt: str, step: int) -> None:
        self._run.log({tag: self._wandb.Image(image, caption=prompt)}, step=step)

    def flush(self) -> None:
        """Its steps cannot be taken back, so there is nothing to keep them apart for."""

    def close(self) -> None:
        self._run.finish()
