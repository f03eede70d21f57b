"""Tries to make runs lose work or take in bad files, and counts how often they do.

    python -m scripts.benchmarks.torture KIND [--trials N] [--seed 0] [--folder build/torture] [--write]

A trial is a function of the seed and its number. Finished trials are kept in the folder, and a second call goes on
after them. `--write` puts the figures into docs/reliability.md. The exit status is 1 if a trial failed.
"""

import argparse
import importlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
KINDS = {
    "kills": 200,
    "kills_of_ranks": 50,
    "faults": 50,
    "mutations": 2000,
    "soak": 1,
}
"""Number of trials of each kind. The module torture_KIND.py makes them."""


@dataclass(frozen=True)
class Trial:
    """A disturbance and its outcome."""

    number: int
    what: str
    """The disturbance, in a few words. Trials with the same words are counted together."""
    failure: str | None
    """The fault that was found; None if all was as it must be."""
    seconds: float = 0.0


class Kind(Protocol):
    """A module with trials of one kind."""

    def try_once(self, number: int, seed: int, folder: Path) -> Trial:
        """Makes a trial. `folder` is kept from one trial to the next, so that runs can share what they need."""
        ...

    def figures(self, trials: Sequence[Trial]) -> str:
        """The figures of these trials in Markdown."""
        ...


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--trials", type=int, help="number of trials")
    parser.add_argument("--seed", type=int, default=0, help="seed of all trials (0)")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "torture", help="folder of all trials")
    parser.add_argument("--write", action="store_true", help="write the figures into docs/reliability.md")
    arguments = parser.parse_args()
    kind: Kind = importlib.import_module(f"scripts.benchmarks.torture_{arguments.kind}")  # type: ignore[assignment]
    folder = arguments.folder.resolve() / f"{arguments.kind}-{arguments.seed}"
    trials = make_trials(kind, arguments.trials or KINDS[arguments.kind], arguments.seed, folder)
    text = kind.figures(trials)
    print(text)
    if arguments.write:
        PAGE.write_text(with_figures(PAGE.read_text(encoding="utf-8"), arguments.kind, text), encoding="utf-8")
    return 1 if any(trial.failure for trial in trials) else 0


def make_trials(kind: Kind, count: int, seed: int, folder: Path) -> list[Trial]:
    """Makes the trials that `folder` does not hold yet, and returns all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "trials.jsonl"
    trials = [Trial(**json.loads(line)) for line in kept.read_text().splitlines()] if kept.exists() else []
    for number in range(len(trials), count):
        began = time.monotonic()
        trial = kind.try_once(number, seed, folder)
        trial = Trial(number, trial.what, trial.failure, round(time.monotonic() - began, 2))
        trials.append(trial)
        with kept.open("a") as file:
            file.write(json.dumps(asdict(trial)) + "\n")
        print(f"{number + 1} of {count}: {trial.what}: {trial.failure or 'as it must be'}", flush=True)
    return trials[:count]


def with_figures(page: str, kind: str, text: str) -> str:
    """The page with these figures between the marks of the kind."""
    begin, end = f"<!-- {kind} -->", f"<!-- end of {kind} -->"
    before, _, rest = page.partition(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}"


if __name__ == "__main__":
    sys.exit(main())
