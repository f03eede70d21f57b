"""Going back in a run's log to a step at which something was saved, so that a resumed run reads as one uninterrupted.

At every save the sizes of the log's growing files are noted in `saves.jsonl`. To go on from that save is then to cut
the files off there, whatever the interrupted run had still written: nothing has to be searched or rewritten.
"""

import json
import os
from pathlib import Path

SAVES, METRICS = "saves.jsonl", "metrics.jsonl"


def note_save(directory: Path, step: int) -> None:
    """Notes that the log reached so far when the weights or the state of `step` were about to be saved; everything
    it says is then on the disk.
    """
    sizes = {}
    for path in [directory / METRICS, *_events(directory)]:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            sizes[str(path.relative_to(directory))] = os.fstat(file.fileno()).st_size
    with (directory / SAVES).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "sizes": sizes}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def go_back(directory: Path, step: int) -> bool:
    """Cuts the log back to what it was when `step` was saved; False if nothing of that step was saved with it.

    May be interrupted and done again.
    """
    sizes, end = None, 0
    try:
        with (directory / SAVES).open("rb") as file:
            for line in iter(file.readline, b""):
                if line.endswith(b"\n") and (save := json.loads(line))["step"] == step:
                    sizes, end = save["sizes"], file.tell()
    except (OSError, ValueError, KeyError):
        return False
    if sizes is None or any(not (directory / name).is_file() for name in sizes):
        return False
    for path in _events(directory):
        if str(path.relative_to(directory)) not in sizes:
            path.unlink()
    for name, size in sizes.items():
        os.truncate(directory / name, size)
    os.truncate(directory / SAVES, end)
    return True


def last_losses(directory: Path, count: int) -> list[float]:
    """The losses of the last `count` steps that metrics.jsonl holds."""
    path = directory / METRICS
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file.readlines()[-2 * count - 2 :]]  # at most one validation a step
    return [row["loss"] for row in rows if "loss" in row][-count:]


def _events(directory: Path) -> list[Path]:
    """TensorBoard's files."""
    return sorted(directory.rglob("events.out.tfevents.*"))
