"""Generates the documentation of options from the schema.

python -m sdxl_finetune.config.docs > docs/options.md
python -m sdxl_finetune.config.docs template > configs/template.toml
python -m sdxl_finetune.config.docs reference        writes the table of options into docs/from-sd-scripts.md
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import toml

from sdxl_finetune.config.fields import expected, plain
from sdxl_finetune.config.options import GROUPS, Config
from sdxl_finetune.config.unsupported import FOREIGN, REFERENCE

INTRODUCTION = """\
# Options

Generated from the schema by `python -m sdxl_finetune.config.docs`; do not edit.

Every option is a key of the config file and also `--name value` on the command line. The command line wins. An option
that is true or false is `--name` or `--no-name` there. Tables of the file only group options; a table inside a table is
not allowed. An empty text unsets an option. Relative paths start at the folder in which the program runs.

Names, meanings and defaults are those of kohya-ss/sd-scripts, called the reference here. An option that sd-scripts does
not have says so.
"""


FROM_REFERENCE = Path("docs/from-sd-scripts.md")
TABLE_START, TABLE_END = "<!-- table of options -->\n", "<!-- end of the table -->\n"
BETTER = {
    "full_bf16": "keeps exact float32 masters, so that small updates are not rounded away",
    "fused_backward_pass": "with every optimizer that steps on one tensor at a time, and with gradient accumulation",
    "fused_optimizer_groups": "read as `fused_backward_pass`, which needs no groups",
    "gradient_accumulation_steps": "the gradient is the exact mean over the images, also with unequal micro-batches",
    "resume": "goes on at the step, with the same log and the same result; `auto` finds the newest state",
    "save_state": "the state is saved before the checkpoint of its step, and is checked when it is loaded",
    "cache_latents_to_disk": "a few files with checksums, not one per image; a changed image is encoded again",
    "cache_latents": "the same latent for the same image, whatever the batch",
    "cache_text_encoder_outputs": "captions as they are trained; dropout works, and shuffling in several variants",
    "cache_text_encoder_outputs_to_disk": "checked like the latents; a changed caption is encoded again",
    "skip_cache_check": "also skips the check for changed images and captions",
    "caption_dropout_every_n_epochs": "the epoch of every image is known",
    "token_warmup_step": "counts optimizer steps exactly",
    "lr_warmup_steps": "counts optimizer steps, whatever the number of processes",
    "lr_decay_steps": "counts optimizer steps, whatever the number of processes",
    "lr_scheduler_type": "the whole schedule is tried at the start",
    "zero_terminal_snr": "loss weights and previews follow the corrected noise schedule",
    "torch_compile": "compiles blocks once for all bucket sizes; names in saved files stay the same",
    "xformers": "torch's attention is used if xformers is not installed",
    "dataset_config": "all mistakes in the file are reported at once",
    "sample_prompts": "mistakes are reported at the start; the seed is saved in the picture",
    "sample_sampler": "dpmsolver works; latents are not clipped",
    "train_data_dir": "images directly in the folder are used if there are no folders `N_words`",
    "random_crop": "the model reads the crop that was made",
    "face_crop_aug_range": "works with buckets too; the model reads the crop that was made",
    "conditioning_data_dir": "works without a dataset_config file too; a mask of its image's size is cropped with it",
    "alpha_mask": "works without loss weights too",
    "debug_dataset": "draws the first batches on one picture in output_dir",
    "max_token_length": "any multiple of 75; 255 is read as 225, and said; captions that are cut off are counted",
    "optimizer_args": "one text may hold several arguments",
    "save_precision": "a weight that float16 cannot hold does not become infinite",
    "full_fp16": "float32 master weights keep what rounding to fp16 loses, and fp16 runs on a CPU too",
    "block_lr": "fits models with other numbers of blocks",
    "console_log_level": "DEBUG hides the messages of libraries",
    "wandb_api_key": "never printed or saved",
    "huggingface_repo_id": "a failed upload is tried again, also by the next run; a refused token is told at the start",
    "huggingface_token": "never printed or saved",
    "async_upload": "on unless it is false; a save then waits two minutes at most",
    "resume_from_huggingface": "downloads the named folder only, and not again what is there",
    "weighted_captions": "exclamation marks at the edge of a chunk keep their weight",
}
"""Options of the reference that do more here, each with what is better."""
DIFFERENT = {
    "adaptive_noise_scale": "needs `cache_latents`: the noise is drawn before the device encodes images",
}
"""Options of the reference that do less here, each with what is missing and why."""


def default_text(value: object) -> str:
    """Returns a default as a config file holds it. The empty text stands for an unset option."""
    return '""' if value is None else toml.dumps({"x": plain(value)}).removeprefix("x = ").rstrip()


def options_markdown() -> str:
    """Returns the text of docs/options.md."""
    return "\n".join([INTRODUCTION, *_known(), *_others()])


def _known() -> Iterator[str]:
    for group in GROUPS:
        yield f"## {group.__doc__}\n"
        yield "| option | takes | default | meaning |\n|---|---|---|---|"
        for name, field in group.model_fields.items():
            default = default_text(field.get_default(call_default_factory=True))
            cells = [f"`{name}`", expected(field), f"`{default}`", str(field.description)]
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        yield ""


def _others() -> Iterator[str]:
    titles = ("Options of the reference that are not supported", "Options of other trainers and of GUIs")
    for title, table in zip(titles, (REFERENCE, FOREIGN), strict=True):
        yield f"## {title}\n"
        yield "An option that is switched off (false, 0, empty) is accepted.\n"
        yield "| option | outcome | reason, or what to do |\n|---|---|---|"
        for name, foreign in table.items():
            remark = f"read as `{foreign.remark}`" if foreign.outcome == "honoured" else foreign.remark
            yield f"| `{name}` | {foreign.outcome} | {remark} |"
        yield ""


def template() -> str:
    """Returns the text of configs/template.toml: every option at its default, commented out."""
    lines = [
        "# Every option with its default, to copy from. Remove the # before an option to set it.",
        "#",
        "# What for   a list of all options, grouped as in docs/options.md; it trains nothing as it is",
        "# Memory     depends on the options, as the time does: `sdxl-check --config FILE` prints an estimate",
        "# Result     as it is, an error message that names the four options to set",
        "#",
        "# Generated by `python -m sdxl_finetune.config.docs template`; do not edit.",
    ]
    for group in GROUPS:
        lines += ["", f"# {group.__doc__}"]
        for name, field in group.model_fields.items():
            default = default_text(field.get_default(call_default_factory=True))
            lines += [f"# {field.description} [{expected(field)}]", f"# {name} = {default}"]
    return "\n".join(lines) + "\n"


def reference_table() -> str:
    """Returns the table of every option of the reference's SDXL trainer, for docs/from-sd-scripts.md."""
    fields = {
        name: field for name, field in Config.model_fields.items() if "Not in sd-scripts" not in str(field.description)
    }
    lines = ["| option | here | |", "|---|---|---|"]
    for group in GROUPS:
        same = [f"`{name}`" for name in group.model_fields if name in fields and name not in BETTER | DIFFERENT]
        lines += [f"| {' '.join(same)} | the same | {group.__doc__} |"] if same else []
    lines += [f"| `{name}` | better | {BETTER[name]} |" for name in fields if name in BETTER]
    lines += [f"| `{name}` | differs | {DIFFERENT[name]} |" for name in fields if name in DIFFERENT]
    outcomes = {"no effect": "no effect, with a warning", "honoured": "other name", "refused": "refused"}
    lines += [f"| `{name}` | {outcomes[row.outcome]} | {row.remark} |" for name, row in REFERENCE.items()]
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """Returns the text of docs/from-sd-scripts.md with the table of options as it is now."""
    before, _, rest = text.partition(TABLE_START)
    return before + TABLE_START + reference_table() + TABLE_END + rest.partition(TABLE_END)[2]


if __name__ == "__main__" and sys.argv[1:] == ["reference"]:
    FROM_REFERENCE.write_text(with_table(FROM_REFERENCE.read_text(encoding="utf-8")), encoding="utf-8")
elif __name__ == "__main__":
    print(template() if sys.argv[1:] == ["template"] else options_markdown(), end="")
