"""`sdxl-data`: looks at datasets and prepares them.

Each command reads the images that a config names, and takes every option of the config besides its own. The module
imports only what `--help` needs. Each command imports the rest. A new command is a function and its arguments in
`build_parser`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from sdxl_finetune.config import Config, FaultyConfig, load_config
from sdxl_finetune.errors import UserError

UNUSED = {"pretrained_model_name_or_path", "vae", "max_train_steps", "max_train_epochs", "resume", "sample_prompts"}
"""Options of training alone. A dataset can be looked at without them, and their mistakes do not matter."""
CONFIG_HELP = "The images are those of the config. Every option of the config is an option here as well."


def main(argv: Sequence[str]) -> int:
    """Runs one command and returns the exit status. Raises UserError if the user's input is wrong."""
    arguments, options = build_parser().parse_known_args(argv)
    config = load_data_config(options, f"sdxl-data {arguments.command}")
    return 0 if config is None else arguments.run(config, arguments)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sdxl-data", description="Looks at datasets and prepares them.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    text = "write the quality tags of quality_tags into caption files"
    tag_quality = commands.add_parser("tag-quality", help=text, description=f"{text}. {CONFIG_HELP}")
    tag_quality.set_defaults(run=_tag_quality)
    tag_quality.add_argument("--dry_run", action="store_true", help="print what would change, and write nothing")
    text = "write one HTML page about the images and captions"
    report = commands.add_parser("report", help=text, description=f"{text}. {CONFIG_HELP}")
    report.set_defaults(run=_report)
    report.add_argument("--output", type=Path, default=Path("report.html"), help="the page; default: report.html")
    report.add_argument(
        "--rare", type=int, default=10, metavar="N", help="list tags in fewer than N images; default: 10"
    )
    for name, command in commands.choices.items():
        command.allow_abbrev = False  # an unknown option is the config's
        command.usage = f"sdxl-data {name} --config FILE [--option VALUE ...]"
    return parser


def load_data_config(options: Sequence[str], program: str) -> Config | None:
    """Returns the config of a command line, or None if it only asks to print or write the config.

    Raises UserError for mistakes in the options of the dataset. The dataset index needs `cache_dir` or `output_dir`.
    """
    try:
        return load_config(options, program=program)
    except FaultyConfig as error:
        unused = UNUSED | {"output_dir"} if error.config.cache_dir else UNUSED
        if problems := [problem for problem in error.problems if problem.key not in unused]:
            raise UserError(problems) from None
        return error.config


def _tag_quality(config: Config, arguments: argparse.Namespace) -> int:
    from sdxl_finetune.commands.tag_quality import tag_quality

    return tag_quality(config, dry_run=arguments.dry_run)


def _report(config: Config, arguments: argparse.Namespace) -> int:
    from sdxl_finetune.commands.data_report import data_report

    return data_report(config, arguments.output, rare=arguments.rare)
