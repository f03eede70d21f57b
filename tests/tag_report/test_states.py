"""The state of a tag follows from the stated bounds."""

from dataclasses import replace

import numpy as np
import pytest

from sdxl_finetune.config.tag_options import TagReportOptions
from sdxl_finetune.tag_report.results import share_error
from sdxl_finetune.tag_report.states import Figures, find_states

GOOD = Figures(
    images=16, exposures=1000, gain=0.1, gain_error=0.01, accuracy=0.9, accuracy_error=0.05, chance=0.25
)  # fmt: skip
OPTIONS = TagReportOptions()


def state(tag: Figures, options: TagReportOptions = OPTIONS) -> str:
    """The state of a tag beside four learned ones."""
    return find_states([GOOD, GOOD, tag, GOOD, GOOD], options)[2]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "learned"),
        ({"accuracy": 0.8}, "underfitted"),  # the bound is 0.25 + 0.75 x 0.75 = 0.8125
        ({"accuracy": 0.82}, "learned"),
        ({"gain": 0.04}, "underfitted"),  # half of what the best reach
        ({"gain": 0.06}, "learned"),
        ({"gain": -0.01}, "underfitted"),
        ({"accuracy": 0.5, "gain": 0.02, "exposures": 1001}, "contradictory"),
        ({"accuracy": 0.5, "exposures": 1001}, "unclear"),  # its gain says that the model uses it
        ({"accuracy": 0.5, "exposures": 1000}, "underfitted"),  # no tag is rarer
        ({"accuracy": 0.5, "exposures": 999}, "underfitted"),  # the median tag has 1,000
        ({"accuracy": 0.8, "gain": 0.04, "exposures": 1001}, "contradictory"),
        ({"accuracy": 0.87, "gain": 0.04, "exposures": 1001}, "underfitted"),  # within one standard error of the others
        ({"accuracy": 0.5, "exposures": None}, "underfitted"),
        ({"accuracy_error": 0.2}, "unclear"),
        ({"accuracy": 0.1, "accuracy_error": None}, "unclear"),
        ({"accuracy": 1.0, "chance": 1.0}, "learned"),  # a list of one tag: the gain alone decides
        ({"gain": 0.0, "accuracy": 1.0, "chance": 1.0}, "underfitted"),
    ],
)
def test_states_follow_the_bounds(changes: dict, expected: str) -> None:
    few = {"exposures": 100} if expected == "underfitted" and "exposures" not in changes else {}
    assert state(replace(GOOD, **few, **changes)) == expected


def test_bounds_are_options() -> None:
    tag = replace(GOOD, accuracy=0.7, exposures=400)
    assert state(tag) == "underfitted"
    assert state(tag, TagReportOptions(tag_report_learned_skill=0.6)) == "learned"
    often = replace(tag, exposures=1500, gain=0.02)
    assert state(often) == "contradictory"
    assert state(often, TagReportOptions(tag_report_contradictory_exposures=1.6)) == "underfitted"
    assert state(replace(GOOD, gain=0.06), TagReportOptions(tag_report_learned_gain=0.9)) == "underfitted"


def test_without_a_learned_tag_all_are_underfitted() -> None:
    weak = replace(GOOD, accuracy=0.3)
    assert find_states([weak, replace(weak, exposures=1)], OPTIONS) == ["underfitted", "underfitted"]
    assert find_states([], OPTIONS) == []


def test_the_error_of_a_share_is_near_the_binomial_one_and_never_0() -> None:
    shares = (np.arange(400) < 300).astype(float)
    assert share_error(shares) == pytest.approx(np.sqrt(0.75 * 0.25 / 400), rel=0.02)
    assert 0.08 < share_error(np.ones(8)) < 0.16
    assert share_error(np.ones(3)) > 0.15 > share_error(np.full(8, 0.5))
