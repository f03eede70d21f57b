"""Shows that training options have the effect that theory predicts.

    python -m scripts.benchmarks.proof [NAME ...] [--folder build/proof] [--write]

Each contrast trains the small model that draws (tests/toy) with sdxl-train at least twice. The runs differ in one
thing. It then draws images, reads them with plain code, or compares losses, and prints whether the prediction holds.
`--write` puts the results of the folder into the table of docs/proof.md.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from scripts.benchmarks.proof_flows import flow_pairing, flow_times, flow_weights
from scripts.benchmarks.proof_models import as_bf16, merge_words, relative_error, transpose_projection
from scripts.benchmarks.proof_reads import (
    TWIN,
    colours_and_shapes,
    cut_off,
    in_order,
    in_style,
    is_significant,
    without_caption,
    write_pairs,
    write_twins,
    write_wide,
)
from scripts.benchmarks.proof_runs import (
    HELD_OUT,
    ROOT,
    SEEDS,
    SHORT,
    TOY,
    Row,
    average,
    increase,
    losses,
    train,
    validation,
)
from scripts.toy.style import write_pictures
from scripts.toy.world import NEW_STYLE

PARTS = ("model.diffusion_model.", "conditioner.embedders.0.", "conditioner.embedders.1.")
"""Start of the tensor names of the U-Net, text encoder 1 and text encoder 2 in a checkpoint file."""
PAGE = ROOT / "docs" / "proof.md"
TABLE = """| name | what | theory says | measured | holds |
|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *CONTRASTS], help="contrasts to measure (default: all)")
    parser.add_argument(
        "--folder",
        type=Path,
        default=ROOT / "build" / "proof",
        help="folder for runs and results. Finished runs in it are used again",
    )
    parser.add_argument("--write", action="store_true", help="write the results in the folder into docs/proof.md")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    write_pictures(arguments.folder / "style")
    for name in arguments.names or CONTRASTS:
        row = CONTRASTS[name](arguments.folder.resolve())
        (arguments.folder / f"{name}.json").write_text(json.dumps(vars(row)))
        print(f"{name}: {row.measured} ({'holds' if row.holds else 'DOES NOT HOLD'})", flush=True)
    results = [arguments.folder / f"{name}.json" for name in CONTRASTS]
    rows = {path.stem: Row(**json.loads(path.read_text())) for path in results if path.exists()}
    if arguments.write:
        write(rows)
    sys.exit(0 if all(row.holds for row in rows.values()) else 1)


def write(rows: Mapping[str, Row]) -> None:
    """Replaces lines of the table at the end of docs/proof.md. Lines of other contrasts and the text above stay."""
    text, _, table = PAGE.read_text(encoding="utf-8").partition(TABLE)
    lines = {line.split("`")[1]: line for line in table.splitlines()}
    for name, row in rows.items():
        holds = "yes" if row.holds else "**no**"
        lines[name] = f"| `{name}` | {row.what} | {row.theory} | {row.measured} | {holds} |"
    ordered = [lines[name] for name in CONTRASTS if name in lines]
    PAGE.write_text("\n".join([text + TABLE.rstrip("\n"), *ordered]) + "\n", encoding="utf-8")


def encoders(folder: Path) -> Row:
    """Trained text encoders learn a new word better than frozen ones."""
    trained, frozen = losses(folder, "right"), losses(folder, "frozen", "--no-train_text_encoder")
    worse = increase(frozen, trained)
    return Row(
        "text encoders trained or frozen, a tag of a new word, 180 steps, three seeds",
        "trained encoders learn more",
        f"held out loss {average(trained):.4f} trained, {average(frozen):.4f} frozen: {worse} more",
        worse.is_significant,
    )


def twins(folder: Path) -> Row:
    """Only trained text encoders can separate two tags whose words have the same vector.

    One tag stands for images with a frame, the other for images without.
    """
    write_twins(folder / "twins")
    model_with_equal_words = merge_words(TOY, folder / "twins.safetensors")
    framed_shares = []
    for name, options in (("twins-trained", []), ("twins-frozen", ["--no-train_text_encoder"])):
        model = train(folder, name, *options, model=model_with_equal_words, data="twins")
        framed_shares.append([in_style(model, 1.0, word) for word in (NEW_STYLE, TWIN)])
    trained, frozen = framed_shares
    return Row(
        f"text encoders trained or frozen, tags of two new words with the same vectors, {NEW_STYLE} framed and {TWIN}"
        " not, 420 steps",
        "no U-Net can tell what frozen encoders do not, and trained ones learn to",
        f"framed if told {NEW_STYLE} and if told {TWIN}: {trained[0]}, {trained[1]} trained; {frozen[0]}, {frozen[1]}"
        " frozen",
        trained[0].above(trained[1]) and not frozen[0].above(frozen[1]),
    )


def min_snr(folder: Path) -> Row:
    """Min-SNR weighting trades errors at little noise for errors at much noise. quickstart.toml turns it on."""
    weighted, unweighted = losses(folder, "right"), losses(folder, "min_snr-off", "--min_snr_gamma", "")
    clean, noisy = (increase(weighted, unweighted, f"loss/t{timestep}") for timestep in ("025", "875"))
    return Row(
        "min-SNR weighting, gamma 5, and none; three seeds",
        "errors at little noise count less (at timestep 25 an eighth), so that they grow against those at much noise",
        f"held out loss against that without: {clean} at timestep 25, {noisy} at 875",
        clean.above(noisy),
    )


def pooled(folder: Path) -> Row:
    """The untransposed pooled vector of sd-scripts makes the model worse.

    sd-scripts multiplies with text encoder 2's projection matrix as it lies in the file. The contrast compares losses,
    because the effect on images is smaller than chance in hundreds of images.
    """
    right = losses(folder, "right")
    wrong = losses(folder, "pooled-wrong", model=transpose_projection(TOY, folder / "turned.safetensors"))
    start, other_start = (validation(folder / name / "model.safetensors", 0) for name in ("right-0", "pooled-wrong-0"))
    used = []
    for seed in SEEDS:
        trained = folder / f"pooled-wrong-{seed}" / "model.safetensors"
        one_step = [*HELD_OUT, "--max_train_epochs", "", "--max_train_steps", "1"]
        model = transpose_projection(trained, trained.with_name("turned.st"))
        used.append(validation(train(folder, f"pooled-used-{seed}", *one_step, model=model), 0))
    worse = increase(used, right)
    return Row(
        "pooled vector: right, or untransposed as in the reference and then used as interfaces do; three seeds",
        "the other vector makes the model worse, and training with it leaves a model that is worse in interfaces",
        f"held out loss: right {start['loss']:.4f} before and {average(right):.4f} after training, untransposed"
        f" {other_start['loss']:.4f} and {average(wrong):.4f}, and as interfaces use that {average(used):.4f}: {worse}"
        " more than right",
        start["loss"] < other_start["loss"] and worse.is_significant,
    )


def crops(folder: Path) -> Row:
    """A model that is given the true crop draws fewer objects that are cut off.

    The data are crops of wide images with an object at the left. The base model knows only crop 0,0, so the other crops
    must be learned first. Only timesteps with much noise are trained, because they decide where an object stands.
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
    """A model learns left and right from the order of tags, unless the tags are shuffled."""
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
    """Caption dropout teaches a model to draw without a caption.

    Half of the training images hang in frames. The base model never draws a frame.
    """
    often, never = (
        without_caption(train(folder, f"dropout-{rate}", "--caption_dropout_rate", rate)) for rate in ("0.3", "0")
    )
    errors = [abs(share.value - 0.5) for share in (often, never)]
    return Row(
        "caption_dropout_rate 0.3 and 0, the 420 steps of the quickstart",
        "without a caption a model draws like the data (framed: half) only if it was trained without captions too",
        f"framed without a caption: {often} and {never}",
        is_significant(errors[1] - errors[0], often.error, never.error),
    )


def guidance(folder: Path) -> Row:
    """Guidance strengthens the caption up to a point, and distorts the image beyond.

    A tag that is only half learned loses against the background, which is well known and covers the whole image.
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
    """Rounding the weights to bf16 after each step loses most of the change, as with full_bf16 in sd-scripts.

    Everything else is in float32, so that only the rounding has an effect. bf16 is also slow on CPUs.
    """
    rates = ["--learning_rate", "3e-5", "--learning_rate_te1", "1e-6", "--learning_rate_te2", "1e-6"]
    asked = [*SHORT, *rates, "--validation_split", "0.1", "--save_precision", "float", "--ema_half_life", ""]
    start = folder / "start.safetensors"
    tensors_before = as_bf16(TOY, start)
    exact = train(folder, "bf16-exact", *asked, model=start)
    rounded = train(
        folder, "bf16-rounded", *asked, "--optimizer_type", "scripts.benchmarks.rounding.RoundingAdamW", model=start
    )
    before, after = validation(exact, 0)["loss"], [validation(model)["loss"] for model in (exact, rounded)]
    ends = [load_file(model) for model in (exact, rounded)]
    errors = [relative_error(part, tensors_before, *ends) for part in PARTS]
    shown_errors = ", ".join(f"{error:.2f}" for error in errors)
    return Row(
        "full_bf16 with weights rounded to nearest, at the users' rates (3e-5, 1e-6, 1e-6)",
        "most of what training changes is lost",
        f"held out loss {before:.4f} before, {after[0]:.4f} in float32, {after[1]:.4f} rounded; relative error of the"
        f" change of U-Net and text encoders: {shown_errors}",
        after[0] < after[1] and min(errors) > 0.5,
    )


def resumed(folder: Path) -> Row:
    """A resumed run ends with the same weights."""
    plain = train(folder, "short", *SHORT)
    asked = [*SHORT, "--save_state", "--resume", "auto", "--save_every_n_steps", "100"]
    first = train(folder, "resume-twice", *asked)
    for path in (first, first.with_name("model-state")):
        if path.exists():
            path.rename(path.with_name(f"old-{path.name}"))
    again = train(folder, "resume-twice", *asked)
    expected, actual = load_file(plain), load_file(again)
    same = all(torch.equal(expected[name], actual[name]) for name in expected)
    return Row(
        "a run that goes on from the state of step 100, of 180 steps",
        "it ends with the same weights",
        f"weights {'equal, bit for bit' if same else 'differ'}",
        same,
    )


def processes(folder: Path) -> Row:
    """Two processes with half the batch each learn the same as one."""
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
    contrast.__name__: contrast
    for contrast in (
        encoders,
        twins,
        guidance,
        dropout,
        min_snr,
        pooled,
        crops,
        keep_tokens,
        resumed,
        processes,
        full_bf16,
        flow_times,
        flow_pairing,
        flow_weights,
    )
}


if __name__ == "__main__":
    main()
