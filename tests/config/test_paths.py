"""Options that name files and folders: a path that cannot be used gives one clear line."""

from pathlib import Path

import pytest

from sdxl_finetune.config import load_config
from sdxl_finetune.errors import UserError

FILES = ("sample_prompts", "in_json", "dataset_config", "log_tracker_config")
FOLDERS = ("train_data_dir", "reg_data_dir", "conditioning_data_dir")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for name in ("images/a.png", "base.safetensors", "some.txt"):
        (tmp_path / name).touch()
    (tmp_path / "c.toml").write_text("seed = 1")
    return tmp_path


def problems(*arguments: str) -> list[str]:
    base = ["--pretrained_model_name_or_path", "base.safetensors", "--train_data_dir", "images", "--output_dir", "out"]
    with pytest.raises(UserError) as caught:
        load_config([*base, "--resolution", "64", "--min_bucket_reso", "64", *arguments], program="sdxl-check")
    return [str(problem).removeprefix("command line: ") for problem in caught.value.problems]


@pytest.mark.parametrize("option", FILES)
def test_a_folder_in_place_of_a_file(option: str) -> None:
    (message,) = problems(f"--{option}", "images")
    assert message == f"{option} = 'images': is a folder, and a file is needed: name a file in it"


@pytest.mark.parametrize("option", FOLDERS)
def test_a_file_in_place_of_a_folder(option: str) -> None:
    (message,) = problems("--masked_loss", f"--{option}", "some.txt")
    assert message == f"{option} = 'some.txt': is a file, and a folder is needed: name the folder that holds it"


def test_paths_of_a_dataset_config(folder: Path) -> None:
    from sdxl_finetune.config import Config, load_datasets

    (folder / "d.toml").write_text(
        "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'some.txt'\n[[datasets.subsets]]\nmetadata_file = 'images'\n"
    )
    with pytest.raises(UserError) as caught:
        load_datasets(Config(dataset_config=folder / "d.toml", resolution=64))
    assert [problem.message.partition(",")[0] for problem in caught.value.problems] == ["is a file", "is a folder"]


@pytest.mark.parametrize(
    ("name", "kind"), [("some.txt", "file of another kind"), ("images", "folder"), ("images/a.png", "file of another")]
)
def test_a_config_that_is_no_toml_file(name: str, kind: str) -> None:
    (message,) = problems("--config", name)
    assert message.startswith(f"{name}: a config is a TOML file whose name ends in .toml, and this is a {kind}")


def test_a_folder_named_as_a_config_file(folder: Path) -> None:
    (folder / "d.toml").mkdir()
    (message,) = problems("--config", "d.toml")
    assert message == "d.toml: cannot be read: it is a folder, and a file is needed"
    assert load_config(["--config", "c", "--print_config"], program="") is None, "the ending may be left out"


@pytest.mark.parametrize("option", ["output_dir", "logging_dir", "cache_dir"])
@pytest.mark.parametrize("place", ["/proc/out", "some.txt", "some.txt/out"])
def test_a_place_that_cannot_be_written_to(option: str, place: str) -> None:
    """Root has all permissions in /proc and can create nothing there."""
    (message,) = problems(f"--{option}", place)
    assert message.startswith(f"{option} = {place!r}: cannot be created or written to (")
    assert not Path("out").exists() and sorted(path.name for path in Path().iterdir()) == [
        "base.safetensors",
        "c.toml",
        "images",
        "some.txt",
    ]


def test_a_missing_training_state() -> None:
    (message,) = problems("--resume", "out/last-state")
    assert message.startswith("resume = 'out/last-state': no such training state or checkpoint: check the path")
