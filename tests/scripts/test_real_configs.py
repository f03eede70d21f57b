"""Configs that people use for SDXL full fine-tuning load, and a slice of them trains the small model."""

import pytest

from scripts.real_configs import Config, command_line, expected_results, run, write_data
from sdxl_finetune.config import load_config, load_datasets
from sdxl_finetune.errors import UserError

CONFIGS = {config.number: config for config in expected_results()}
SLICE = ("06", "20", "28", "38", "50")
"""Cached text encoder outputs with previews; many typed options; fp16; a flow with options of a fork; metadata and a
first step given by the user."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real_configs") / "data"
    write_data(folder)
    return folder


@pytest.mark.parametrize("config", list(CONFIGS.values()), ids=str)
def test_each_config_loads_or_is_refused_with_the_expected_word(config: Config, data, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = command_line(config.number, data, tmp_path / config.number, 2)
    if config.trains or config.refused_for == "Prodigy":  # Prodigy's rates are refused when the optimizer is built
        loaded = load_config(arguments, program="sdxl-train")
        assert loaded is not None and load_datasets(loaded)
    else:
        with pytest.raises(UserError) as caught:
            load_config(arguments, program="sdxl-train")
        assert config.refused_for in str(caught.value)


@pytest.mark.parametrize("number", SLICE)
def test_a_slice_of_the_configs_trains(number: str, data, tmp_path) -> None:
    good, line = run(CONFIGS[number], data, tmp_path / number, steps=2)
    assert good, line
