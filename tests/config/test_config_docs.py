"""Generated documentation and shipped configs are in step with the schema."""

import hashlib
from pathlib import Path

import pytest

from sdxl_finetune.config import Config
from sdxl_finetune.config.docs import FROM_REFERENCE, options_markdown, template, with_table
from sdxl_finetune.config.reading import read_file, tomllib
from sdxl_finetune.config.unsupported import FOREIGN, REFERENCE

ROOT = Path(__file__).parents[2]
RELEASE = "ec03f23df84aa925a71184ba0cc7d43a5de7953c87c8b342ee61cade86f2a670"
"""SHA-256 of the release's parameters as their author published them."""


@pytest.mark.parametrize(
    ("path", "generate"), [("docs/options.md", options_markdown), ("configs/template.toml", template)]
)
def test_generated_files_match_the_schema(path, generate):
    message = f"{path} is stale: see sdxl_finetune/config/docs.py for how to make it"
    assert (ROOT / path).read_text(encoding="utf-8") == generate(), message


def test_the_table_of_the_reference_s_options_matches_the_schema():
    text = (ROOT / FROM_REFERENCE).read_text(encoding="utf-8")
    assert with_table(text) == text, "run python -m sdxl_finetune.config.docs reference"


def test_the_template_uncommented_is_the_default_config():
    lines = template().splitlines()
    text = "\n".join(line.removeprefix("# ") for line in lines if line.split(" = ")[0][2:] in Config.model_fields)
    values = tomllib.loads(text)
    assert set(values) == set(Config.model_fields)
    assert Config(**values) == Config()


def test_style_toml_is_the_published_parameters_after_a_marked_block():
    text = (ROOT / "configs" / "style.toml").read_text(encoding="utf-8")
    block, verbatim = text.split("the release's parameters, verbatim", 1)
    verbatim = verbatim.split("\n", 1)[1]
    assert hashlib.sha256(verbatim.encode()).hexdigest() == RELEASE
    keys = {line.split(" = ")[0] for line in block.splitlines() if line and not line.startswith("#")}
    assert keys == {"pretrained_model_name_or_path", "train_data_dir", "output_name", "sample_prompts"}


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.toml")), ids=lambda path: path.name)
def test_shipped_configs_load(path):
    given, problems, remarks = read_file(str(path))
    assert not problems and not remarks
    assert not set(given) - set(Config.model_fields) - set(REFERENCE) - set(FOREIGN)
    Config(**{name: one.value for name, one in given.items() if name in Config.model_fields})
