"""Options of the Hugging Face hub: places on the hub, mistakes that need no network, and remarks."""

from pathlib import Path

import pytest

from sdxl_finetune.config import Config
from sdxl_finetune.config.hub import hub_problems, parse_place
from sdxl_finetune.config.options import to_toml
from sdxl_finetune.config.rules import find_remarks


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("user/repo/run/x-state", ("user/repo", "run/x-state", None, "model")),
        ("user/repo/x-state:v1", ("user/repo", "x-state", "v1", "model")),
        ("user/repo/x-state:main:dataset", ("user/repo", "x-state", "main", "dataset")),
        ("user/repo/x-state::dataset", ("user/repo", "x-state", None, "dataset")),
        ("user/repo", ("user/repo", "", None, "model")),
        ("user/repo:v1", ("user/repo", "", "v1", "model")),
    ],
)
def test_a_place_is_read_as_the_reference_does(text: str, place: tuple) -> None:
    read = parse_place(text)
    assert (read.repo_id, read.path, read.revision, read.repo_type) == place


@pytest.mark.parametrize("text", ["", "repo", "user/", "/repo/x", "a/b/c:d:model:e", "a/b/c:d:thing", "a b/c/d", "out"])
def test_a_malformed_place_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be"):
        parse_place(text)
    config = Config(resume=Path(text), resume_from_huggingface=True)
    assert [names.split()[0] for names, _ in hub_problems(config)] == ["resume"]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(
            ("huggingface_repo_id", name)
            for name in ("repo", "a/b/c", "https://huggingface.co/a/b", "a/b--c", "a/b.git")
        ),
        *(("huggingface_repo_id", name) for name in ("a/../b", "a/.b", "a/b-", "datasets/a/b", "a/" + "b" * 97)),
        ("huggingface_repo_type", "models"),
        ("huggingface_path_in_repo", "../up"),
    ],
)
def test_names_that_the_hub_does_not_allow_are_refused(option: str, value: str) -> None:
    assert [name for name, _ in hub_problems(Config(**{option: value}))] == [option]


def test_names_that_the_hub_allows_pass() -> None:
    for name in ("user/name", "User-1/my_model.v1.0", "0/1"):
        options = {"huggingface_repo_type": "dataset", "huggingface_path_in_repo": "/a/b c/"}
        assert list(hub_problems(Config(huggingface_repo_id=name, **options))) == []


@pytest.mark.parametrize(
    ("values", "options"),
    [
        ({"resume_from_huggingface": True}, ["resume_from_huggingface"]),
        ({"resume_from_huggingface": True, "resume": Path("auto")}, ["resume_from_huggingface"]),
        ({"resume_from_huggingface": True, "resume": Path("a/b/c"), "huggingface_token": "t"}, []),
        ({"huggingface_token": "t", "async_upload": True}, ["huggingface_token", "async_upload"]),
        ({"save_state_to_huggingface": True, "async_upload": False}, ["save_state_to_huggingface"]),
        ({"huggingface_repo_id": "a/b", "save_state_to_huggingface": True}, ["save_state_to_huggingface"]),
        ({"huggingface_repo_id": "a/b", "save_state_to_huggingface": True, "save_state": True}, []),
        ({"huggingface_repo_id": "a/b", "huggingface_repo_visibility": "hidden"}, ["huggingface_repo_visibility"]),
        ({"huggingface_repo_id": "a/b", "huggingface_token": "t", "huggingface_repo_visibility": "public"}, []),
    ],
)
def test_options_without_effect_are_remarked(values: dict, options: list[str]) -> None:
    remarks = dict(find_remarks(Config(**values)))
    assert sorted(remarks) == sorted(options) and "t" not in remarks.values()


def test_the_token_is_not_saved() -> None:
    assert "hf_secret" not in to_toml(Config(huggingface_token="hf_secret", huggingface_repo_id="a/b"))
