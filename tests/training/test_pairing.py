"""Runs with paired noise and contrastive flow matching: on two processes as on one, and resumed as uninterrupted."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdxl_finetune.config import load_config
from sdxl_finetune.errors import UserError
from sdxl_finetune.training.setup import build_run
from tests.training.toy_runs import OPTIONS, config, losses, read_rows, run, train_on_two_processes, use_toy

PAIRED = ["--flow_model", "--flow_use_ot", "--contrastive_flow_matching", "--cfm_lambda", "0.1"]
WITHOUT_CACHE = [word for word in OPTIONS if word != "--cache_latents"]


@pytest.fixture
def work(work) -> Path:
    """With the small model that draws, whose predictions depend on captions."""
    use_toy(work)
    return work


def test_two_processes_pair_and_contrast_as_one(work) -> None:
    train_on_two_processes([*WITHOUT_CACHE, *PAIRED, "--train_batch_size", "2"])
    together = losses(read_rows("logs"))
    alone = losses(run(*PAIRED, "--train_batch_size", "4"))
    assert together == pytest.approx(alone, rel=1e-3), "as one process with twice the batch"
    unpaired = losses(run("--flow_model", "--train_batch_size", "4"))
    assert unpaired != pytest.approx(alone, rel=1e-2)


def test_a_resumed_run_ends_the_same(work) -> None:
    options = [*PAIRED, "--save_state", "--save_every_n_steps", "2"]
    run(*options)
    whole = load_file("out/last.safetensors")
    run(*options, "--resume", "out/at-step00000002-state")
    resumed = load_file("out/last.safetensors")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_validation_is_that_of_an_unpaired_run(work) -> None:
    """Held-out images have their own noise and no negatives."""
    options = ["--flow_model", "--validation_split", "0.25", "--learning_rate", "1e-30", "--max_train_steps", "1"]
    first, second = (
        [row["validation"] for row in run(*options, *more) if "validation" in row] for more in (PAIRED[1:], [])
    )
    assert first and first == second


def test_pairing_turns_on_the_cache_and_says_so(work, caplog) -> None:
    loaded = load_config([*WITHOUT_CACHE, *PAIRED], program="sdxl-train")
    assert loaded is not None and loaded.cache_latents
    assert "flow_use_ot = True: keeps the latents of all images in memory (cache_latents)" in " ".join(
        record.getMessage() for record in caplog.records
    )
    with build_run(config(*PAIRED)) as built:
        batch = next(iter(built.batches()))
    assert batch.latents is not None and batch.negative_latents is not None


def test_what_cannot_be_paired_is_refused_with_the_reason(work) -> None:
    with pytest.raises(UserError, match=r"random_crop = True: cannot be used with flow_use_ot: keep one"):
        load_config([*WITHOUT_CACHE, *PAIRED, "--random_crop"], program="sdxl-train")
    with pytest.raises(UserError, match=r"contrastive_flow_matching = True: needs v_parameterization or flow_model"):
        config("--contrastive_flow_matching")
    with pytest.raises(UserError, match=r"immiscible_diffusion = True: it mixes noise by the alphas of single steps"):
        config("--immiscible_diffusion", "--immiscible_noise", "4")
