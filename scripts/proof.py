"""Contrasts that must come out as theory says: python scripts/proof.py [NAME ...] [--folder build/proof]

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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from proof_reads import (
    SURE,
    colours_and_shapes,
    cut_off,
    in_order,
    in_style,
    without_caption,
    write_pairs,
    write_wide,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toy_style import write_pictures

ROOT = Path(__file__).parent.parent
TOY = ROOT / "tests" / "toy" / "toy.safetensors"
CONFIG = ROOT / "configs" / "quickstart.toml"
PARTS = ("model.diffusion_model.", "conditioner.embedders.0.", "conditioner.embedders.1.")
PROJECTION = "conditioner.embedders.1.model.text_projection"
Tensors = Mapping[str, torch.Tensor]
SHORT = ["--max_train_epochs", "3"]
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
    lines = [
        f"| `{name}` | {row.what} | {row.theory} | {row.measured} | {'yes' if row.holds else '**no**'} |"
        for name, row in rows.items()
    ]
    (ROOT / "docs" / "proof.md").write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")


HEAD = """# Does training teach?

Each line is trainings of the small model that draws (`tests/toy`, made by `scripts/make_toy_model.py`) with
`sdxl-train` and the options of `configs/quickstart.toml`, which differ in one thing. What they have learned is read by
plain code off pictures (`scripts/proof_reads.py`): 200 of them where no other number stands, of captions that no
training has seen (but for *crops*). Behind ± stands one standard error of the number of pictures; a difference of
shares counts if it is three of them. Seeds are fixed, and but for *pooled* there is one training of each kind: what
other seeds would make of it is not in the errors, and *min_snr* and *full_bf16* have none.

`python scripts/proof.py --write` makes everything and this page, on two free CPU cores in about 40 minutes (the sum of
its parts); `python scripts/proof.py NAME` makes one line. Trainings are kept in `build/proof` and not made again;
delete a folder there to repeat it.

*encoders* does not come out as theory says: 60 pictures after 420 steps with guidance had said 100 % trained and 88 %
frozen; of 200 of the same models it is 96 % ± 1 and 92 % ± 2. After 180 steps, where less is learned and more could be
told apart (the line in the table), it is no clearer. If the trained encoders are ahead it is by less than these
pictures can tell. The likely cause, which is not tested: frozen encoders, too, tell new tokens from others, and the
U-Net learns alone what they mean.

Four lines said little in an earlier form, for reasons that are worth knowing:

- *dropout*, 180 steps: 25 % were framed without a caption, where the data say half. That was no matter of dropout: when
  it was asked for frames, too, that model drew them in but half of its pictures. Now it trains until they are known.
- *pooled* compared how well sixty pictures followed captions; right and wrong could not be told apart. Most of what a
  caption says reaches this model through cross-attention, and the pooled vector changes the loss by percents. So the
  losses of held out images are compared, with the same noise for all, over three seeds.
- *crops* read sixty pictures of 6 different captions: there are no more held out ones of one object. What they showed
  (23 % cut off told, 38 % hidden) is not so of others: of 200 pictures of trained captions 48 % and 51 % were cut off,
  as in the data, and told of crops 0,0 and 0,60 the model drew the same. 360 steps had begun to move the weights that
  the crop goes through (four times as far as those beside them), but not the pictures: the first model knew no crop
  but 0,0. Now steps are twice as many and all at much noise, where it is decided what stands where. What the reference
  tells (`scripts/letter_box.py`) differs in nothing else; files that were cut beforehand differ in original size, too.
  A first look at 200 pictures (30 % ± 3 and 39 % ± 3) did not decide, so that 600 are read. The base model cuts none:
  the truth lessens the harm at this length, and does not undo it.
- *keep_tokens* counted all pictures, of which a third or less show both objects right, and colours with shapes. The
  model that all begin with puts shapes in order always, but colours in half of the pictures (51 % ± 3 of 222): it never
  learned which colour is whose. So nothing can be lost of these, and shapes alone are read, where both are there
  (less often once tags are shuffled: shapes then run into one another).

| name | what | theory says | measured | holds |
|---|---|---|---|---|
"""


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
        paths = os.pathsep.join(filter(None, [str(ROOT / "scripts"), os.environ.get("PYTHONPATH")]))
        with (folder / f"{name}.log").open("w") as log:
            environment = os.environ | cpu | {"PYTHONPATH": paths}
            subprocess.run(command, check=True, cwd=ROOT, stderr=log, env=environment)
    return done


def validation(model: Path, at: int = -1) -> dict[str, float]:
    """The last figures of a run, or those of another time."""
    (log,) = (model.parent / "logs").glob("*/metrics.jsonl")
    return [row["validation"] for row in map(json.loads, log.read_text().splitlines()) if "validation" in row][at]


def encoders(folder: Path) -> Row:
    """After 420 steps both know the tag nearly always; who learns it sooner shows at 180, without guidance."""
    trained = in_style(train(folder, "short", *SHORT), 1.0)
    frozen = in_style(train(folder, "short-frozen", *SHORT, "--no-train_text_encoder"), 1.0)
    return Row(
        "text encoders trained or frozen, a tag of new tokens, 180 steps, no guidance",
        "trained encoders learn the tag sooner",
        f"in the style: {trained} trained, {frozen} frozen",
        trained.above(frozen),
    )


def min_snr(folder: Path) -> Row:
    asked = [*SHORT, "--validation_split", "0.1"]
    with_, without = (
        validation(train(folder, f"min_snr-{gamma or 'off'}", *asked, "--min_snr_gamma", gamma)) for gamma in ("5", "")
    )
    noisy, clean = (with_[f"loss/t{at}"] / without[f"loss/t{at}"] for at in (875, 125))
    return Row(
        "min-SNR weighting, gamma 5",
        "errors at little noise count less, so that they grow against those at much noise",
        f"held out loss against that without: {clean:.2f} at timestep 125, {noisy:.2f} at 875",
        clean > noisy,
    )


def pooled(folder: Path) -> Row:
    """The reference computes text encoder 2's pooled vector with the matrix as it lies in the file. Held out losses are
    compared, of one noise for all: what follows of them in pictures is less than chance makes of hundreds.
    """
    asked, once = ["--validation_split", "0.1"], ["--max_train_epochs", "", "--max_train_steps", "1"]
    other = turned(TOY, folder / "turned.safetensors")
    start, other_start, losses = 0.0, 0.0, []
    for seed in ("0", "1", "2"):
        right = train(folder, f"pooled-right-{seed}", *SHORT, *asked, "--seed", seed)
        wrong = train(folder, f"pooled-wrong-{seed}", *SHORT, *asked, "--seed", seed, model=other)
        used = train(folder, f"pooled-used-{seed}", *once, *asked, model=turned(wrong, wrong.with_name("turned.st")))
        start, other_start = validation(right, 0)["loss"], validation(wrong, 0)["loss"]
        losses.append([validation(right)["loss"], validation(wrong)["loss"], validation(used, 0)["loss"]])
    right, meant, as_used = np.array(losses).T
    worse = as_used / right - 1
    error = worse.std(ddof=1) / math.sqrt(len(worse))
    return Row(
        "pooled vector: right, or untransposed as in the reference and then used as interfaces do; three seeds",
        "the other vector makes the model worse, and training with it leaves a model that is worse in interfaces",
        f"held out loss: right {start:.4f} before and {right.mean():.4f} after training, untransposed {other_start:.4f}"
        f" and {meant.mean():.4f}, and as interfaces use that {as_used.mean():.4f}: {worse.mean():.1%} ±"
        f" {100 * error:.1f} worse than right",
        start < other_start and bool(worse.mean() > SURE * error),
    )


def crops(folder: Path) -> Row:
    """Parts of wide pictures with an object at the left. The base model knows no crop but 0,0, so that telling does
    nothing until the others are learned; where an object stands is decided at much noise, so that is trained.
    """
    cut = write_wide(folder / "wide", folder / "cut")
    asked = ["--max_train_epochs", "24", "--no-cache_latents", "--no-train_text_encoder"]
    asked += ["--min_timestep", "400", "--learning_rate", "1e-3", "--random_crop"]
    truth = cut_off(train(folder, "crops-told", *asked, data="wide"))
    letter_box = cut_off(train(folder, "crops-letter-box", *asked, data="wide", program="letter_box"))
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
        away[1] - away[0] > SURE * math.hypot(often.error, never.error),
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
    """Weights rounded to bf16 after each step, as the reference's full_bf16 does; the rest in float32 (CPUs are slow at
    bf16), so that nothing but the rounding of the weights is seen.
    """
    rates = ["--learning_rate", "3e-5", "--learning_rate_te1", "1e-6", "--learning_rate_te2", "1e-6"]
    asked = [*SHORT, *rates, "--validation_split", "0.1", "--save_precision", "float", "--ema_half_life", ""]
    start = folder / "start.safetensors"
    starts = as_bf16(TOY, start)
    exact = train(folder, "bf16-exact", *asked, model=start)
    rounded = train(folder, "bf16-rounded", *asked, "--optimizer_type", "rounding.RoundingAdamW", model=start)
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
    for one in (encoders, guidance, dropout, min_snr, pooled, crops, keep_tokens, resumed, processes, full_bf16)
}


def turned(model: Path, target: Path) -> Path:
    """The same file with text encoder 2's projection transposed."""
    tensors = load_file(model)
    tensors[PROJECTION] = tensors[PROJECTION].T.contiguous()
    with safe_open(model, "pt") as file:
        save_file(tensors, target, file.metadata())
    return target


def as_bf16(model: Path, target: Path) -> dict[str, torch.Tensor]:
    """Writes the same file in bf16, and returns its tensors."""
    tensors = {name: one.bfloat16() if one.is_floating_point() else one for name, one in load_file(model).items()}
    with safe_open(model, "pt") as file:
        save_file(tensors, target, file.metadata())
    return tensors


def lost(part: str, before: Tensors, exact: Tensors, other: Tensors) -> float:
    """How far the change of the tensors that begin with `part` is from the exact one, by the size of that."""
    names = [name for name, one in before.items() if name.startswith(part) and one.is_floating_point()]
    true, found = ([end[name].float() - before[name].float() for name in names] for end in (exact, other))
    wrong = sum(float((a - b).square().sum()) for a, b in zip(true, found, strict=True))
    return math.sqrt(wrong / max(sum(float(one.square().sum()) for one in true), 1e-30))


if __name__ == "__main__":
    main()
