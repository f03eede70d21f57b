"""A problem at an address of an object store names the option that holds the address."""

from pathlib import Path

import pytest

from sdxl_finetune.config import Config, with_options
from sdxl_finetune.errors import Problem
from sdxl_finetune.storage import parse_location


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("s3://b/data", "train_data_dir = 's3://b/data': broken"),
        ("s3://b/data/5_cat/a.png", "s3://b/data/5_cat/a.png: train_data_dir = 's3://b/data': broken"),
        ("s3://b/cache/indexes/x.index", "s3://b/cache/indexes/x.index: cache_dir = 's3://b/cache': broken"),
        ("s3://b/data-of-others/a.png", "s3://b/data-of-others/a.png: broken"),
        ("data/a.png", "data/a.png: broken"),
    ],
)
def test_the_option_with_the_address_of_the_file_or_of_a_folder_above_it_is_named(file, said):
    config = Config(train_data_dir=parse_location("s3://b/data"), cache_dir=parse_location("s3://b/cache"))
    assert str(with_options([Problem("broken", file=file)], config)[0]) == said


def test_the_bucket_of_tar_files_is_named_by_their_pattern():
    config = Config(train_data_dir=parse_location("s3://b/{0..3}.tar"))
    assert str(with_options([Problem("broken", file="s3://b")], config)[0]).startswith(
        "s3://b: train_data_dir = 's3://b/{0..3}.tar': broken"
    )


def test_an_address_in_a_dataset_config_is_named_with_that_option():
    config = Config(dataset_config=Path("d.toml"))
    (found,) = with_options([Problem("does not exist", file="s3://b/data/a.tar")], config)
    assert str(found) == "s3://b/data/a.tar: dataset_config = 'd.toml': does not exist: check the address"


def test_a_problem_with_an_option_stays_as_it_is():
    problem = Problem("broken", "resume", "s3://b/data", "s3://b/data")
    assert with_options([problem], Config(train_data_dir=parse_location("s3://b/data"))) == [problem]
