"""Training on cached text encoder outputs: the losses of encoding each batch, without the encoders on the device."""

import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from sdxl_finetune.commands.cache import cache
from sdxl_finetune.commands.model import main as model_tool
from sdxl_finetune.data.captions import caption, is_dropped
from sdxl_finetune.errors import UserError
from sdxl_finetune.seeding import position_random
from sdxl_finetune.training.setup import build_run
from tests.training.toy_runs import OPTIONS, config, losses, read_rows, run, train_on_two_processes, use_toy

IN_MEMORY, ON_DISK = ["--cache_text_encoder_outputs"], ["--cache_text_encoder_outputs_to_disk"]


@pytest.fixture
def work(work) -> Path:
    """With the small model that draws, whose predictions depend on captions."""
    use_toy(work)
    return work


@pytest.mark.parametrize(
    ("where", "options"),
    [
        (IN_MEMORY, ["--validation_split", "0.25", "--caption_prefix", "photo,", "--caption_suffix", "sharp"]),
        (ON_DISK, ["--caption_dropout_rate", "0.5", "--weighted_captions", "--max_token_length", "150"]),
        (IN_MEMORY, ["--mixed_precision", "bf16", "--full_bf16", "--max_train_steps", "2"]),
    ],
    ids=["validation", "dropout and weights", "full_bf16"],
)
def test_losses_are_those_of_encoding_each_batch(work, where: list[str], options: list[str]) -> None:
    tolerance = 3e-2 if "bf16" in options else 1e-3
    plain, cached = run(*options), run(*options, *where)
    assert losses(cached) == pytest.approx(losses(plain), rel=tolerance)
    assert [row["step"] for row in cached] == [row["step"] for row in plain]
    for left, right in zip(cached, plain, strict=True):
        assert left.get("validation", {}) == pytest.approx(right.get("validation", {}), rel=tolerance)
    if "--caption_prefix" in options:
        others = losses(run(*options, *IN_MEMORY, "--caption_suffix", "a drawing of something else"))
        assert losses(plain) != pytest.approx(others, rel=10 * tolerance), "other captions give other losses"


def test_batches_hold_the_outputs_and_the_device_no_encoder(work) -> None:
    asked = config(*IN_MEMORY, "--caption_dropout_rate", "0.5")
    with build_run(asked) as built:
        sdxl = built.learner.sdxl
        assert [name for name, _ in sdxl.named_children()] == ["unet"]
        names = [name.removeprefix("module.") for name, _ in built.learner.model.named_parameters()]
        assert {name.partition(".")[0] for name in names} == {"unet"}
        dropped = 0
        for batch in built.batches():
            assert batch.tokens1 is None and batch.hidden.dtype == batch.pooled.dtype == torch.float16
            place = batch.position
            micro_batch = next(iter(built.timeline.plan.micro_batches(place.step, place.step + 1)))
            for slot, row in enumerate(micro_batch.rows.tolist()):
                entry = built.dataset.index[row]
                rng = position_random(built.seed, "caption", place.step, 0, slot)
                drop = is_dropped(entry.subset, rng, epoch=place.epoch)
                plain = entry.subset.model_copy(update={"caption_dropout_rate": 0.0})
                text = "" if drop else caption(plain, entry.caption, rng, epoch=0, step=0, max_steps=1)
                hidden, pooled = sdxl.encode_text(built.tokenizer([text]))
                torch.testing.assert_close(batch.hidden[slot].float(), hidden[0], rtol=1e-3, atol=1e-3)
                torch.testing.assert_close(batch.pooled[slot].float(), pooled[0], rtol=1e-3, atol=1e-3)
                dropped += drop
        assert 0 < dropped < 8


def test_saved_files_hold_the_encoders_and_previews_are_those_of_the_model(work) -> None:
    Path("prompts.txt").write_text("a cat, (photo:1.2) --w 64 --h 64 --s 2 --d 7\n")
    previews = ["--sample_prompts", "prompts.txt", "--sample_at_first", "--sample_every_n_steps", "100"]
    pictures = []
    for where in ([], IN_MEMORY):
        run(*where, *previews, "--save_precision", "float", "--max_train_steps", "1")
        (path,) = Path("out/sample").iterdir()
        with Image.open(path) as image:
            pictures.append(image.tobytes())
        path.unlink()
    assert pictures[0] == pictures[1]
    before, after = load_file("base.safetensors"), load_file("out/last.safetensors")
    assert before.keys() == after.keys()
    encoders = [key for key in before if key.startswith("conditioner.")]
    assert len(encoders) > 50 and all(torch.equal(before[key].float(), after[key]) for key in encoders)
    assert not torch.equal(
        before["model.diffusion_model.out.2.weight"].float(), after["model.diffusion_model.out.2.weight"]
    )


def test_a_resumed_run_ends_the_same(work) -> None:
    """It draws the same variants, and encodes them again with the encoders of the training state."""
    options = [*IN_MEMORY, "--shuffle_caption", "--text_encoder_outputs_variants", "3", "--caption_dropout_rate", "0.2"]
    options += ["--save_state", "--save_every_n_steps", "2"]
    run(*options)
    whole = load_file("out/last.safetensors")
    run(*options, "--resume", "out/at-step00000002-state")
    resumed = load_file("out/last.safetensors")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_two_processes_share_the_captions_and_train(work) -> None:
    train_on_two_processes([*OPTIONS, *ON_DISK, "--train_batch_size", "1"])
    shards = Path("out/cache/text_outputs").glob("*/*.text_outputs")
    assert {path.name.split("-")[1] for path in shards} == {"00000", "00001"}
    together = losses(read_rows("logs"))
    assert together == pytest.approx(losses(run()), rel=1e-3), "as one process with twice the batch"


def said(caplog) -> str:
    lines = [record.getMessage() for record in caplog.records if "text encoder outputs in" in record.getMessage()]
    return lines[-1].partition(": ")[2]


def test_each_caption_is_encoded_once_and_found_again(work, caplog) -> None:
    """Until the caption, the number of tokens or the encoders are others."""
    caplog.set_level("INFO")
    captions = {path.read_text().strip() for path in Path("images").glob("*.txt")}
    first = next(Path("images").glob("*.txt"))
    shutil.copy(first.with_suffix(".jpg"), "images/again.jpg")
    shutil.copy(first, "images/again.txt")
    only_text = ["--no-cache_latents", *ON_DISK]
    count = len(captions) + 1

    def cached(*more: str) -> str:
        assert cache(config(*only_text, *more, program="sdxl-cache")) == 0
        AcceleratorState._reset_state(reset_partial_state=True)
        return said(caplog)

    assert cached() == f"{count} encoded, 0 there already", "and the empty caption"
    assert cached() == f"0 encoded, {count} there already"
    shards = list(Path("out/cache/text_outputs").glob("*/*.text_outputs"))
    assert len(shards) == 1 and not Path("out/cache/latents").exists()
    run(*ON_DISK)
    assert said(caplog) == f"0 encoded, {count} there already"
    first.write_text("something new")
    assert cached() == f"1 encoded, {count} there already"
    assert cached("--max_token_length", "150") == f"{count + 1} encoded, 0 there already"
    assert cached("--weighted_captions") == f"{count + 1} encoded, 0 there already"
    assert model_tool(["init", "other.safetensors", "--seed", "4"]) == 0
    other = ["--pretrained_model_name_or_path", "other.safetensors"]
    assert cached(*other) == f"{count + 1} encoded, 0 there already"
    damaged = shards[0].read_bytes()
    shards[0].write_bytes(damaged[:-9] + b"\x55" * 9)
    assert cached() == f"{count} encoded, 1 there already" and "damaged" in caplog.text


def test_damage_is_named_when_a_caption_is_read(work) -> None:
    with build_run(config(*ON_DISK)) as built:
        (shard,) = Path("out/cache/text_outputs").glob("*/*.text_outputs")
        shard.write_bytes(bytes(shard.stat().st_size))
        with pytest.raises(UserError, match=r"text encoders' output for .*damaged.*start the run again"):
            next(iter(built.batches()))
