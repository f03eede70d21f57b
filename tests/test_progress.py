"""Long work says how far it is, in the log if there is no terminal."""

import logging
import re
import time

import pytest

from sdxl_finetune import progress
from sdxl_finetune.progress import duration, track


def test_a_log_gets_a_line_in_each_period(monkeypatch, caplog) -> None:
    monkeypatch.setattr(progress, "PERIOD", 0.05)
    with caplog.at_level(logging.INFO), track("reading", 4_000, "images") as work:
        for _ in range(4):
            time.sleep(0.03)
            work.update(1_000)
    lines = [record.getMessage() for record in caplog.records]
    assert 1 <= len(lines) < 4
    assert all(re.fullmatch(r"reading: \d,000 of 4,000 images, [\d,]+ a second, 0:0\d left", line) for line in lines)


def test_quick_and_silent_work_writes_nothing(monkeypatch, caplog) -> None:
    with caplog.at_level(logging.INFO), track("reading", 10, "images") as work:
        work.update(10)
    monkeypatch.setattr(progress, "PERIOD", 0)
    with caplog.at_level(logging.INFO), track("reading", 10, "images", shown=False) as work:
        work.update(10)
    assert not caplog.records


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (42.4, "0:42"), (727, "12:07"), (11_100, "3:05:00")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
