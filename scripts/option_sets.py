"""Trains the smallest model with options drawn at random, to find combinations that fail.

    python -m scripts.option_sets --results FILE [--count 300]

draws option sets from the schema, each a function of its number. For each set it trains two steps, loads the saved
checkpoint, and resumes for one more step if the set saved a training state. FILE gets a line of JSON for each set, with
its result: `trained`, `refused`, or `FAILED` with the end of the traceback. An option that is refused is left out, the
rest of the set is tried again, and the line holds the message. A second call goes on with the sets that FILE does not
have yet. The exit status is 1 if a set failed.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from scripts.toy.photos import write_photos
from sdxl_finetune.config import Config, load_config
from sdxl_finetune.config.fields import LR_SCHEDULES, kinds
from sdxl_finetune.errors import UserError

SHARE = 0.12
"""Probability that an option is drawn: a set then has about 15 options."""
STEPS = 2
FIXED = {"max_train_steps": STEPS, "max_data_loader_n_workers": 0, "seed": 1}
NOT_DRAWN = {
    *FIXED, "pretrained_model_name_or_path", "train_data_dir", "output_dir", "output_name", "resolution", "cache_dir",
    "dataset_config", "max_train_epochs", "resume", "console_log_file", "log_with", "log_tracker_config",
    "tokenizer_cache_dir", "ddp_timeout", "metadata_thumbnail", "caption_extention", "debug_dataset",
    "lr_scheduler_type", "lr_scheduler_args", "optimizer_args", "reproduce",
}  # fmt: skip
"""Options that every set needs, that name other files, or that end a run before it trains."""
OPTIMIZERS = [
    "AdamW", "Lion", "Adafactor", "SGDNesterov", "AdamW8bit", "Prodigy", "DAdaptAdam", "RAdam", "AdamWScheduleFree",
]  # fmt: skip
VALUES: dict[str, list[Any]] = {
    "train_batch_size": [2, 3],
    "vae_batch_size": [0, 2],
    "max_train_hours": [5.0],
    "learning_rate": [1e-3, 1e-5, 0.0],
    "learning_rate_te1": [1e-4, 0.0],
    "learning_rate_te2": [1e-4, 0.0],
    "block_lr": ["1e-4," * 22 + "0"],
    "optimizer_type": OPTIMIZERS,
    "lr_scheduler": [*LR_SCHEDULES, "adafactor", "adafactor:1e-4"],
    "mixed_precision": ["no", "no", "no", "bf16", "fp16"],
    "torch_compile": [False, False, False, False, True],
    "dynamo_backend": ["eager", "no"],
    "reg_data_dir": ["reg"],
    "in_json": ["meta.json"],
    "vae": ["base.safetensors"],
    "sample_prompts": ["prompts.txt", "prompts.txt"],
    "logging_dir": ["logs"],
    "conditioning_data_dir": ["masks"],
    "min_bucket_reso": [0, 32, 64],
    "max_bucket_reso": [64, 96, 128],
    "bucket_reso_steps": [32, 64, 16],
    "max_token_length": [75, 150, 225],
    "caption_extension": [".txt", "txt", ".caption"],
    "caption_separator": [",", ";"],
    "caption_sources": [".caption:0.5, .json#a", "caption, tags:3", [".caption"]],
    "caption_tag_dropout_groups": [{"b": ["c", "f*"]}, '{"*": "b"}'],
    "protected_tags_file": ["protected.txt"],
    "keep_tokens_separator": ["|||"],
    "secondary_separator": [";;;"],
    "face_crop_aug_range": ["1.0,2.0"],
    "lr_warmup_steps": [1, 0.5, "50%", 100],
    "lr_decay_steps": [1, 0.5],
    "min_timestep": [0, 100],
    "max_timestep": [500, 1000],
    "flow_timestep_distribution": ["uniform", "logit_normal", "beta", "cosmap"],
    "console_log_level": ["DEBUG", "ERROR"],
}
"""Values to draw from, for options whose type does not say enough."""
TEXTS = ["a text", "日本語, ü", ""]


def draw_options(number: int) -> dict[str, Any]:
    """Draws option set `number`. The values are those of a config file."""
    rng = random.Random(number)
    drawn: dict[str, Any] = {"resolution": rng.choice([64, "64,96"]), **FIXED}
    for name, field in Config.model_fields.items():
        outside = name in NOT_DRAWN or name.startswith(("huggingface_", "wandb_", "save_state_to", "resume_from"))
        if outside or rng.random() > SHARE:
            continue
        (kind,) = kinds(field)
        limits = {type(note).__name__: note for note in field.metadata}
        lowest = getattr(limits.get("Ge"), "ge", getattr(limits.get("Gt"), "gt", 0))
        highest = getattr(limits.get("Le"), "le", 5)
        if name in VALUES:
            drawn[name] = rng.choice(VALUES[name])
        elif get_origin(kind) is Literal:
            drawn[name] = rng.choice(get_args(kind))
        elif kind is bool:
            drawn[name] = rng.random() < 0.8
        elif kind is int:
            drawn[name] = rng.randint(int(lowest), min(int(highest), int(lowest) + 3))
        elif kind is float:
            drawn[name] = rng.choice([lowest + 0.01, (lowest + highest) / 2, highest - 0.01])
        else:
            drawn[name] = rng.choice(TEXTS)
    if drawn.get("enable_bucket"):  # the default, 256, is above the size of the pictures
        drawn.setdefault("min_bucket_reso", 32)
        drawn.setdefault("bucket_reso_steps", 32)
    return drawn


def write_files(folder: Path) -> None:
    """Writes what the sets name: the smallest model, pictures with captions, metadata, masks and prompts."""
    from PIL import Image

    from sdxl_finetune.commands.model import main as model_command

    assert model_command(["init", str(folder / "base.safetensors"), "--seed", "3"]) == 0
    photos = write_photos(folder / "images")
    (folder / "reg").mkdir()
    (folder / "masks").mkdir()
    for photo in photos[:2]:
        shutil.copy(photo, folder / "reg")
    for photo in photos:
        photo.with_suffix(".caption").write_text("a photo|||b, c;;;d, {e|f}\nsecond line")
        with Image.open(photo) as image:
            Image.linear_gradient("L").resize(image.size).save(folder / "masks" / f"{photo.stem}.png")
    rows = {str(photo): {"caption": "a photo", "tags": "a, b"} for photo in photos}
    (folder / "meta.json").write_text(json.dumps(rows))
    (folder / "protected.txt").write_text("# of the captions\nc\n* photo\n")
    (folder / "prompts.txt").write_text("a cat --w 64 --h 64 --s 2\n")


def try_options(number: int) -> dict[str, Any]:
    """Trains set `number`, loads what it saved, and resumes. Returns the result as a line of JSON.

    An option that is refused is left out, and the rest of the set is tried again.
    """
    options, why = draw_options(number), []
    while True:
        result, messages, refused = _attempt(options)
        why += messages
        if result != "refused" or not refused:
            return {"number": number, "options": options, "result": result, "why": why}
        options = {name: value for name, value in options.items() if name not in refused}


def _attempt(options: dict[str, Any]) -> tuple[str, list[str], set[str]]:
    """Returns the result of one training, its messages, and the options that were refused and can be left out."""
    try:
        _train(options)
    except UserError as error:
        keys = {problem.key for problem in error.problems if problem.key}
        return "refused", [str(problem) for problem in error.problems], keys & options.keys() - FIXED.keys()
    except BaseException:
        return "FAILED", traceback.format_exc()[-3000:].splitlines(), set()
    return "trained", [], set()


def _train(options: dict[str, Any]) -> None:
    """Trains with these options in the current folder, and resumes if they save a training state."""
    from accelerate.state import AcceleratorState

    from sdxl_finetune.training.loop import train

    out = Path("out")
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree("logs", ignore_errors=True)
    files = {"pretrained_model_name_or_path": "base.safetensors", "output_dir": "out", "train_data_dir": "images"}
    for more in ({}, {"resume": "auto", "max_train_steps": STEPS + 1}):
        if more and not list(out.glob("*-state")):
            return
        AcceleratorState._reset_state(reset_partial_state=True)
        lines = [f"{name} = {json.dumps(value)}\n" for name, value in {**files, **options, **more}.items()]
        Path("set.toml").write_text("".join(lines), encoding="utf-8")
        config = load_config(["--config", "set.toml"], program="sdxl-train")
        assert config is not None and train(config) == 0
        _check_saved(out)


def _check_saved(out: Path) -> None:
    """Loads every checkpoint in `out`. Raises if there is none, or if a weight is not a number."""
    import torch

    from sdxl_finetune.model.load import load_checkpoint

    saved = [*out.glob("*.safetensors"), *out.glob("*.ckpt"), *(path.parent for path in out.glob("*/model_index.json"))]
    assert saved, "no checkpoint was saved"
    for path in saved:
        model = load_checkpoint(path, dtype=torch.float32).model
        assert all(bool(parameter.isfinite().all()) for parameter in model.parameters()), f"{path}: not finite"


def work(folder: Path, numbers: Connection) -> None:
    """Tries each number that arrives, and sends its result back. Runs in a process of its own, which may crash."""
    os.chdir(folder)
    sys.stderr = Path("messages.txt").open("w", encoding="utf-8")  # noqa: SIM115
    while True:
        numbers.send(try_options(numbers.recv()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--count", type=int, default=300)
    given = parser.parse_args()
    os.environ.setdefault("ACCELERATE_USE_CPU", "1")
    results = [json.loads(line) for line in given.results.read_text().splitlines()] if given.results.exists() else []
    known = {result["number"] for result in results}
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as temporary, given.results.open("a") as file:
        write_files(Path(temporary))
        process = None
        for number in sorted(set(range(given.count)) - known):
            if process is None or not process.is_alive():
                numbers, theirs = context.Pipe()
                process = context.Process(target=work, args=(Path(temporary), theirs), daemon=True)
                process.start()
                theirs.close()
            numbers.send(number)
            try:
                result = numbers.recv()
            except EOFError:
                process.join()
                why = [f"the process ended with {process.exitcode}"]
                result = {"number": number, "options": draw_options(number), "result": "FAILED", "why": why}
            results.append(result)
            print(json.dumps(result), file=file, flush=True)
            print(f"{number} {result['result']} {'; '.join(result.get('why', [])[-2:])[:300]}", flush=True)
    counts = Counter(result["result"] for result in results)
    distinct = len({json.dumps(result["options"]) for result in results})
    print(f"{distinct} distinct option sets: " + ", ".join(f"{count} {name}" for name, count in sorted(counts.items())))
    return counts["FAILED"] > 0


if __name__ == "__main__":
    sys.exit(main())
