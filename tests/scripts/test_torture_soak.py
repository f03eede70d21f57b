"""The soak: a short run of it, and growth that it must notice."""

import numpy as np
import pytest

from scripts.benchmarks.torture_soak import Sample, figures, grown, slope, try_once


def samples(memory: float = 0.0, files: float = 0.0, hours: float = 2.0) -> list[Sample]:
    """Measurements of two hours that grow by so much in an hour, with the noise of an allocator."""
    rng = np.random.default_rng(1)
    return [
        Sample(
            seconds=seconds,
            memory=900 + memory * seconds / 3600 + rng.normal(0, 5),
            files=int(40 + files * seconds / 3600),
            workers_memory=400.0,
            step=int(seconds),
        )
        for seconds in np.arange(0, 3600 * hours, 5.0).tolist()
    ]


def test_a_leak_is_noticed_and_noise_is_not() -> None:
    assert grown(samples()) == []
    assert slope(samples(memory=50), "memory") == pytest.approx(50, abs=1)
    assert [text.split()[0] for text in grown(samples(memory=50))] == ["memory"]
    assert [text.split()[0] for text in grown(samples(files=3))] == ["files"]
    assert grown(samples()[:2]) == ["too few measurements"]


def test_a_short_soak_trains_previews_validates_and_saves(tmp_path, monkeypatch) -> None:
    """Memory is not judged, because half a minute is all warm-up. Open files are."""
    monkeypatch.setenv("SOAK_MINUTES", "0.5")
    trial = try_once(0, 0, tmp_path)
    faults = [fault for fault in (trial.failure or "").split("; ") if fault and "memory grew" not in fault]
    assert [fault for fault in faults if not fault.startswith("no ")] == [], trial
    assert "open files" in trial.what and trial.what in figures([trial])
    assert (tmp_path / "run-0" / "samples.jsonl").exists()
