"""Learned loss weights in a run: resumed exactly, alike on 1 and 2 processes, in any precision, and in the log only."""

import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scripts.benchmarks.interrupt import differences, last_log, saved_names
from sdxl_finetune.batch import Batch, Position
from sdxl_finetune.config import Config, LearnedWeightOptions
from sdxl_finetune.diffusion.objective import build_objective
from sdxl_finetune.errors import UserError
from sdxl_finetune.training.learned_weights import LearnedWeights, check_learned_weights, rate_factor
from tests.training.test_fp16 import FLOAT32, FP16, QUICK, SGD, run
from tests.training.test_resume import arguments, forget, refusal
from tests.training.toy_runs import read_rows, train_on_two_processes

LEARNED = ["--edm2_loss_weighting", "--edm2_loss_weighting_generate_graph_every_x_steps", "2", "--min_snr_gamma", "0"]
STILL = [*SGD, "--learning_rate", "1e-12", "--no-save_state", *FLOAT32]
"""Options of a model that does not change, so that runs see the same losses."""


def rows(folder: str) -> list[dict]:
    return read_rows(f"{folder}/logs")


def learned(found: list[dict]) -> list[float]:
    """The learned weights after each step, in the middle of each range of timesteps."""
    return [row[name] for row in found if "loss" in row for name in row if name.startswith("loss_weight/")]


def curves(found: list[dict]) -> dict[int, dict[str, float]]:
    return {row["step"]: row["loss_weights"] for row in found if "loss_weights" in row}


def test_a_resumed_run_has_the_same_weights_bit_for_bit(work, caplog) -> None:
    options = [*LEARNED, "--flow_model", "--gradient_accumulation_steps", "2", "--edm2_loss_weighting_lr_scheduler"]
    options += ["--save_every_n_steps", "3", "--train_batch_size", "2", "--max_train_steps", "6", *FLOAT32]
    found = run("one", *options)
    falling = [0.02 / (step / 1.2) ** 0.5 for step in range(2, 6)]
    assert [row["lr"]["edm2"] for row in found if "lr" in row] == pytest.approx([0, 0.02, *falling])
    shutil.copytree("one", "other")
    forget("other", *(name for name in saved_names(Path("other")) if name != "style-step00000003-state"))
    run("other", *options, "--resume", "auto")
    assert differences(Path("one"), Path("other")) == []
    state = torch.load("one/out/style-step00000003-state/optimizer.pt")["loss_weights"]
    assert state["network"]["weight"].abs().max() > 0 and state["state"]["unet.weight"]["exp_avg"].abs().max() > 0
    said = refusal("one", *QUICK, *options, "--edm2_loss_weighting_num_channels", "64", "--resume", "auto")
    assert "edm2_loss_weighting_num_channels = 64" in said and "edm2_loss_weighting_num_channels = 128" in said
    run("other", *options, "--max_train_steps", "7", "--resume", "other/out/style-step00000003.safetensors")
    assert "no learned loss weights, which start anew" in caplog.text


def test_the_logged_loss_and_the_checkpoint_are_those_of_a_run_without_learned_weights(work) -> None:
    """The model stands still, so that both runs see the same losses."""
    plain, found = run("plain", *STILL, "--min_snr_gamma", "0"), run("learned", *STILL, *LEARNED)
    steps = [row for row in found if "loss" in row]
    for name in ("loss", "loss/t000-249", "loss/t750-999"):
        assert [row.get(name) for row in steps] == [row.get(name) for row in plain], name
    assert steps[0]["loss/weighted"] == steps[0]["loss"], "the first step has the weight 1"
    assert steps[-1]["loss"] > 1 and steps[-1]["loss/weighted"] < 0.95 * steps[-1]["loss"], "it approaches 1"
    files = [load_file(f"{folder}/out/style.safetensors") for folder in ("plain", "learned")]
    assert files[0].keys() == files[1].keys()
    torch.testing.assert_close(files[0], files[1], rtol=0, atol=1e-9)
    shown = curves(found)
    assert list(shown) == [2, 4, 6]
    assert len(shown[6]) == 101 and 0.5 < shown[6]["t500.0"] < 1 and shown[6] != shown[4]
    events = EventAccumulator(str(last_log(Path("learned")) / "finetuning")).Reload()
    assert [image.step for image in events.Images("loss_weights")] == [2, 4, 6]
    assert {"loss/weighted", "lr/edm2", "loss_weight/t125", "loss_weight/t875"} <= set(events.Tags()["scalars"])


def test_any_precision_and_update_learns_the_same_weights(work) -> None:
    cases = {
        "fused": (["--fused_backward_pass"], 1e-6),
        "full_fp16": ([*FP16, "--full_fp16"], 1e-2),
        "full_bf16": (["--mixed_precision", "bf16", "--full_bf16", "--fused_backward_pass"], 3e-2),
    }
    expected = learned(run("plain", *STILL, *LEARNED, "--max_train_steps", "4"))
    assert min(expected) < 0.97 and len(expected) == 16
    for name, (options, tolerance) in cases.items():
        found = learned(run(name, *STILL, *LEARNED, "--max_train_steps", "4", *options))
        assert found == pytest.approx(expected, rel=tolerance), name


def batch_of(timesteps: list[int], weights: list[float]) -> Batch:
    """A batch of which learned weights read only the timesteps and the shares in the loss."""
    size, noise = torch.zeros(len(weights), 2, dtype=torch.int64), torch.zeros(len(weights), 4, 1, 1)
    return Batch(
        position=Position(0, 0, 0, 1), latents=noise, images=None, encoding_noise=None, noise=noise, input_noise=None,
        timesteps=torch.tensor(timesteps), original_size=size, crop_top_left=size, target_size=size,
        weights=torch.tensor(weights),
    )  # fmt: skip


def test_gradients_of_micro_batches_add_up() -> None:
    """Two micro-batches of an optimizer step teach what their images teach as one batch, and two steps do not."""
    ways: dict[str, list[list[slice]]] = {
        "one": [[slice(0, 4)]], "halves": [[slice(0, 2), slice(2, 4)]], "steps": [[slice(0, 2)], [slice(2, 4)]],
    }  # fmt: skip
    losses, timesteps, shares = torch.tensor([0.5, 0.25, 4.0, 0.0]), [10, 400, 800, 999], [0.25, 0.25, 0.5, 0.0]
    found = {}
    for way, steps in ways.items():
        weights = learned_weights()
        for number, parts in enumerate(steps):
            for part in parts:
                weights.weighted(losses[part], batch_of(timesteps[part], shares[part]))
            logged = weights.step(number, Accelerator(cpu=True))
        if len(steps) == 1:
            assert logged["loss/weighted"] == 0.5 / 4 + 0.25 / 4 + 4 / 2
        found[way] = weights.network.weight.detach()
    torch.testing.assert_close(found["halves"], found["one"], rtol=1e-5, atol=1e-7)
    assert (found["steps"] - found["one"]).abs().max() > 1e-3


def learned_weights(**options) -> LearnedWeights:
    config = Config(edm2_loss_weighting=True, **options)
    return LearnedWeights(config, build_objective(config.objective), torch.device("cpu"), steps=10)


@pytest.mark.parametrize("loss", [0.0, -0.3])
def test_losses_without_a_logarithm_give_a_bounded_weight(loss: float) -> None:
    """A loss is 0 under a black mask, and a contrastive loss may be negative."""
    weights, batch = learned_weights(edm2_loss_weighting_optimizer_lr=0.2), batch_of([500], [1.0])
    for number in range(200):
        weights.weighted(torch.tensor([loss]), batch)
        weights.step(number, Accelerator(cpu=True))
    assert 1e3 < weights.curve()[500] < 2e4


def test_two_processes_learn_what_one_does_with_twice_the_batch(work) -> None:
    options = [*LEARNED, *SGD, *FLOAT32, "--no-save_state", "--multires_noise_iterations", "0"]
    one = run("one", *options, "--train_batch_size", "4")
    train_on_two_processes(arguments("two", *QUICK, *options, "--train_batch_size", "2"))
    for name in ("loss", "loss/weighted"):
        values = [[row[name] for row in found if "loss" in row] for found in (one, rows("two"))]
        assert values[0] == pytest.approx(values[1], rel=1e-4), name
    assert learned(rows("two")) == pytest.approx(learned(one), rel=1e-4)
    assert curves(rows("two"))[6] == pytest.approx(curves(one)[6], rel=1e-3)


def test_weights_of_images_are_not_learned_away(work) -> None:
    """If every image has the loss weight 3, the logged loss is 3 times as high, and the learned weights are equal."""
    Path("rules.toml").write_text('[paths]\n"*" = { loss_weight = 3 }\n')
    options = [*STILL, *LEARNED, "--edm2_loss_weighting_max_grad_norm", "0", "--max_train_steps", "4"]
    plain, found = run("plain", *options), run("weighted", *options, "--image_weights", "rules.toml")
    for name in ("loss", "loss/weighted"):
        expected = [3 * row[name] for row in plain if "loss" in row]
        assert [row[name] for row in found if "loss" in row] == pytest.approx(expected, rel=1e-5)
    assert learned(found) == pytest.approx(learned(plain), rel=1e-4)


def test_the_schedule_of_the_rate_is_that_of_forks() -> None:
    """A rise, a constant rate, and an inverse square root, as torch's LambdaLR gives it for the forks' formula."""
    options = LearnedWeightOptions(
        edm2_loss_weighting_lr_scheduler=True,
        edm2_loss_weighting_lr_scheduler_warmup_percent=0.1,
        edm2_loss_weighting_lr_scheduler_constant_percent=0.3,
        edm2_loss_weighting_lr_scheduler_decay_scaling=1.5,
    )

    def forks(step: int) -> float:
        return step / 20 if step <= 20 else 1 / (max(step / 80, 1) ** 1.5) ** 0.5

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.02)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, forks)
    for step in range(200):
        assert 0.02 * rate_factor(options, step, 200) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        scheduler.step()
    assert rate_factor(LearnedWeightOptions(), 0, 200) == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"edm2_loss_weighting_optimizer": "AdamX"}, "edm2_loss_weighting_optimizer = 'AdamX'"),
        ({"edm2_loss_weighting_optimizer": "torch.optim.LBFGS"}, "edm2_loss_weighting_optimizer_args = "),
        ({"edm2_loss_weighting_optimizer_args": "beta=1"}, "edm2_loss_weighting_optimizer_args = 'beta=1'"),
        (
            {"edm2_loss_weighting_optimizer": "LBFGS", "edm2_loss_weighting_optimizer_args": "history_size=5"},
            "cannot train the network of learned weights",
        ),
    ],
)
def test_an_optimizer_that_does_not_fit_is_refused_by_its_own_option(options: dict, expected: str) -> None:
    with pytest.raises(UserError, match=r"^edm2_loss_weighting_optimizer") as caught:
        check_learned_weights(Config(edm2_loss_weighting=True, **options), torch.device("cpu"))
    assert expected in str(caught.value)
    check_learned_weights(Config(**options), torch.device("cpu"))


@pytest.mark.parametrize(
    "text",
    [
        "{'weight_decay': 0, 'betas': (0.9,0.99)}",
        ["{'weight_decay': 0, 'betas': (0.9,0.99)}"],
        "weight_decay=0 betas=0.9,0.99",
    ],
    ids=["dictionary", "command line", "arguments"],
)
def test_arguments_are_read_as_forks_write_them(text: str | list[str]) -> None:
    weights = learned_weights(edm2_loss_weighting_optimizer_args=text)
    assert weights.optimizer.defaults["betas"] == (0.9, 0.99) and weights.optimizer.defaults["weight_decay"] == 0


def test_the_curve_covers_the_trained_timesteps() -> None:
    noise = list(learned_weights(min_timestep=100, max_timestep=300).curve())
    flow = learned_weights(min_timestep=100, max_timestep=300, flow_model=True).curve()
    assert noise[:2] == [100, 102] and noise[-1] == 299
    assert min(flow) == 100 and max(flow) == 300 and set(flow.values()) == {1.0}
