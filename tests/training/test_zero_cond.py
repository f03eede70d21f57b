"""`use_zero_cond`: the U-Net is given zeros for empty captions, in training and everywhere else."""

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from sdxl_finetune.batch import TextOutputs
from sdxl_finetune.commands.cache import cache
from sdxl_finetune.commands.model import main as model_tool
from sdxl_finetune.diffusion.image_loss import image_losses
from sdxl_finetune.model.vae import batch_latents
from sdxl_finetune.training.setup import build_run
from tests.training.toy_runs import OPTIONS, config, losses, read_rows, run, train_on_two_processes, use_toy

ZERO = ["--use_zero_cond"]
DROPPED = ["--caption_dropout_rate", "0.5", "--max_token_length", "150"]
ENCODERS = ["--train_text_encoder", "--learning_rate", "1e-4"]


@pytest.fixture
def work(work) -> Path:
    """With the small model that draws, and an image whose caption file is empty."""
    use_toy(work)
    next(iter(sorted(Path("images").glob("*.txt")))).write_text(" \n")
    return work


def test_losses_are_those_of_zeros_in_place_of_the_outputs_for_empty_captions(work) -> None:
    """Flow and encoders in training included. Outputs and zeros are put together here, from the captions' texts."""
    empty = 0
    more = ["--flow_model", "--max_train_steps", "6", "--caption_prefix", "photo,"]
    with build_run(config(*ZERO, *DROPPED, *ENCODERS, *more)) as built:
        learner, sdxl = built.learner, built.learner.sdxl
        for batch in built.batches():
            latents = batch_latents(batch, learner.vae)
            found = image_losses(learner.model, batch, latents, learner.objective, learner.config)
            (micro_batch,) = built.timeline.plan.micro_batches(batch.position.step, batch.position.step + 1)
            texts = [built.dataset.caption_at(batch.position, *each) for each in enumerate(micro_batch.rows.tolist())]
            assert [bool(text.strip()) for text in texts] == (~batch.text.empty).tolist()
            assert all(text == "" or text.startswith("photo,") for text in texts)
            sdxl.zero_cond = False
            outputs = [sdxl.encode_text(built.tokenizer([text])) for text in texts]
            outputs = [
                one if text.strip() else TextOutputs(*map(torch.zeros_like, one))
                for one, text in zip(outputs, texts, strict=True)
            ]
            empty += sum(not text.strip() for text in texts)
            together = TextOutputs(*(torch.cat(parts) for parts in zip(*outputs, strict=True)))
            expected = _losses_of(built, batch, latents, together)
            encoded = _losses_of(built, batch, latents, batch.text)
            sdxl.zero_cond = True
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
            differs = (found - encoded).abs() > 1e-4 * found
            assert differs.tolist() == [not text.strip() for text in texts]
            assert _gradients(learner.model, found) == pytest.approx(
                _gradients(learner.model, expected), rel=1e-3, abs=1e-6
            )
    assert 0 < empty < 12


def _losses_of(built, batch, latents, text) -> torch.Tensor:
    """Losses of a batch whose captions are given as tokens or as outputs."""
    learner = built.learner
    return image_losses(WithText(learner.sdxl, text), batch, latents, learner.objective, learner.config)


class WithText(torch.nn.Module):
    """A model that is given these captions, whatever the batch holds."""

    def __init__(self, sdxl: torch.nn.Module, text) -> None:
        super().__init__()
        self.sdxl, self.text = sdxl, text

    def forward(self, noisy, timesteps, _text, *sizes):
        return self.sdxl(noisy, timesteps, self.text, *sizes)


def _gradients(model: torch.nn.Module, values: torch.Tensor) -> list[float]:
    """Norm of the gradient of each parameter, 0 without a gradient."""
    model.zero_grad(set_to_none=True)
    values.mean().backward()
    return [0.0 if one.grad is None else float(one.grad.norm()) for one in model.parameters()]


def test_a_batch_of_empty_captions_gives_every_encoder_parameter_a_gradient_of_zero(work) -> None:
    with build_run(config(*ZERO, *ENCODERS, "--caption_dropout_rate", "1")) as built:
        batch = next(iter(built.batches()))
        latents = batch_latents(batch, built.learner.vae)
        values = image_losses(built.learner.model, batch, latents, built.learner.objective, built.config)
        values.mean().backward()
        for encoder in (built.learner.sdxl.te1, built.learner.sdxl.te2):
            trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
            assert trained and all(parameter.grad is not None and not parameter.grad.any() for parameter in trained)


@pytest.mark.parametrize("where", ["--cache_text_encoder_outputs", "--cache_text_encoder_outputs_to_disk"])
def test_cached_outputs_give_the_losses_of_encoding_each_batch(work, where: str) -> None:
    options = [*ZERO, *DROPPED, "--validation_split", "0.4"]
    options += ["--colour_check_every_n_steps", "4", "--colour_check_images", "3"]
    plain, cached = run(*options), run(*options, where)
    assert losses(cached) == pytest.approx(losses(plain), rel=1e-3)
    for name in ("validation", "colours"):
        figures = [[row[name] for row in rows if name in row] for rows in (plain, cached)]
        assert len(figures[0]) >= 2
        for one, other in zip(*figures, strict=True):
            assert other == pytest.approx(one, rel=1e-2, abs=1e-3)
    other = losses(run(*DROPPED, "--validation_split", "0.4"))
    assert losses(plain) != pytest.approx(other, rel=1e-3), "the encoded empty text gives other losses"


def test_the_option_adds_records_for_empty_captions_to_the_cache_and_finds_all_others_again(work, caplog) -> None:
    caplog.set_level("INFO")
    Path("images/astronaut.txt").write_text("()")  # brackets of a weight, without a token between them
    options = ["--no-cache_latents", "--cache_text_encoder_outputs_to_disk", "--weighted_captions"]
    said = []
    for more in ([], ZERO, ZERO, []):
        assert cache(config(*options, *more, program="sdxl-cache")) == 0
        AcceleratorState._reset_state(reset_partial_state=True)
        lines = [record.getMessage() for record in caplog.records if "text encoder outputs in" in record.getMessage()]
        said.append(int(lines[-1].rpartition(": ")[2].split()[0]))
    assert said[0] > 4 and said[1:] == [2, 0, 0], "the empty text, and the brackets"


def test_two_processes_train_as_one_also_if_all_captions_of_a_rank_are_dropped(work) -> None:
    options = [*ZERO, *ENCODERS, "--caption_dropout_rate", "0.5", "--save_precision", "float", "--max_train_steps", "6"]
    one = losses(run(*options))
    single = load_file("out/last.safetensors")
    with build_run(config(*options)) as built:
        empty = [batch.text.empty.tolist() for batch in built.batches()]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert any(first != second for first, second in empty), "a step in which one rank has only an empty caption"
    train_on_two_processes([*OPTIONS, *options, "--train_batch_size", "1", "--logging_dir", "logs2"])
    assert losses(read_rows("logs2")) == pytest.approx(one, rel=1e-4)
    together = load_file("out/last.safetensors")
    for key in ("model.diffusion_model.out.2.weight", "conditioner.embedders.1.model.text_projection"):
        torch.testing.assert_close(together[key], single[key], rtol=0, atol=2e-4)


def test_checkpoints_say_it_and_generate_and_info_read_it(work, capsys, caplog) -> None:
    run(*ZERO, "--max_train_steps", "1")
    draw = ["--prompt", "a cat", "--width", "64", "--height", "64", "--steps", "2", "--seed", "3"]

    def drawn(path: str, *more: str) -> bytes:
        model_tool(["generate", path, "--output", "drawn", *draw, *more])
        (picture,) = Path("drawn").iterdir()
        with Image.open(picture) as image:
            pixels = image.tobytes()
        picture.unlink()
        return pixels

    said = drawn("out/last.safetensors")
    model_tool(["convert", "out/last.safetensors", "mute.ckpt"])
    assert drawn("mute.ckpt", "--use_zero_cond") == said != drawn("mute.ckpt")
    negative = ["--negative_prompt", "a dog"]
    assert drawn("mute.ckpt", *negative) == drawn("mute.ckpt", *negative, "--use_zero_cond"), (
        "it is about empty prompts"
    )
    capsys.readouterr()
    for path, words in (
        ("out/last.safetensors", "an empty caption was trained as zeros (use_zero_cond)\nAUTOMATIC1111"),
        ("mute.ckpt", None),
    ):
        model_tool(["info", path])
        lines = capsys.readouterr().out
        assert words in lines if words else "empty caption" not in lines
    run("--max_train_steps", "1", "--pretrained_model_name_or_path", "out/last.safetensors", "--output_name", "next")
    assert (
        "empty captions were trained as zeros, and training would slowly change that: set use_zero_cond" in caplog.text
    )
    model_tool(["info", "out/next.safetensors"])
    assert "an empty caption was trained as the encoded empty text\n" in capsys.readouterr().out


def test_fork_names_and_forms_of_the_option_are_read(work) -> None:
    alias = "--use_zero_cond_dropout"
    for words in (["--use_zero_cond=True"], ["--use_zero_cond", "true"], ["--use_zero_cond"], [alias, "True"], [alias]):
        assert config(*words).use_zero_cond, words
    for words in (["--use_zero_cond=False"], ["--use_zero_cond", "False"], ["--no-use_zero_cond"], [f"{alias}=false"]):
        assert not config(*words).use_zero_cond, words
