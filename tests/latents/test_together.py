"""Processes that encode together while other runs use the same folder."""

from pathlib import Path

from accelerate import Accelerator

from sdxl_finetune.latents import together
from sdxl_finetune.latents.catalogue import local_shelf
from sdxl_finetune.latents.together import Team, open_together
from tests.latents.test_catalogue import KIND, make


def test_shards_of_another_run_count_when_all_processes_see_them(tmp_path: Path, monkeypatch) -> None:
    """The first process opened the folder before another run added its second shard."""
    first, second = (make(tmp_path, 2, seed) for seed in (1, 2))
    before = [first.path.name]
    monkeypatch.setattr(together, "gather_object", lambda own: [before, *own])
    team = Team(KIND, local_shelf(tmp_path, KIND), tmp_path, None, 1, 0, 2, slice(1, None, 2))
    found = open_together(team, Accelerator(cpu=True))
    assert [shard.path for shard in found] == [first.path] and second.path.exists()
