"""The folder of a run's log, and how it is cut back to the step that a run resumes from.

At every save, the file `saves.jsonl` gets a line with the sizes of the log's growing files. A resumed run cuts the
files off at these sizes. This removes everything that the interrupted run wrote after the save.
"""

import contextlib
import errno
import itertools
import json
import logging
import os
import shutil
from datetime import datetime
from pathlib import Path

from sdxl_finetune.config import LoggingOptions
from sdxl_finetune.files import atomic_path
from sdxl_finetune.parsing import parse_json
from sdxl_finetune.runtime.locks import holder

logger = logging.getLogger(__name__)

SAVES, METRICS, LOCK = "saves.jsonl", "metrics.jsonl", ".lock"


def run_directory(
    config: LoggingOptions, now: datetime, *, resumed: tuple[str, int] | None = None, is_own: bool = True
) -> Path | None:
    """The directory of a run's log: `logging_dir/{log_prefix}{timestamp}`; None without `logging_dir`.

    `resumed` is the name of an old log folder, and the step from which the run resumes. If this folder has a record of
    the save, the run continues in it, and the log is cut back to that step. Only one rank calls this function.

    A log belongs to another run if that run still writes it, or if `is_own` is False. It then stays as it is, and this
    run continues in a copy. Runs that start in the same second get folders of their own.
    """
    if config.logging_dir is None:
        return None
    new = config.logging_dir / f"{config.log_prefix or ''}{now:%Y%m%d%H%M%S}"
    if resumed is None:
        return _new_directory(new)
    name, step = resumed
    old = config.logging_dir / name
    other = holder(old / LOCK) or ("" if is_own else "another run")
    if other and (copy := _copied(old, _new_directory(new), step)):
        logger.warning("%s is the log of %s, and stays as it is: this run continues in a copy, %s", old, other, copy)
        return copy
    if not other and go_back(old, step):
        return old
    logger.warning("%s has no log of the run up to step %d that can be used; a new log is started", old, step)
    return _new_directory(new)


def _copied(old: Path, new: Path, step: int) -> Path | None:
    """Copies the growing files of a log to a new, empty folder, cut back to `step`. None if that cannot be done."""
    try:
        if any(new.iterdir()):
            return None
        with atomic_path(new) as temporary:
            for path in [old / METRICS, old / SAVES, *_event_files(old)]:
                target = temporary / path.relative_to(old)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
            if not go_back(temporary, step):
                raise FileNotFoundError(errno.ENOENT, f"it has no record of step {step}")
    except OSError as error:
        logger.warning("%s is the log of another run and cannot be copied (%s)", old, error.strerror)
        with contextlib.suppress(OSError):  # it has files of another run
            new.rmdir()
        return None
    return new


def _new_directory(path: Path) -> Path:
    """Makes a folder of this name, or with a number after the name if there is one, and returns its path."""
    for number in itertools.count(1):
        new = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            new.mkdir(parents=True)
        except FileExistsError:
            if new.is_dir():
                continue
        except OSError:  # Log names what is wrong
            break
        return new
    return path


def note_save(directory: Path, step: int) -> None:
    """Records the sizes of the log's files before a checkpoint or a training state of `step` is saved.

    Everything in the log is flushed to the disk first.
    """
    sizes = {}
    for path in [directory / METRICS, *_event_files(directory)]:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            sizes[str(path.relative_to(directory))] = os.fstat(file.fileno()).st_size
    with (directory / SAVES).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "sizes": sizes}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def go_back(directory: Path, step: int) -> bool:
    """Cuts the log back to its content when `step` was saved. Returns False without a record of this save.

    Returns False too if storage refuses to cut the files.

    The function may be interrupted and called again.
    """
    noted, end = None, 0
    try:
        with (directory / SAVES).open("rb") as file:
            for line in iter(file.readline, b""):
                if line.endswith(b"\n") and (save := parse_json(line))["step"] == step:
                    noted, end = save["sizes"], file.tell()
    except (OSError, ValueError, KeyError, TypeError):
        return False
    sizes = _sizes_to_cut(directory, noted)
    if sizes is None:
        return False
    try:
        for path in _event_files(directory):
            if str(path.relative_to(directory)) not in sizes:
                path.unlink()
        for name, size in sizes.items():
            os.truncate(directory / name, size)
        os.truncate(directory / SAVES, end)
    except OSError as error:
        logger.warning("%s cannot be cut back (%s)", directory, error.strerror)
        return False
    return True


def _sizes_to_cut(directory: Path, noted: object) -> dict[str, int] | None:
    """The sizes that the record of a save notes; None if one of the log's files is shorter.

    The record may be damaged. Only files of the log are cut, wherever the names in the record point.
    """
    lengths = {str(path.relative_to(directory)): path.stat().st_size for path in _event_files(directory)}
    if (metrics := directory / METRICS).is_file():
        lengths[METRICS] = metrics.stat().st_size
    if not isinstance(noted, dict):
        return None
    fits = all(type(size) is int and 0 <= size <= lengths.get(name, -1) for name, size in noted.items())
    return dict(noted) if fits else None


def last_losses(directory: Path, count: int) -> list[float]:
    """Returns the losses of the last `count` steps in metrics.jsonl; none if the file cannot be read.

    Damaged lines are left out.
    """
    path, losses = directory / METRICS, []
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        logger.warning("%s cannot be read (%s): its losses are missing in the mean loss", path, error.strerror)
        return []
    # Besides its own line, a step has at most one line each of validation, tags, colours and loss weights.
    for line in lines[-5 * count - 5 :]:
        with contextlib.suppress(ValueError):
            row = parse_json(line)
            if isinstance(row, dict) and isinstance(row.get("loss"), int | float):
                losses.append(float(row["loss"]))
    return losses[-count:]


def _event_files(directory: Path) -> list[Path]:
    return sorted(directory.rglob("events.out.tfevents.*"))
