"""`sdxl-model card`: writes the release page of a model, as Markdown and HTML, in English and Chinese."""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePath

from PIL import Image

from sdxl_finetune.card.contents import Card, ModelFile, collect, read_model
from sdxl_finetune.card.facts import Language, load_facts
from sdxl_finetune.card.page import page_html
from sdxl_finetune.card.parameters import parameters_toml
from sdxl_finetune.card.samples import MOST, Sample, find_pictures, find_previews, load_samples
from sdxl_finetune.card.sections import Block, markdown, page_blocks, picture_name
from sdxl_finetune.card.tag_section import count_states
from sdxl_finetune.card.text import Words
from sdxl_finetune.commands.generate import draw_requested
from sdxl_finetune.config import Config, FaultyConfig, load_config
from sdxl_finetune.config.reading import config_path
from sdxl_finetune.errors import Problem, UserError, counted
from sdxl_finetune.files import atomic_path, auto_v2
from sdxl_finetune.output.metadata import TEXT_PATHS
from sdxl_finetune.output.previews import save_image
from sdxl_finetune.output.prompts import load_prompts
from sdxl_finetune.printable import printable
from sdxl_finetune.tag_report.schema import FOLDER, Report, load_report, report_paths

logger = logging.getLogger(__name__)

FILES: dict[Language, str] = {"en": "card", "zh": "card.zh-CN"}
"""Names of the pages, without endings."""


def card(arguments: argparse.Namespace) -> None:
    """Writes the pages and pictures into the folder `output`. Raises UserError for the user's mistakes."""
    _check_arguments(arguments)
    facts = load_facts(arguments.facts)
    config = load_run_config(arguments.config)
    text = config_path(arguments.config).read_text(encoding="utf-8-sig") if arguments.config else None
    file = read_model(arguments.model, auto_v2(arguments.model) if arguments.model.is_file() else None)
    if arguments.config and file.options:
        _check_config(config, file)
    known = parameters_toml(text, config, file.options) if text or file.options else None
    made = collect(
        file,
        facts,
        config,
        parameters=known if known and known.strip() else None,
        base_hash=_base_hash(config),
        scale=_preview_scale(config),
    )
    report = _tag_report(arguments.tags, config, file)
    made = replace(made, tags=report, tag_states=count_states(report) if report else {})
    _write(replace(made, samples=_samples(arguments, config, file)), arguments.output)


def _check_arguments(arguments: argparse.Namespace) -> None:
    """Raises UserError for pages that exist, and for two sources of sample pictures."""
    if arguments.samples and (arguments.prompt or arguments.prompts):
        message = (
            "the pictures come either from a folder or from prompts: leave out --samples, or --prompt and --prompts"
        )
        raise UserError(Problem(message, key="samples", value=str(arguments.samples)))
    existing = [path for name in FILES.values() for path in [arguments.output / f"{name}.md"] if path.exists()]
    if existing and not arguments.overwrite:
        raise UserError(Problem("exists already. Choose another --output, or add --overwrite", file=str(existing[0])))


def load_run_config(path: str | None) -> Config:
    """The config of the run; an empty one without a path. Files that the config names need not exist any more.

    Raises UserError for a file that cannot be read, and for unknown options and wrong values.
    """
    if path is None:
        return Config()
    try:
        config = load_config(["--config", path], program="sdxl-model card")
    except FaultyConfig as error:
        problems = [problem for problem in error.problems if not _is_about_files(problem, error.config)]
        if problems:
            raise UserError(problems) from None
        config = error.config
    assert config is not None
    return config


def _is_about_files(problem: Problem, config: Config) -> bool:
    """True for a missing file, and for a missing option that names one. The command line may have set it."""
    if problem.key is None or problem.key not in Config.model_fields:
        return False
    value = getattr(config, problem.key)
    given = isinstance(value, PurePath) or problem.key in TEXT_PATHS
    return given or (value is None and problem.value is None)


def _check_config(config: Config, file: ModelFile) -> None:
    """Warns if the config is that of another run."""
    recorded = file.options.get("output_name")
    if recorded != config.output_name and recorded is not None:
        message = "%s was saved by a run with output_name = %s, and the config says %s: is it the config of this model?"
        logger.warning(message, file.name, recorded, config.output_name)


def _base_hash(config: Config) -> str | None:
    base = config.pretrained_model_name_or_path
    return auto_v2(base) if isinstance(base, Path) and base.is_file() else None


def _preview_scale(config: Config) -> float | None:
    """The highest guidance scale of the run's preview prompts, with which the author looked at the model."""
    if config.sample_prompts is None or not config.sample_prompts.is_file():
        return None
    return max((prompt.scale for prompt in load_prompts(config.sample_prompts)), default=None)


def _tag_report(path: Path | None, config: Config, file: ModelFile) -> Report | None:
    """The tag report of --tags, or that of this model in `tags` of the run's output folder."""
    if path is not None:
        return load_report(path)
    if not isinstance(config.output_dir, Path):
        return None
    short_hash = file.auto_v2 and file.auto_v2.lower()
    paths = report_paths(config.output_folder / FOLDER)
    for report in map(load_report, paths):
        if report.facts.model_hash == short_hash if report.facts.model_hash else _has_step(report, file):
            return report
    if paths:
        message = "none of the %s in %s is of %s: measure it with sdxl-model tags, or name a report with --tags"
        logger.warning(message, counted(len(paths), "tag report"), config.output_folder / FOLDER, file.name)
    return None


def _has_step(report: Report, file: ModelFile) -> bool:
    return report.facts.step is not None and report.facts.step == file.number("step")


def _samples(arguments: argparse.Namespace, config: Config, file: ModelFile) -> Sequence[Sample]:
    """Pictures that are drawn now, or those of --samples, or the previews that the run drew at this step."""
    if arguments.prompt or arguments.prompts:
        short_hash = file.auto_v2 and file.auto_v2.lower()
        return [Sample(image, text) for image, text in draw_requested(arguments, short_hash, most=MOST)]
    if arguments.samples:
        return load_samples(find_pictures(arguments.samples))
    step = file.number("step")
    if not isinstance(config.output_dir, Path) or step is None:
        return ()
    folder = config.output_folder / "sample"
    previews = find_previews(folder, config.output_name, step=step, epoch=file.number("epoch"))
    if not previews and config.sample_prompts is not None:
        message = "the run drew no previews after its last step, %d: draw samples now with --prompts %s"
        logger.warning(message, step, config.sample_prompts)
    return load_samples(previews)


def _write(made: Card, folder: Path) -> None:
    pages = {language: Words(language) for language in FILES}
    blocks: dict[Language, list[Block]] = {language: page_blocks(made, words) for language, words in pages.items()}
    pictures: dict[str, Image.Image] = {}
    try:
        for number, sample in enumerate(made.samples, 1):
            pictures[picture_name(number)] = sample.image
            (folder / picture_name(number)).parent.mkdir(parents=True, exist_ok=True)
            save_image(folder / picture_name(number), sample.image, sample.text)
        for language, name in FILES.items():
            others = {one: f"{other}.html" for one, other in FILES.items() if one != language}
            _save(folder / f"{name}.md", markdown(blocks[language]))
            _save(folder / f"{name}.html", page_html(blocks[language], pictures, language, others))
    except OSError as error:
        message = f"the page cannot be written ({error.strerror}): choose another folder"
        raise UserError(Problem(message, key="output", value=str(folder))) from error
    names = ", ".join(f"{name}.{ending}" for name in FILES.values() for ending in ("md", "html"))
    print(f"wrote {names} and {counted(len(pictures), 'picture')} into {folder}")
    if fields := pages["en"].open_fields:
        fields = list(dict.fromkeys(fields))
        are = "is" if len(fields) == 1 else "are"
        print(f"{counted(len(fields), 'field')} of the page {are} still open. Only the author can fill them in:")
        print("\n".join(f"  {printable(field)}" for field in fields))


def _save(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
