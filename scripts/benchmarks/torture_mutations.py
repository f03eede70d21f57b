"""Damages one file of a user's folder and lets a program read it, as trials of `scripts.benchmarks.torture`.

The program has to end with status 0, or with a message that says what is wrong. It may print no traceback and take at
most TIME of processor time and MEMORY. It may run no code from the file, and write nothing outside the folders that
the config names.
"""

import hashlib
import json
import os
import random
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.benchmarks.torture import Trial
from scripts.benchmarks.torture_damage import CANARY, damaged
from scripts.benchmarks.torture_world import DATA, MODEL, OPTIONS, RUN, Ended, fresh_copy, run_program

TIME = 10.0
"""Seconds of processor time that a program may take."""
MEMORY = 1 << 30
"""Bytes that a program may use beyond its imports. A sound file needs less than a sixth of that."""
CONFIG = ["--config", "config.toml", *RUN, "--no_memory"]
CHECK = ("sdxl-check", *OPTIONS)
CACHE = ("sdxl-cache", *OPTIONS, "--on_bad_image", "skip")
TRAIN = ("sdxl-train", *OPTIONS)
REPORT = ("sdxl-data", "report", *DATA, "--output_dir", "out", "--output", "out/report.html")
STOPS = (*CACHE, "--on_bad_image", "stop")
UNCACHED = (*TRAIN, "--no-cache_latents_to_disk")
TARS = ("--train_data_dir", "tars")
INFO = ("sdxl-model", "info")
CONVERT = ("sdxl-model", "convert", "diffusers", "converted.safetensors")
RESUMED = (*TRAIN, "--resume")
WRITTEN = ("out", "logs", ".cache", "converted.safetensors", "card")
"""Files and folders into which the programs may write: those of the config, and the user's cache."""


@dataclass(frozen=True)
class Reader:
    """Files of one kind, and the programs that read them."""

    name: str
    pattern: str
    programs: tuple[tuple[str, ...], ...]
    share: int = 1
    """How often this kind is chosen."""


CKPT = (*MODEL[:1], "base.ckpt", *DATA, *RUN)
FOLDER = (*MODEL[:1], "diffusers", *DATA, *RUN)
STATE = "out/run-step00000001-state"
SAVED = "out/run-step00000001.safetensors"
TEXT = "--cache_text_encoder_outputs_to_disk"
ALL_CAPTION_OPTIONS = ("--enable_wildcard", "--weighted_captions", "--shuffle_caption")
SOURCES = ".json#caption:1, .json#tags:1, .txt:1"
DROPOUT = ("--caption_tag_dropout_rate", "0.5")
READERS = (
    Reader("image", "images/*.[pjwb][npem][gbp]*", (CACHE, CHECK, STOPS, UNCACHED, REPORT), 5),
    Reader("mask", "masks/*.[pj][np]g", ((*TRAIN, "--masked_loss", "--conditioning_data_dir", "masks"),), 2),
    Reader("caption", "images/*.txt", (CHECK, TRAIN, (*CACHE, TEXT), (*TRAIN, *ALL_CAPTION_OPTIONS), REPORT), 3),
    Reader("caption in JSON", "images/*.json", ((*CHECK, "--caption_sources", SOURCES),), 2),
    Reader("metadata (JSON)", "meta.json", ((*CHECK, "--in_json", "meta.json"),), 2),
    Reader("metadata (JSON Lines)", "meta.jsonl", ((*CHECK, "--in_json", "meta.jsonl"),), 2),
    Reader("metadata (Parquet)", "meta.parquet", ((*CHECK, "--in_json", "meta.parquet"),), 3),
    Reader("tar file", "tars/data.tar", ((*CACHE, *TARS), (*CHECK, *TARS)), 5),
    Reader("scores", "scores.*", ((*CHECK, "--quality_tags", "good > 0.3, bad", "--quality_scores"),), 2),
    Reader("image weights", "weights.*", ((*CHECK, "--image_weights"),), 2),
    Reader("groups of tags", "groups.*", ((*CHECK, *DROPOUT, "--caption_tag_dropout_groups"),)),
    Reader("protected tags", "protected.txt", ((*CHECK, *DROPOUT, "--protected_tags_file"),)),
    Reader("config", "config.toml", (("sdxl-check", *CONFIG), ("sdxl-train", *CONFIG)), 3),
    Reader("dataset config", "dataset.toml", (("sdxl-check", *MODEL, *RUN, "--dataset_config", "dataset.toml"),), 3),
    Reader("prompts", "prompts.*", ((*CHECK, "--sample_every_n_steps", "1", "--sample_prompts"),), 3),
    Reader("checkpoint (.safetensors)", "base.safetensors", (CHECK, (*TRAIN, "--max_train_steps", "1"), INFO), 4),
    Reader("checkpoint (.ckpt)", "base.ckpt", (INFO, ("sdxl-check", *CKPT), ("sdxl-train", *CKPT)), 3),
    Reader("diffusers folder", "diffusers/*/*[!s].[sj][as][fo]*", (("sdxl-check", *FOLDER), CONVERT), 3),
    Reader("diffusers index", "diffusers/*.json", (("sdxl-check", *FOLDER),)),
    Reader("cached latents", "out/cache/latents/*/*", (CACHE, TRAIN), 4),
    Reader("cached text outputs", "out/cache/text_outputs/*/*", ((*TRAIN, TEXT),), 3),
    Reader("dataset index", "out/cache/*.index", (CHECK, TRAIN, (*CHECK, "--skip_cache_check")), 3),
    Reader("scan", "out/cache/scans/*.scan", (CHECK, TRAIN, (*CHECK, "--skip_cache_check")), 3),
    Reader("members of tar files", "out/cache/tars/*/*", ((*CHECK, *TARS),), 2),
    Reader("keys of captions", "out/cache/caption_keys/*", ((*TRAIN, TEXT),)),
    Reader("training state", f"{STATE}/*.[jp]*", ((*RESUMED, STATE), (*RESUMED, "auto")), 4),
    Reader("weights of a state", f"{STATE}/weights.*", ((*RESUMED, STATE),), 2),
    Reader("saved checkpoint", SAVED, ((*RESUMED, SAVED), (*RESUMED, "auto"), INFO, ("sdxl-model", "card")), 4),
    Reader("log", "logs/*/[ms]*.jsonl", ((*RESUMED, STATE),), 2),
)
"""The last word of a program that ends with an option, `info` or `card` is the damaged file."""


def try_once(number: int, seed: int, folder: Path) -> Trial:
    """Damages a file and lets a program read it."""
    rng = random.Random(f"{seed} {number}")
    reader = rng.choices(READERS, [one.share for one in READERS])[0]
    trial = fresh_copy(folder)
    path = rng.choice(sorted(trial.glob(reader.pattern)))
    what, content = damaged(path, path.read_bytes(), rng)
    words = _words(rng.choice(reader.programs), path.relative_to(trial))
    keeps_time = rng.random() < 0.5 and "cache" in path.parts  # as a disk does that loses bits
    _replace(path, content, keeps_time=keeps_time)
    if "state" in path.parent.name and path.name != "manifest.json" and rng.random() < 0.7:
        _sign(path.parent)
    before = _files(folder)
    ended = run_program(words[0], words[1:], trial)
    failure = fault(ended) or _trespass(trial, before, _files(folder))
    if failure:
        said = f"{failure}\n{reader.name}: {path}\n{what}\n{' '.join(words)}\n{ended.text}\n"
        (folder / f"failure-{number:04d}.txt").write_text(said, "utf-8", "backslashreplace")
    return Trial(number, f"{reader.name}: {what}", failure and f"{failure} ({' '.join(words)[:60]}, {path.name})")


def _words(program: tuple[str, ...], path: Path) -> list[str]:
    """The words of a program, with the damaged file at the end if the last option has no value yet."""
    if program[-1] in ("info", "card"):
        return [*program, str(path)]
    lacks_value = (
        "--quality_scores",
        "--image_weights",
        "--caption_tag_dropout_groups",
        "--protected_tags_file",
        "--sample_prompts",
    )
    return [*program, *([str(path)] if program[-1] in lacks_value else [])]


def _replace(path: Path, content: bytes, *, keeps_time: bool) -> None:
    """Puts other content into a file, which may be linked from another folder."""
    before = path.stat()
    path.unlink()
    path.write_bytes(content)
    if keeps_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _sign(state: Path) -> None:
    """Makes the manifest of a training state agree with its files, as whoever changes them on purpose would do."""
    names = ("weights.safetensors", "optimizer.pt", "state.json")
    contents = {name: (state / name).read_bytes() for name in names}
    digests = {name: [len(data), hashlib.sha256(data).hexdigest()] for name, data in contents.items()}
    _replace(state / "manifest.json", json.dumps(digests).encode(), keeps_time=False)


def fault(ended: Ended) -> str | None:
    """Says what is wrong with the end of a program; None if it ended as it must."""
    lines = ended.text.strip().splitlines()
    last = lines[-1][:300] if lines else ""
    if ended.status not in (0, 1, 2):
        return f"ended with status {ended.status}: {last}"
    if any(words in ended.text for words in ("Traceback (most recent", "Exception ignored", "Fatal Python error")):
        return f"printed a traceback: {last}"
    if ended.status and not any(line.startswith("problems ") or "error: " in line for line in lines):
        return f"ended without a message: {last}"
    if ended.seconds > TIME:
        return f"took {ended.seconds:.0f} s"
    if ended.bytes > MEMORY:
        return f"took {ended.bytes >> 20} MiB"
    longest = max(map(len, lines), default=0)
    return f"printed a line of {longest} letters" if longest > 20_000 else None


def _files(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")} if folder.exists() else set()


def _trespass(trial: Path, before: set[str], after: set[str]) -> str | None:
    """Says which file was written where none may be; None if there is none."""
    if (trial / CANARY).exists():
        return "code in the file was run"
    allowed = [*(str(trial / name) + "/" for name in WRITTEN), str(trial) + "."]
    new = [path for path in after - before if not (path + "/").startswith(tuple(allowed))]
    return f"wrote {min(new)}" if new else None


def figures(trials: Sequence[Trial]) -> str:
    """The figures of these trials in Markdown: how many files of each kind, and how many faults."""
    kinds = Counter(trial.what.partition(":")[0] for trial in trials)
    failed = Counter(trial.what.partition(":")[0] for trial in trials if trial.failure)
    rows = [f"| {kind} | {count} | {failed[kind]} |" for kind, count in sorted(kinds.items())]
    longest = max((trial.seconds for trial in trials), default=0.0)
    middle = statistics.median([trial.seconds for trial in trials] or [0.0])
    summary = f"{len(trials):,} files, {sum(failed.values())} faults."
    times = f"A trial took {middle:.1f} s, the longest {longest:.1f} s."
    return "\n".join([f"{summary} {times}", "", "| damaged file | trials | faults |", "|---|---|---|", *rows])
