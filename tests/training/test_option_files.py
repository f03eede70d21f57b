"""Files that options name: a changed content is said when a run is resumed."""

import json
import logging
from pathlib import Path

import pytest

from sdxl_finetune.config import Config
from sdxl_finetune.training.option_files import saved_options
from sdxl_finetune.training.resume import Start, check_options
from sdxl_finetune.training.state import TrainingState


@pytest.mark.parametrize("kind", ["toml", "json"])
def test_a_digest_changes_with_a_file_and_with_the_files_that_it_names(tmp_path: Path, kind: str) -> None:
    tags = tmp_path / "tags.txt"
    tags.write_text("style_*\n")
    datasets = {"datasets": [{"subsets": [{"image_dir": "a", "keep_tokens": 1, "protected_tags_file": str(tags)}]}]}
    path = tmp_path / f"datasets.{kind}"
    text = f"[[datasets]]\n[[datasets.subsets]]\nprotected_tags_file = {json.dumps(str(tags))}\n"
    path.write_text(json.dumps(datasets) if kind == "json" else text)
    config = Config(dataset_config=path, caption_tag_dropout_groups={"a": ["b"]})
    seen = [saved_options(config)]
    assert str(tmp_path) not in json.dumps(seen) and "content of caption_tag_dropout_groups" not in seen[0]
    for file in (tags, path):
        file.write_text(file.read_text() + "\n")
        seen.append(saved_options(config))
    assert len({one["content of dataset_config"] for one in seen}) == 3
    path.write_text("[" if kind == "toml" else "[]")
    assert saved_options(config)["content of dataset_config"], "other checks report the mistake"


def test_changed_tag_rules_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tags, groups = tmp_path / "tags.txt", tmp_path / "groups.json"
    tags.write_text("style_*\n")
    groups.write_text('{"a": ["b"]}')
    config = Config(protected_tags_file=tags, caption_tag_dropout_groups=groups)
    state = TrainingState(step=1, epoch=0, optimizer=config.optimizer_name, config=saved_options(config))
    start = Start(path=tmp_path, is_state=True, state=state)
    with caplog.at_level(logging.INFO):
        check_options(start, config)
        assert not caplog.messages
        groups.write_text('{"a": ["c"]}')
        check_options(start, config)
    (message,) = caplog.messages
    assert "content of caption_tag_dropout_groups " in message and "protected" not in message
