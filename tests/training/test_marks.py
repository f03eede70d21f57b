"""Quality tags and loss weights in real runs: captions and losses are those that the files and rules ask for."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from sdxl_finetune.commands import data
from sdxl_finetune.commands.check import check
from sdxl_finetune.data.batch_plan import MicroBatch
from sdxl_finetune.diffusion.image_loss import image_losses
from sdxl_finetune.model.vae import batch_latents
from sdxl_finetune.training.loop import train
from sdxl_finetune.training.setup import build_run
from tests.training.toy_runs import OPTIONS, config, losses, run, use_toy

QUALITY = [
    "--quality_tags",
    "masterpiece > 0.75, high quality > 0.5, worst quality",
    "--quality_scores",
    "scores.jsonl",
]
SHUFFLED = ["--shuffle_caption", "--keep_tokens", "2", "--caption_tag_dropout_rate", "0.3", "--validation_split", "0.2"]


@pytest.fixture
def work(work) -> Path:
    """With the small model that draws, whose predictions depend on captions, and scores of all images but one."""
    use_toy(work)
    images = sorted(path for path in (work / "images").rglob("*.*") if path.suffix in (".png", ".jpg", ".webp"))
    lines = [json.dumps({"image_path": path.stem, "score": at / len(images)}) for at, path in enumerate(images) if at]
    Path("scores.jsonl").write_text("\n".join(lines))
    return work


def captions(*more: str) -> list[str]:
    """The captions of the first micro-batches as they are trained."""
    try:
        with build_run(config(*more)) as built:
            plan, dataset = built.timeline.plan, built.dataset
            return [
                dataset.caption_at(micro_batch.position, slot, row)
                for micro_batch in plan.micro_batches(0, 3)
                for slot, row in enumerate(micro_batch.rows.tolist())
            ]
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_a_run_is_that_of_tags_in_the_files(work, caplog) -> None:
    """Also with validation, cached text encoder outputs, shuffling and tag dropout."""
    tags = ("masterpiece", "high quality", "worst quality")
    while_loading = captions(*QUALITY, *SHUFFLED)
    tagged = [text.split(",")[0] in tags for text in while_loading]
    assert sum(tagged) >= len(tagged) - 1 > 3, "all but the image without a score"
    before = run(*QUALITY, *SHUFFLED)
    cached = run(*QUALITY, "--validation_split", "0.2", "--cache_text_encoder_outputs")
    plain = run(*SHUFFLED)
    assert data.main(["tag-quality", *OPTIONS, *QUALITY]) == 0
    assert captions(*SHUFFLED) == captions(*QUALITY, *SHUFFLED) == while_loading
    after = run(*SHUFFLED)
    for left, right in zip(before, after, strict=True):
        assert left.get("loss") == right.get("loss") and left.get("validation") == right.get("validation")
    assert losses(before) != losses(plain)
    uncached = run("--validation_split", "0.2")
    assert losses(cached) == pytest.approx(losses(uncached), rel=1e-3)


def test_debug_dataset_shows_the_tags(work, caplog) -> None:
    caplog.set_level(logging.INFO)
    assert train(config(*QUALITY, "--debug_dataset")) == 0
    said = [record.getMessage() for record in caplog.records]
    assert any("quality tags: masterpiece" in line for line in said)
    drawn = [line.rpartition(": ")[2] for line in said if line.startswith("    images/")]
    assert drawn and all(line.startswith(("masterpiece, ", "high quality, ", "worst quality, ")) for line in drawn)


def test_equal_loss_weights_multiply_the_loss_and_others_the_loss_of_their_images(work) -> None:
    Path("two.toml").write_text('[paths]\n"**" = { loss_weight = 2 }\n')
    plain, doubled = (
        losses(run("--max_train_steps", "1")),
        losses(run("--max_train_steps", "1", "--image_weights", "two.toml")),
    )
    assert doubled == [2 * plain[0]]


def test_the_gradient_of_a_weighted_batch_is_that_of_its_parts_on_several_ranks(work) -> None:
    Path("rules.toml").write_text('[tags]\n"*" = { loss_weight = 0.5 }\n[paths]\n"*a*" = { loss_weight = 3 }\n')
    with build_run(config("--image_weights", "rules.toml", "--train_batch_size", "4")) as built:
        model, objective = built.learner.model, built.learner.objective
        micro_batch = max(built.timeline.plan.micro_batches(0, 3), key=lambda one: len(one.rows))
        assert len(micro_batch.rows) >= 2
        weights = built.dataset.index.loss_weights(micro_batch.rows.tolist())
        parameter = next(p for p in built.learner.sdxl.unet.parameters() if p.requires_grad and p.dim() == 4)

        def gradient(micro_batch: MicroBatch, ranks: int) -> torch.Tensor:
            total = torch.zeros_like(parameter)
            for rank in range(ranks):
                batch = replace(built.dataset, rank=rank, ranks=ranks)[micro_batch].batch
                assert batch is not None
                batch_losses = image_losses(
                    model, batch, batch_latents(batch, built.learner.vae), objective, built.config
                )
                (found,) = torch.autograd.grad((batch_losses * batch.weights).sum(), parameter)
                total += found / ranks
            return total

        alone = gradient(micro_batch, 1)
        assert len(set(weights.tolist())) > 1, "the images of the batch have different weights"
        for ranks in (2, 3):
            torch.testing.assert_close(gradient(micro_batch, ranks), alone, rtol=1e-4, atol=1e-7)


def test_a_changed_score_is_named_on_resume(work) -> None:
    run(*QUALITY, "--max_train_steps", "1", "--save_state")
    assert len(losses(run(*QUALITY, "--max_train_steps", "2", "--save_state", "--resume", "auto"))) == 1
    Path("scores.jsonl").write_text('{"path": "x", "score": 1}')
    with pytest.raises(Exception, match="quality tags"):
        run(*QUALITY, "--resume", "auto")
    with pytest.raises(Exception, match="quality tags"):
        run("--resume", "auto")


def test_sdxl_check_shows_tags_repeats_and_loss_weights(work, capsys) -> None:
    Path("rules.toml").write_text('[tags]\n"*" = { repeats = 2, loss_weight = 0.5 }\n"no such" = { repeats = 3 }\n')
    check(config(*QUALITY, "--image_weights", "rules.toml", "--no_memory", program="sdxl-check"))
    seen = capsys.readouterr()
    assert "\nquality tags  masterpiece " in seen.out and "\nrepeats       2 for " in seen.out
    assert "\nloss weights  0.5 for " in seen.out
    assert "1 of 2 rules match no image: tags.'no such'" in seen.err
