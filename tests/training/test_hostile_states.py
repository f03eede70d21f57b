"""Training states, checkpoints and logs of somebody else lead to no other folder, and damaged ones have one message."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from sdxl_finetune.config import Config
from sdxl_finetune.errors import UserError
from sdxl_finetune.output.log_history import go_back, last_losses
from sdxl_finetune.output.uploads import SUFFIX, Uploads
from sdxl_finetune.training.optimizer_state import load_ema
from sdxl_finetune.training.state import MANIFEST, OPTIMIZER, STATE, WEIGHTS, TrainingState, load_state, save_state


@pytest.mark.parametrize("log", ["../outside", "/etc", "..", "a/b", "a\\b", "c:", "a\0b", "a\nb", 3, ""])
def test_the_name_of_a_log_is_a_folder_in_logging_dir(log: object) -> None:
    with pytest.raises(ValueError, match="is no name of a folder"):
        TrainingState.from_metadata(step=1, epoch=1, seed=1, position=json.dumps({"log": log}))
    position = json.dumps({"log": "run 1.20260101", "within": 2, "origin": [1, 2]})
    assert TrainingState.from_metadata(step=1, epoch=1, seed=1, position=position).log == "run 1.20260101"


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1}, {"step": "1"}, {"epoch": 2**70}, {"epoch": True}, {"seed": -1}, {"seed": "x"}, {"config": [1]},
        {"optimizer": {}}, {"resume": {"origin": [1]}}, {"resume": {"within": None}}, {"resume": []}, {"format": "x"},
        {"resume": {"order": "x"}}, {"time": {}}, {"resume": {"log": "../x"}}, {"checkpoint": "x" * 9},
    ],
)  # fmt: skip
def test_a_state_with_impossible_values_is_refused(tmp_path: Path, change: dict) -> None:
    """The manifest agrees with the changed file, as it does if the file was changed on purpose."""
    folder = tmp_path / "a-state"
    save_state(folder, TrainingState(step=1, epoch=1, seed=1, config={}, optimizer="AdamW"), {}, {})
    assert load_state(folder).step == 1
    values = json.loads((folder / STATE).read_text()) | change
    (folder / STATE).write_text(json.dumps(values))
    contents = {name: (folder / name).read_bytes() for name in (WEIGHTS, OPTIMIZER, STATE)}
    manifest = {name: [len(data), hashlib.sha256(data).hexdigest()] for name, data in contents.items()}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="this training state cannot be read"):
        load_state(folder)


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, "{", '{"state.json": 3}', "null"])
def test_a_damaged_manifest_is_refused(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "a-state"
    save_state(folder, TrainingState(step=1, epoch=1, seed=1), {}, {})
    (folder / MANIFEST).write_text(text)
    with pytest.raises(UserError, match="this training state cannot be read"):
        load_state(folder)


@pytest.mark.parametrize("content", [3, {}, {"state": {}, "groups": 3}, {"state": {"a": 1}, "groups": {}}])
def test_an_optimizer_state_of_another_program_is_refused(tmp_path: Path, content: object) -> None:
    if isinstance(content, dict) and content:
        content = {**content, "random": torch.get_rng_state()}
    torch.save(content, tmp_path / OPTIMIZER)
    with pytest.raises(UserError, match="no optimizer state of this program, because of"):
        load_ema(tmp_path / OPTIMIZER)


def write_log(folder: Path, sizes: object) -> None:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"loss": 1.0}\n{"loss": 2.0}\n')
    (folder / "saves.jsonl").write_text(json.dumps({"step": 3, "sizes": sizes}) + "\n")


@pytest.mark.parametrize("size", [0, 14, 28])
def test_a_log_is_cut_to_what_was_noted(tmp_path: Path, size: int) -> None:
    write_log(tmp_path / "log", {"metrics.jsonl": size})
    assert go_back(tmp_path / "log", 3)
    assert (tmp_path / "log" / "metrics.jsonl").stat().st_size == size


@pytest.mark.parametrize(
    "sizes",
    [{"../outside": 0}, {"metrics.jsonl": -1}, {"metrics.jsonl": 1 << 50}, {"metrics.jsonl": "1"}, [], None,
     {"saves.jsonl": 0}, {"metrics.jsonl": True}],
)  # fmt: skip
def test_a_damaged_record_of_a_save_cuts_nothing(tmp_path: Path, sizes: object) -> None:
    (tmp_path / "outside").write_text("precious")
    write_log(tmp_path / "log", sizes)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert not go_back(tmp_path / "log", 3)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_damaged_lines_of_metrics_are_left_out(tmp_path: Path) -> None:
    lines = [b'{"loss": 1.0}', b"\xff\xfe", b'{"loss": "x"}', b"[" * 100_000, b"[1]", b'{"loss": 2.0}', b'{"lo']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert last_losses(tmp_path, 10) == [1.0, 2.0]


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "", 3, ".."])
def test_a_list_of_uploads_names_only_files_in_its_folder(tmp_path: Path, name: object, caplog) -> None:
    (tmp_path / "outside").write_text("precious")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / f"m{SUFFIX}").write_text(json.dumps([{"name": name, "repo_id": "a/b", "remove": True}]))
    deleted: list[Path] = []
    Uploads(Config(huggingface_repo_id="a/b", huggingface_token="t"), folder, "m", deleted.append)
    assert "is no name of a saved file" in caplog.text and not deleted and (tmp_path / "outside").exists()
