"""Trainings that convert the small model that draws (tests/toy) to other objectives, and what is measured on the way.

The small model predicts noise. Each arm trains it on as many steps, images and random numbers as the others; only the
objective and its options differ. The options of the objective come from a recipe in configs/, which is a real one for
full-size SDXL. SMALL replaces what the recipe says of size, hardware and time. Used by scripts/benchmarks/objectives.py
and scripts/benchmarks/proof_flows.py.
"""

import json
import multiprocessing
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from scripts.benchmarks.proof_runs import CONFIG, ROOT, TOY, train, validations
from scripts.toy.judge import Score, draw_texts, held_out_scenes, judge, sheet
from scripts.toy.style import save_pair
from scripts.toy.world import caption, draw, scenes
from sdxl_finetune.batch import to_images
from sdxl_finetune.config.training_options import ObjectiveKind
from sdxl_finetune.diffusion.objective import Objective, build_objective
from sdxl_finetune.files import atomic_path
from sdxl_finetune.output.colours import NAMES, compare, measure

FLOW, VELOCITY = ROOT / "configs" / "flow.toml", ROOT / "configs" / "velocity.toml"
SMALL = [
    *("--resolution", "64", "--no-enable_bucket", "--no-bucket_no_upscale", "--no-shuffle_caption"),
    *("--max_token_length", "75", "--train_batch_size", "16", "--vae_batch_size", "16"),
    *("--no-gradient_checkpointing", "--mixed_precision", "no", "--no-full_bf16", "--no-fused_backward_pass"),
    *("--optimizer_type", "AdamW", "--learning_rate", "5e-4", "--learning_rate_te1", "", "--learning_rate_te2", ""),
    *("--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "20", "--min_snr_gamma", ""),
    *("--no-train_text_encoder", "--cache_latents_to_disk", "--caption_dropout_rate", "0.1", "--keep_tokens", "0"),
    *("--ema_half_life", "500", "--colour_check_every_n_steps", "", "--max_data_loader_n_workers", "0"),
    *("--max_train_epochs", "", "--save_precision", "fp16", "--sample_prompts", "", "--sample_every_n_steps", ""),
    *("--validation_split", "0.03", "--validation_timesteps", "10", "--validate_every_n_steps", "100"),
]
"""Options of every arm, in place of those that a recipe has for full-size SDXL on a GPU."""
UNSHIFTED = ("--flow_uniform_static_ratio", "")
"""Pictures of 64 pixels need no shift to more noise."""
GUIDANCE, SAMPLER = 2.0, "euler"
"""The small model follows captions best at this guidance scale (`guidance` in docs/proof.md)."""
WORKERS = 2
"""Arms that are trained at once. Each has one core."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A conversion: the objective, the recipe that it comes from, and the options that differ from the recipe."""

    kind: ObjectiveKind
    config: Path
    options: tuple[str, ...] = ()
    often: bool = False
    """True if pictures are drawn at all steps of the plan, False for an early step and the last one."""

    @property
    def objective(self) -> Objective:
        return build_objective(self.kind, zero_terminal_snr=self.kind == "velocity")


ARMS: Mapping[str, Arm] = {
    "noise": Arm(kind="noise", config=CONFIG, often=True),
    "velocity": Arm(kind="velocity", config=VELOCITY, often=True),
    "flow": Arm(kind="flow", config=FLOW, options=UNSHIFTED, often=True),
    "flow-uniform": Arm(kind="flow", config=FLOW, options=(*UNSHIFTED, "--flow_timestep_distribution", "uniform")),
    "flow-paired": Arm(kind="flow", config=FLOW, options=(*UNSHIFTED, "--flow_use_ot")),
    "flow-weighted": Arm(kind="flow", config=FLOW, options=(*UNSHIFTED, "--edm2_loss_weighting")),
}
"""The arm `noise` is the control: it goes on with the objective that the model already has."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of a measurement. The defaults are those of the tables in the documentation."""

    pictures: int = 2000
    """Drawings to train on, less those that are held out. None of them was used to make the model."""
    steps: int = 300
    """Optimizer steps of 16 images."""
    judged: tuple[int, ...] = (25, 50, 100, 150, 200, 300)
    """Steps whose checkpoints are drawn with."""
    captions: int = 100
    """Captions that are drawn at each of these steps. No training has seen them."""
    shown: int = 6
    """Pictures of a row of the contact sheet, which are the first ones drawn."""

    @property
    def save_every(self) -> int:
        return int(np.gcd.reduce(self.judged))


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Measurements of pictures that were drawn with one checkpoint."""

    right: Score
    colours: dict[str, float]
    """Drift of mean, contrast and saturation against drawings of the same captions; levels are from 0 to 1."""
    row: str
    """PNG file with the first pictures side by side."""

    @classmethod
    def load(cls, path: Path) -> "Drawn":
        kept = json.loads(path.read_text())
        return cls(right=Score(**kept["right"]), colours=kept["colours"], row=kept["row"])


@dataclass(frozen=True, kw_only=True)
class Result:
    """Measurements of one arm with one seed."""

    drawn: dict[int, Drawn]
    """Pictures by optimizer step."""
    losses: dict[int, dict[str, float]]
    """Losses of held out images by optimizer step, as Validation names them."""


def measure_all(folder: Path, jobs: Sequence[tuple[str, int]], plan: Plan) -> dict[tuple[str, int], Result]:
    """Trains and measures arms with seeds, WORKERS at a time. The result has the jobs as keys.

    Whatever the folder holds already is used again.
    """
    write_pictures(folder, plan)
    with workers() as pool:
        futures = {(arm, seed): pool.submit(measure_arm, folder, arm, seed, plan) for arm, seed in jobs}
        return {job: future.result() for job, future in futures.items()}


def workers() -> ProcessPoolExecutor:
    """Starts processes that compute with one core each, and their trainings too."""
    os.environ["OMP_NUM_THREADS"] = "1"
    return ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn"))


def two_of(steps: Sequence[int]) -> tuple[int, ...]:
    """An early step, at which most models do not follow captions yet, and the last one."""
    return tuple(dict.fromkeys([steps[min(1, len(steps) - 1)], steps[-1]]))


def write_pictures(folder: Path, plan: Plan) -> None:
    """Draws the training images, and encodes their latents for all arms.

    Raises SystemExit if the folder holds measurements of another plan.
    """
    sizes, kept = json.dumps(asdict(plan)), folder / "plan.json"
    if kept.exists() and kept.read_text() != sizes:
        sys.exit(
            f"{folder}: holds measurements of other sizes ({kept.read_text()}). Remove the folder, or name another"
        )
    pictures = folder / "pictures"
    if not pictures.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(pictures) as unfinished:
            unfinished.mkdir()
            for number, scene in enumerate(islice(scenes(7, for_training=True), plan.pictures)):
                save_pair(unfinished, number, draw(scene, random.Random(f"objectives {number}")), caption(scene))
    kept.write_text(sizes)
    options = ["--config", str(CONFIG), "--train_data_dir", str(pictures), "--output_dir", str(folder), *SMALL]
    options += ["--pretrained_model_name_or_path", str(TOY), "--cache_dir", str(folder / "cache")]
    main = "import sys; from sdxl_finetune.cli import cache; sys.exit(cache())"
    with (folder / "cache.log").open("w") as log:
        environment = os.environ | {"ACCELERATE_USE_CPU": "1"}
        subprocess.run(
            [sys.executable, "-c", main, *options], check=True, cwd=ROOT, stdout=log, stderr=log, env=environment
        )


def options_of(arm: Arm, seed: int, plan: Plan, cache: Path) -> list[str]:
    """Returns the options of an arm's training, apart from its paths."""
    length = ["--max_train_steps", str(plan.steps), "--save_every_n_steps", str(plan.save_every)]
    return [*SMALL, *length, "--seed", str(seed), "--cache_dir", str(cache), *arm.options]


def measure_arm(folder: Path, name: str, seed: int, plan: Plan) -> Result:
    """Trains one arm, draws with its checkpoints, and removes all of them but the last."""
    arm, run = ARMS[name], f"{name}-{seed}"
    options = options_of(arm, seed, plan, folder / "cache")
    last = train(folder, run, *options, data="pictures", config=arm.config)
    drawn = {}
    for step in plan.judged if arm.often else two_of(plan.judged):
        checkpoint = last if step == plan.steps else last.with_name(f"model-step{step:08d}.safetensors")
        drawn[step] = draw_with(checkpoint, last.with_name(f"drawn-{step}.json"), arm.objective, plan)
    for checkpoint in last.parent.glob("model-step*.safetensors"):
        checkpoint.unlink()
    return Result(drawn=drawn, losses=validations(last))


def draw_with(model: Path, kept: Path, objective: Objective, plan: Plan) -> Drawn:
    """Draws held-out captions with a checkpoint and measures the pictures. The result is kept in the file `kept`."""
    if kept.exists():
        return Drawn.load(kept)
    expected = held_out_scenes(plan.captions)
    texts = [caption(scene) for scene in expected]
    images = draw_texts(model, texts, scale=GUIDANCE, objective=objective, sampler=SAMPLER)
    row = kept.with_suffix(".png")
    sheet(images[: plan.shown], columns=plan.shown).save(row)
    truth = [draw(scene, random.Random(f"expected {number}")) for number, scene in enumerate(expected)]
    drifts = compare(figures(images), figures(truth))
    colours = {drift.name: drift.value for drift in drifts}
    result = Drawn(right=judge(expected, images), colours=colours, row=str(row))
    with atomic_path(kept) as path:
        path.write_text(json.dumps(asdict(result), indent=1))
    return result


def figures(images: Sequence[Image.Image]) -> np.ndarray:
    """Mean, contrast and saturation of each picture, in the order of NAMES."""
    pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
    result: np.ndarray = measure(to_images(pixels)).numpy()
    assert result.shape == (len(images), len(NAMES))
    return result
