"""Tokens, keys and passwords reach no message, log, checkpoint or training state, whatever fails."""

import logging
import os
import stat
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from sdxl_finetune.config import Config, load_config, to_toml
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.output.console import console
from sdxl_finetune.output.metadata import build_metadata, shareable
from sdxl_finetune.redaction import known_secrets, redacted
from tests.training.toy_runs import OPTIONS

HUB, KEY, SESSION = "hf_" + "Ab3" * 11, "0123456789abcdef" * 2 + "01234567", "session/token+of=the=store"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("GET https://user:pass@host/a failed", "GET https://***@host/a failed"),
        ("https://host/a?X-Signature=abc&b=1: 403", "https://host/a?*** 403"),
        (f"401 for {HUB}.", "401 for ***."),
        (f"headers: {{'Authorization': 'Bearer {KEY}'}}", "headers: {'Authorization': 'Bearer ***'}"),
        ("a path s3://bucket/hf_folder/a.png?", "a path s3://bucket/hf_folder/a.png?"),
    ],
)
def test_secrets_are_known_by_their_form(text: str, shown: str) -> None:
    assert redacted(text) == shown
    assert str(Problem(text)) == shown


def test_secrets_of_the_environment_are_known(monkeypatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", SESSION)
    monkeypatch.setenv("HF_TOKEN", "a")  # so short a text would be hidden within words
    assert redacted(f"x {SESSION} y", known_secrets()) == "x *** y"
    assert redacted("a word", known_secrets()) == "a word"


@pytest.mark.parametrize(
    "name", ["huggingface_tokn", "wandb_apikey", "hub_token", "WANDB_API_KEY", "aws_secret_access_key"]
)
def test_the_value_of_an_unknown_option_that_may_be_a_secret_is_not_shown(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.toml").write_text(f'{name} = "{KEY}"\nlearning_rat = "1"\n')
    with pytest.raises(UserError) as caught:
        load_config(["--config", str(tmp_path / "a.toml"), f"--{name}x", KEY], program="sdxl-train")
    assert KEY not in str(caught.value) and f"{name}" in str(caught.value) and "learning_rat = " in str(caught.value)


def test_secrets_in_the_values_of_other_options_are_replaced() -> None:
    options = {"metadata_description": f"with {HUB}", "optimizer_args": [f"x='{HUB}'"]}
    config = Config(huggingface_token=HUB, huggingface_repo_id="a/b", **options)
    metadata = build_metadata(config, epoch=1, step=1, seed=1, now=datetime(2026, 1, 1))
    assert metadata["modelspec.description"] == "with ***"
    assert HUB not in "".join([*metadata.values(), to_toml(config), str(shareable(config))])


def test_messages_and_tracebacks_in_logs_hide_the_secrets_of_the_config(tmp_path: Path) -> None:
    config = Config(wandb_api_key=KEY, log_with="wandb", console_log_file=tmp_path / "log.txt")
    with console(config, 0):
        try:
            raise RuntimeError(f"the server said: {KEY}")
        except RuntimeError:
            logging.getLogger("sdxl_finetune.test").exception("with %s", KEY)
    text = (tmp_path / "log.txt").read_text()
    assert KEY not in text and text.count("***") == 2 and "RuntimeError: the server said" in text


def run(*words: str, umask: int = 0o022, **environment: str) -> subprocess.CompletedProcess[str]:
    """sdxl-train in a process of its own."""
    command = [sys.executable, "-m", "sdxl_finetune", *words]
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "disabled", **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, umask=umask)


def test_a_run_leaves_its_secrets_nowhere_and_its_files_with_ordinary_permissions(work: Path) -> None:
    """The key is in the config and in a description, and a token in the environment. wandb is not installed."""
    options = [*OPTIONS, "--max_train_steps", "2", "--save_state", "--save_every_n_steps", "1", "--log_config"]
    options += ["--log_with", "wandb", "--wandb_api_key", KEY, "--metadata_description", f"by {KEY}"]
    options += ["--cache_latents_to_disk", "--sample_every_n_steps", "2", "--sample_prompts", "prompts.txt"]
    (work / "prompts.txt").write_text("a cat --w 64 --h 64 --s 1\n")
    before = set(work.rglob("*"))
    done = run(*options, umask=0o027, AWS_SESSION_TOKEN=SESSION, HF_TOKEN=HUB)
    assert done.returncode == 0, done.stderr
    secrets = (HUB, KEY, SESSION)
    assert not any(secret in done.stdout + done.stderr for secret in secrets)
    new = [path for path in work.rglob("*") if path not in before]
    assert {path.relative_to(work).parts[0] for path in new} == {"out", "logs"}
    assert sum(path.name == "optimizer.pt" for path in new) == 3
    for path in new:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o750 if path.is_dir() else 0o640), f"{path}: {mode:o}"
        if path.is_file():
            content = path.read_bytes()
            assert not any(secret.encode() in content for secret in secrets), path


def test_a_traceback_hides_the_secrets_of_the_config(work: Path) -> None:
    """A failure of the program itself: what it runs raises an error that quotes the key."""
    (work / "failing.py").write_text(
        "def run(config):\n    raise RuntimeError(f'no login with {config.wandb_api_key}')\n"
    )
    code = "import sys; from sdxl_finetune import cli; cli._run('sdxl-train', 'failing', 'run')"
    path = os.pathsep.join([str(work), str(Path(__file__).parents[1])])
    command = [sys.executable, "-c", code, *OPTIONS, "--log_with", "wandb", "--wandb_api_key", KEY]
    for rank in ({}, {"RANK": "0"}):
        variables = {**os.environ, "PYTHONPATH": path, **rank}
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
        assert done.returncode == 1 and "RuntimeError: no login with ***" in done.stderr and KEY not in done.stderr
