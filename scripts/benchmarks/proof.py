"""Contrasts that must come out as theory says: python -m scripts.benchmarks.proof [NAME ...] [--folder build/proof]

Each trains the small model that draws (tests/toy) with sdxl-train, twice or more, differing in one thing, and measures
by what plain code reads off generated pictures. The table goes to docs/proof.md with --write.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from scripts.benchmarks.proof_reads import (
    TWIN,
    Mean,
    colours_and_shapes,
    cut_off,
    in_order,
    in_style,
    is_sure,
    without_caption,
    write_pairs,
    write_twins,
    write_wide,
)
from scripts.toy.style import write_pictures
from scripts.toy.world import NEW_STYLE
from sdxl_finetune.data.tokens import load_encoding, token_ids

ROOT = Path(__file__).parents[2]
TOY = ROOT / "tests" / "toy" / "toy.safetensors"
CONFIG = ROOT / "configs" / "quickstart.toml"
PARTS = ("model.diffusion_model.", "conditioner.embedders.0.", "conditioner.embedders.1.")
PROJECTION = "conditioner.embedders.1.model.text_projection"
Tensors = Mapping[str, torch.Tensor]
SHORT = ["--max_train_epochs", "3"]
HELD_OUT = [*SHORT, "--validation_split", "0.1", "--validation_timesteps", "20"]
SEEDS = ("0", "1", "2")
PAGE = ROOT / "docs" / "proof.md"
TABLE = """| name | what | theory says | measured | holds |
|---|---|---|---|---|
"""
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    theory: str
    measured: str
    holds: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *CONTRASTS], help="which contrasts; all if none is named")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "proof")
    parser.add_argument("--write", action="store_true", help="write what the folder holds into docs/proof.md")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    write_pictures(arguments.folder / "style")
    for name in arguments.names or CONTRASTS:
        row = CONTRASTS[name](arguments.folder.resolve())
        (arguments.folder / f"{name}.json").write_text(json.dumps(vars(row)))
        print(f"{name}: {row.measured} ({'holds' if row.holds else 'DOES NOT HOLD'})", flush=True)
    found = [arguments.folder / f"{name}.json" for name in CONTRASTS]
    rows = {path.stem: Row(**json.loads(path.read_text())) for path in found if path.exists()}
    if arguments.write:
        write(rows)
    sys.exit(0 if all(row.holds for row in rows.values()) else 1)


def write(rows: Mapping[str, Row]) -> None:
    """The table at the end of the page; what stands before it is written by hand."""
    words = PAGE.read_text(encoding="utf-8")
    lines = [
        f"| `{name}` | {row.what} | {row.theory} | {row.measured} | {'yes' if row.holds else '**no**'} |"
        for name, row in rows.items()
    ]
    PAGE.write_text(words[: words.index(TABLE)] + TABLE + "\n".join(lines) + "\n", encoding="utf-8")


def train(
    folder: Path,
    name: str,
    *options: str,
    processes: int = 1,
    model: Path = TOY,
    data: str = "style",
    program: str = "sdxl_finetune",
) -> Path:
    """The weights that a run ends with; a run that has been made is not made again."""
    out = folder / name
    places = ["--output_dir", str(out), "--logging_dir", str(out / "logs"), "--output_name", "model"]
    places += ["--pretrained_model_name_or_path", str(model), "--train_data_dir", str(folder / data)]
    quiet = ["--sample_prompts", "", "--sample_every_n_epochs", "0", "--no-sample_at_first"]
    quiet += ["--save_every_n_epochs", ""]
    launch = LAUNCH if processes > 1 else []
    command = [sys.executable, *launch, "-m", program, "--config", str(CONFIG), *places, *quiet, *options]
    done = out / "model.safetensors"
    if not done.exists():
        if "--resume" not in options:
            shutil.rmtree(out, ignore_errors=True)  # what was interrupted begins anew
        cpu = {} if torch.cuda.device_count() >= processes else {"ACCELERATE_USE_CPU": "1"}
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with (folder / f"{name}.log").open("w") as log:
            environment = os.environ | cpu | {"PYTHONPATH": paths}
            subprocess.run(command, check=True, cwd=ROOT, stderr=log, env=environment)
    return done


def validation(model: Path, at: int = -1) -> dict[str, float]:
    """The last figures of a run, or those of another time."""
    (log,) = (model.parent / "logs").glob("*/metrics.jsonl")
    return [row["validation"] for row in map(json.loads, log.read_text().splitlines()) if "validation" in row][at]


def losses(folder: Path, name: str, *options: str, model: Path = TOY) -> list[dict[str, float]]:
    """Validation losses of held out images, with the same noise for all, after 180 steps, for three seeds."""
    runs = [train(folder, f"{name}-{seed}", *HELD_OUT, *options, "--seed", seed, model=model) for seed in SEEDS]
    return [validation(run) for run in runs]


def more(ones: Sequence[dict[str, float]], others: Sequence[dict[str, float]], name: str = "loss") -> Mean:
    """By what share the one losses are above the others of the same seeds."""
    return Mean.of([one[name] / other[name] - 1 for one, other in zip(ones, others, strict=True)])


def encoders(folder: Path) -> Row:
    trained, frozen = losses(folder, "right"), losses(folder, "frozen", "--no-train_text_encoder")
    worse = more(frozen, trained)
    return Row(
        "text encoders trained or frozen, a tag of a new word, 180 steps, three seeds",
        "trained encoders learn more",
        f"held out loss {average(trained):.4f} trained, {average(frozen):.4f} frozen: {worse} more",
        worse.sure,
    )


def twins(folder: Path) -> Row:
    """A tag for the frame and another for none, of new words that the encoders take for one another."""
    write_twins(folder / "twins")
    alike = twin_words(TOY, folder / "twins.safetensors")
    told = []
    for name, options in (("twins-trained", []), ("twins-frozen", ["--no-train_text_encoder"])):
        model = train(folder, name, *options, model=alike, data="twins")
        told.append([in_style(model, 1.0, word) for word in (NEW_STYLE, TWIN)])
    trained, frozen = told
    return Row(
        f"text encoders trained or frozen, tags of two new words with the same vectors, {NEW_STYLE} framed and {TWIN}"
        " not, 420 steps",
        "no U-Net can tell what frozen encoders do not, and trained ones learn to",
        f"framed if told {NEW_STYLE} and if told {TWIN}: {trained[0]}, {trained[1]} trained; {frozen[0]}, {frozen[1]}"
        " frozen",
        trained[0].above(trained[1]) and not frozen[0].above(frozen[1]),
    )


def min_snr(folder: Path) -> Row:
    """The quickstart's trainings have it."""
    with_, without = losses(folder, "right"), losses(folder, "min_snr-off", "--min_snr_gamma", "")
    clean, noisy = (more(with_, without, f"loss/t{at}") for at in ("025", "875"))
    return Row(
        "min-SNR weighting, gamma 5, and none; three seeds",
        "errors at little noise count less (at timestep 25 an eighth), so that they grow against those at much noise",
        f"held out loss against that without: {clean} at timestep 25, {noisy} at 875",
        clean.above(noisy),
    )


def pooled(folder: Path) -> Row:
    """The reference computes text encoder 2's pooled vector with the matrix as it lies in the file. Losses are
    compared: what follows of them in pictures is less than chance makes of hundreds.
    """
    right = losses(folder, "right")
    wrong = losses(folder, "pooled-wrong", model=turned(TOY, folder / "turned.safetensors"))
    start, other_start = (validation(folder / name / "model.safetensors", 0) for name in ("right-0", "pooled-wrong-0"))
    used = []
    for seed in SEEDS:
        ended = folder / f"pooled-wrong-{seed}" / "model.safetensors"
        once = [*HELD_OUT, "--max_train_epochs", "", "--max_train_steps", "1"]
        model = turned(ended, ended.with_name("turned.st"))
        used.append(validation(train(folder, f"pooled-used-{seed}", *once, model=model), 0))
    worse = more(used, right)
    return Row(
        "pooled vector: right, or untransposed as in the reference and then used as interfaces do; three seeds",
        "the other vector makes the model worse, and training with it leaves a model that is worse in interfaces",
        f"held out loss: right {start['loss']:.4f} before and {average(right):.4f} after training, untransposed"
        f" {other_start['loss']:.4f} and {average(wrong):.4f}, and as interfaces use that {average(used):.4f}: {worse}"
        " more than right",
        start["loss"] < other_start["loss"] and worse.sure,
    )


def crops(folder: Path) -> Row:
    """Trains on parts of wide pictures with an object at the left.

    The base model knows only the crop 0,0, so the crop conditioning does nothing until other crops are learned. The
    place of an object is decided at high noise, so high noise is trained.
    """
    cut = write_wide(folder / "wide", folder / "cut")
    asked = ["--max_train_epochs", "24", "--no-cache_latents", "--no-train_text_encoder"]
    asked += ["--min_timestep", "400", "--learning_rate", "1e-3", "--random_crop"]
    truth = cut_off(train(folder, "crops-told", *asked, data="wide"))
    letter_box = cut_off(
        train(folder, "crops-letter-box", *asked, data="wide", program="scripts.benchmarks.letter_box")
    )
    return Row(
        "random crops: told to the model as they are, or as the reference tells them (letter-box), 720 steps",
        "a model that was told the truth cuts off fewer objects at crop 0,0",
        f"of 600 objects, cut off by the edge: {cut_off(TOY)} before, {truth} told the truth, {letter_box} told"
        f" otherwise; in the data {cut}",
        letter_box.above(truth),
    )


def keep_tokens(folder: Path) -> Row:
    """The order of a caption's objects says which is left and which is right."""
    write_pairs(folder / "pairs")
    asked = ["--max_train_epochs", "12", "--shuffle_caption"]
    before = in_order(TOY)
    kept = in_order(train(folder, "tokens-kept", *asked, "--keep_tokens", "9", data="pairs"))
    shuffled = in_order(train(folder, "tokens-shuffled", *asked, "--keep_tokens", "1", data="pairs"))
    return Row(
        "keep_tokens: all tags in place, or all but the first shuffled, on 480 drawings of two objects",
        "shuffled tags say nothing about left and right, which by chance is right in half",
        f"shapes in order, of pictures with both shapes ({before.of}, {kept.of}, {shuffled.of}): {before} before,"
        f" {kept} kept, {shuffled} shuffled",
        kept.above(shuffled),
    )


def dropout(folder: Path) -> Row:
    """Half the pictures of the style hang in frames; the base model's never do."""
    often, never = (
        without_caption(train(folder, f"dropout-{rate}", "--caption_dropout_rate", rate)) for rate in ("0.3", "0")
    )
    away = [abs(one.value - 0.5) for one in (often, never)]
    return Row(
        "caption_dropout_rate 0.3 and 0, the 420 steps of the quickstart",
        "without a caption a model draws like the data (framed: half) only if it was trained without captions too",
        f"framed without a caption: {often} and {never}",
        is_sure(away[1] - away[0], often.error, never.error),
    )


def guidance(folder: Path) -> Row:
    """Exaggerates what sets a caption apart from pictures in general. What is known well wins: a tag that is only half
    learned gives way to the ground, which is known well and covers the whole picture.
    """
    right = [colours_and_shapes(TOY, scale, count=600) for scale in (1.0, 2.0, 5.0)]
    half, whole = (
        [in_style(train(folder, name, *options), scale) for scale in (1.0, 5.0)]
        for name, options in (("short", SHORT), ("plain", []))
    )
    return Row(
        "guidance at scale 1, 2 and 5",
        "what captions say comes out clearer up to a point, and is distorted beyond; what was half learned gives way",
        f"colours and shapes right: {right[0]}, {right[1]}, {right[2]}; in the style at scale 1 and 5:"
        f" {half[0]}, {half[1]} after 180 steps, {whole[0]}, {whole[1]} after 420",
        right[1].above(right[0])
        and right[1].above(right[2])
        and half[0].above(half[1])
        and not whole[0].above(whole[1]),
    )


def full_bf16(folder: Path) -> Row:
    """Trains with weights that are rounded to bf16 after each step, as in the reference's full_bf16.

    All else is float32, so that only the rounding of the weights is measured. CPUs are slow at bf16.
    """
    rates = ["--learning_rate", "3e-5", "--learning_rate_te1", "1e-6", "--learning_rate_te2", "1e-6"]
    asked = [*SHORT, *rates, "--validation_split", "0.1", "--save_precision", "float", "--ema_half_life", ""]
    start = folder / "start.safetensors"
    starts = as_bf16(TOY, start)
    exact = train(folder, "bf16-exact", *asked, model=start)
    rounded = train(
        folder, "bf16-rounded", *asked, "--optimizer_type", "scripts.benchmarks.rounding.RoundingAdamW", model=start
    )
    before, losses = validation(exact, 0)["loss"], [validation(model)["loss"] for model in (exact, rounded)]
    ends = [load_file(model) for model in (exact, rounded)]
    errors = [lost(part, starts, *ends) for part in PARTS]
    said = ", ".join(f"{error:.2f}" for error in errors)
    return Row(
        "full_bf16 with weights rounded to nearest, at the users' rates (3e-5, 1e-6, 1e-6)",
        "most of what training changes is lost",
        f"held out loss {before:.4f} before, {losses[0]:.4f} in float32, {losses[1]:.4f} rounded; relative error of the"
        f" change of U-Net and text encoders: {said}",
        losses[0] < losses[1] and min(errors) > 0.5,
    )


def resumed(folder: Path) -> Row:
    plain = train(folder, "short", *SHORT)
    asked = [*SHORT, "--save_state", "--resume", "auto", "--save_every_n_steps", "100"]
    first = train(folder, "resume-twice", *asked)
    for path in (first, first.with_name("model-state")):
        if path.exists():
            path.rename(path.with_name(f"old-{path.name}"))
    again = train(folder, "resume-twice", *asked)
    expected, found = load_file(plain), load_file(again)
    same = all(torch.equal(expected[name], found[name]) for name in expected)
    return Row(
        "a run that goes on from the state of step 100, of 180 steps",
        "it ends with the same weights",
        f"weights {'equal, bit for bit' if same else 'differ'}",
        same,
    )


def processes(folder: Path) -> Row:
    models = (
        train(folder, "short", *SHORT),
        train(folder, "processes-two", *SHORT, "--train_batch_size", "8", processes=2),
    )
    (one, two), (one_right, two_right) = map(in_style, models), map(colours_and_shapes, models)
    return Row(
        "two processes with half the batch",
        "they learn what one does",
        f"in the style {one} and {two}, colours and shapes right {one_right} and {two_right}",
        abs(one.value - two.value) <= 0.05 and abs(one_right.value - two_right.value) <= 0.05,
    )


CONTRASTS: dict[str, Callable[[Path], Row]] = {
    one.__name__: one
    for one in (encoders, twins, guidance, dropout, min_snr, pooled, crops, keep_tokens, resumed, processes, full_bf16)
}


def average(ends: Sequence[dict[str, float]]) -> float:
    return float(np.mean([end["loss"] for end in ends]))


def save_like(model: Path, target: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Writes tensors with the metadata of another file."""
    with safe_open(model, "pt") as file:
        save_file(tensors, target, file.metadata())
    return target


def twin_words(model: Path, target: Path) -> Path:
    """Writes a copy of a model in which both encoders have one vector for the two words."""
    (one,), (other,) = (token_ids(word, load_encoding(None)) for word in (NEW_STYLE, TWIN))
    tensors = load_file(model)
    for name, tensor in tensors.items():
        if name.endswith("token_embedding.weight"):
            tensor[other] = tensor[one]
    return save_like(model, target, tensors)


def turned(model: Path, target: Path) -> Path:
    """Writes a copy of a model with text encoder 2's projection transposed."""
    tensors = load_file(model)
    tensors[PROJECTION] = tensors[PROJECTION].T.contiguous()
    return save_like(model, target, tensors)


def as_bf16(model: Path, target: Path) -> dict[str, torch.Tensor]:
    """Writes the same file in bf16, and returns its tensors."""
    tensors = {name: one.bfloat16() if one.is_floating_point() else one for name, one in load_file(model).items()}
    save_like(model, target, tensors)
    return tensors


def lost(part: str, before: Tensors, exact: Tensors, other: Tensors) -> float:
    """How far the change of the tensors that begin with `part` is from the exact one, by the size of that."""
    names = [name for name, one in before.items() if name.startswith(part) and one.is_floating_point()]
    true, found = ([end[name].float() - before[name].float() for name in names] for end in (exact, other))
    wrong = sum(float((a - b).square().sum()) for a, b in zip(true, found, strict=True))
    return math.sqrt(wrong / max(sum(float(one.square().sum()) for one in true), 1e-30))


if __name__ == "__main__":
    main()
