"""Random sets of options train, or are refused with a reason. `scripts/option_sets.py` tries hundreds of them."""

import pytest

from scripts.option_sets import STEPS, draw_options, try_options, write_files
from sdxl_finetune.config import Config

SLICE = range(400, 420)
"""Sets that the script, which counts from 0, does not reach by default."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("option_sets")
    write_files(folder)
    return folder


@pytest.mark.parametrize("number", SLICE)
def test_a_random_set_of_options_trains_and_reloads_or_is_refused_with_a_reason(
    number: int, folder, monkeypatch
) -> None:
    monkeypatch.chdir(folder)
    result = try_options(number)
    assert result["result"] == "trained" or (result["result"] == "refused" and result["why"]), result


def test_the_sets_cover_the_schema() -> None:
    """Nearly every option is drawn, and a set is a function of its number."""
    sets = [draw_options(number) for number in range(320)]
    assert sets[7] == draw_options(7) and all(drawn["max_train_steps"] == STEPS for drawn in sets)
    drawn = {name for options in sets for name in options}
    assert len(drawn) > 0.75 * len(Config.model_fields)
