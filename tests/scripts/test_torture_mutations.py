"""Damaged files of every kind end a program with a message: a small part of the trials, the same in every run."""

import random
from pathlib import Path, PurePath

import pytest

from scripts.benchmarks.torture import Trial
from scripts.benchmarks.torture_damage import CANARY, INNER, damaged
from scripts.benchmarks.torture_mutations import READERS, Ended, fault, figures, try_once
from scripts.benchmarks.torture_world import fresh_copy, run_program

TRIALS = 30
"""Some seconds of work, beside those in which the user's folder is made."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mutations")
    fresh_copy(folder)
    return folder


def test_damaged_files_end_programs_with_a_message(folder: Path) -> None:
    trials = [try_once(number, 7, folder) for number in range(TRIALS)]
    assert [trial.failure for trial in trials if trial.failure] == []
    assert len({trial.what for trial in trials}) > TRIALS / 2
    assert f"{TRIALS} files, 0 faults." in figures(trials)


def test_every_kind_has_files_and_each_damage_is_a_function_of_the_seed(folder: Path) -> None:
    trial = fresh_copy(folder)
    for reader in READERS:
        paths = sorted(trial.glob(reader.pattern))
        assert paths, reader.name
        small = [path for path in paths if path.stat().st_size < 100_000]
        for path in small[:1]:
            first, second = (damaged(path, path.read_bytes(), random.Random(f"{reader.name} 1")) for _ in range(2))
            assert first == second
    assert {".safetensors", ".tar", ".toml", ".png", ".parquet", ".pt"} <= INNER.keys()


def test_a_program_that_fails_is_a_fault() -> None:
    def ended(**values: object) -> str | None:
        return fault(Ended(**{"status": 2, "text": "error: a.png: no such file", "seconds": 1.0, "bytes": 0, **values}))

    assert ended() is None and ended(status=0, text="") is None
    assert ended(status=1, text="error: the loss of step 1 is nan") is None
    assert "without a message" in str(ended(status=1, text="killed")) and "status -9" in str(ended(status=-9))
    assert "without a message" in str(ended(text="usage"))
    assert "traceback" in str(ended(text="Traceback (most recent call last):\nerror: x"))
    assert "took 11 s" in str(ended(seconds=11.0)) and "2048 MiB" in str(ended(bytes=2 << 30))
    assert figures([Trial(0, "image: cut", "took 11 s", 1.0)]).endswith("| image | 1 | 1 |")


def test_code_in_a_pickle_would_be_seen(folder: Path) -> None:
    """The pickle of the trials makes its file if a loader runs code. sdxl-model info refuses it, and makes none."""
    trial = fresh_copy(folder)
    seeds = range(100)
    what, content = next(
        found for seed in seeds if "runs code" in (found := damaged(PurePath("a.ckpt"), b"", random.Random(seed)))[0]
    )
    (trial / "a.ckpt").write_bytes(content)
    ended = run_program("sdxl-model", ["info", "a.ckpt"], trial)
    assert ended.status == 2 and "could run any code" in ended.text and not (trial / CANARY).exists(), what
