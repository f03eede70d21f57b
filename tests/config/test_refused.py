"""A refused value is named with the reason and with what the option takes."""

import json
import re
from pathlib import Path

import pytest

from sdxl_finetune.config import Config, load_config, load_datasets
from sdxl_finetune.errors import UserError


def problems(*arguments: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_config(arguments, program="sdxl-train")
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("quality_tags", "best > 0.7, good, bad", "'good' has no condition, and only the last tag can do without one"),
        ("quality_tags", "best > 0,7, bad", "'7' has no condition, .*: a decimal number has a point"),
        ("quality_tags", "best > 0.5, good > 0.7", "bounds must fall, and 0.7 comes after 0.5"),
        ("quality_tags", "best top 30%, good top 10%", "shares must rise, and 10% comes after 30%"),
        ("quality_tags", "best > high, bad", "the bound high is no finite number"),
        ("quality_tags", "best top 300%, bad", "the share 300% is not above 0 and at most 100 percent"),
        ("quality_tags", "best > 0.7, Best", "a tag is named twice"),
        ("quality_tags", "best < 0.7, bad", "'best < 0.7' cannot be read"),
        ("caption_sources", ".json:0.5", "'.json' needs a key, as .json#caption"),
        ("caption_sources", ".txt#tags", "'.txt#tags' has a key, and only .json files have keys"),
        ("caption_sources", "tags:much", "'much' of 'tags:much' is no weight"),
        ("caption_sources", "tags:0", "the weight of 'tags' is not above 0"),
        ("caption_sources", "tags:1:wide", "'tags:1:wide' has more than a name, a weight and the word whole"),
        ("caption_sources", "tags, tags:2", "tags is named twice"),
        ("caption_sources", "./a/b.txt", "'./a/b.txt' is a path, and a file beside the image is named by its ending"),
        ("metadata_columns", "pth=key", "'pth' is none of the names before the equals sign"),
        ("metadata_columns", "path=", "path has no name after it"),
        ("metadata_columns", "path=a, path=b", "one of them is given twice"),
        ("optimizer_args", "fused", "'fused' is not name=value"),
        ("optimizer_args", "betas=low", "'low' is no number, and text needs quotes"),
    ],
)
def test_a_refused_value_is_named_with_the_reason_and_with_what_the_option_takes(
    tmp_path, monkeypatch, option, value, reason
):
    monkeypatch.chdir(tmp_path)
    Path("c.toml").write_text(f"{option} = {json.dumps(value)}\n")
    (message,) = [text for text in problems("--config", "c.toml") if text.startswith(f"c.toml:1: {option}")]
    assert re.search(rf"c\.toml:1: {option} = '.*': {reason}: must be \w", message)


def test_keys_of_a_dataset_file_are_refused_with_the_reason_too(tmp_path):
    subset = f'[[datasets.subsets]]\nimage_dir = "{tmp_path}"\nquality_tags = "a > 1, b > 2"\n'
    text = f"[[datasets]]\nresolution = 64\n{subset}"
    (tmp_path / "d.toml").write_text(text)
    config = Config(dataset_config=tmp_path / "d.toml", output_dir=tmp_path)
    with pytest.raises(UserError, match=r"quality_tags = .*: bounds must fall, and 2 comes after 1: must be different"):
        load_datasets(config)


def test_a_password_in_an_address_is_not_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.toml").write_text('cache_dir = "s3://me:hidden@bucket/x"\n')
    (message,) = [text for text in problems("--config", "c.toml") if "cache_dir" in text]
    assert "hidden" not in message and "s3://***@bucket/x" in message and "no user name, password" in message


def test_integers_fit_into_32_bits_but_for_seeds(tmp_path, monkeypatch) -> None:
    """Counts and sizes are kept in arrays of 32 bits, whose libraries know no clear message."""
    monkeypatch.chdir(tmp_path)
    size, large = 2**31, 2**62
    Path("c.toml").write_text(f"dataset_repeats = {size}\nseed = {large}\nresolution = [{size}, 64]\n")
    numbers = [text.rpartition(" does not fit into 32 bits: must be ")[0] for text in problems("--config", "c.toml")]
    assert [text for text in numbers if text] == [
        f"c.toml:1: dataset_repeats = {size}: {size}",
        f"c.toml:3: resolution = [{size}, 64]: {size}",
    ]
