"""Calls of the Hugging Face hub. Each call is a process of its own (hub_process.py), which can be ended at any time.

The client finds its endpoint, proxy and saved login in the environment, as in any other program (`HF_ENDPOINT`,
`HF_TOKEN`, `HF_HOME`, `HF_HUB_OFFLINE`).
"""

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sdxl_finetune
from sdxl_finetune.config import Config, HubOptions
from sdxl_finetune.config.hub import parse_place
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.parsing import parse_json

logger = logging.getLogger(__name__)

START_PATIENCE = 60.0
"""Seconds that the start of a run waits for the hub."""
NO_TOKEN, REFUSED, NOT_FOUND, FAILED = "no token", "refused", "not found", "failed"
"""Kinds of errors, as in hub_process.py, which is not imported here because it imports the client."""
ADVICE = {
    NO_TOKEN: "make a token with write access at https://huggingface.co/settings/tokens, and set HF_TOKEN to it",
    REFUSED: "give a token that may write there, as HF_TOKEN in the environment or as huggingface_token",
    NOT_FOUND: "check user, name and type of the repository, and that the token may see it",
    FAILED: "check the network, HF_ENDPOINT and the proxy",
}
"""Remedy for each kind of error."""


class HubError(Exception):
    """A call of the hub failed."""

    def __init__(self, kind: str, message: str) -> None:
        self.kind = kind
        super().__init__(f"{message.rstrip('. ')}: {ADVICE[kind]}")


class HubCall:
    """A running call of the hub."""

    def __init__(self, action: str, token: str | None, *, needs_token: bool = True, **request: Any) -> None:
        command = [sys.executable, "-m", "sdxl_finetune.output.hub_process"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=_environment()
        )
        text = json.dumps({"action": action, "token": token, "needs_token": needs_token, **request})
        assert self._process.stdin
        try:
            self._process.stdin.write(text.encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            pass  # the process has ended, which `result` tells

    def result(self, seconds: float | None = None) -> Any:
        """Waits for the answer, at most `seconds`, and returns it. Raises HubError."""
        assert self._process.stdin and self._process.stdout
        timer = threading.Timer(seconds or 0, self.stop)
        timer.daemon = True
        if seconds is not None:
            timer.start()
        try:
            text = self._process.stdout.read()
        finally:
            timer.cancel()
        status = self._process.wait()
        self._process.stdout.close()
        self._process.stdin.close()
        if not text:
            late = f"no answer within {seconds:g} seconds" if seconds and status else f"its process ended with {status}"
            raise HubError(FAILED, late)
        try:
            answer = parse_json(text)
            if "error" not in answer:
                return answer["result"]
            kind, message = str(answer["error"]), str(answer["message"])
        except (ValueError, KeyError, TypeError):  # it was killed while it wrote
            raise HubError(FAILED, "its answer cannot be read") from None
        raise HubError(kind if kind in ADVICE else FAILED, message)

    def stop(self) -> None:
        """Ends the call. `result` then raises HubError."""
        self._process.kill()


def target(options: HubOptions) -> dict[str, Any]:
    """The part of a request that names the repository for uploads."""
    return {
        "repo_id": options.huggingface_repo_id,
        "repo_type": options.huggingface_repo_type or "model",
        "private": options.huggingface_repo_visibility != "public",
    }


def check_access(options: HubOptions) -> None:
    """Creates the repository for uploads, and checks that the token may write to it. Does nothing without uploads.

    Raises UserError if the hub refuses, because no later upload would succeed then. A hub that cannot be reached is
    only a warning.
    """
    if not options.huggingface_repo_id:
        return
    try:
        HubCall("check_access", options.huggingface_token, **target(options)).result(START_PATIENCE)
    except HubError as error:
        if error.kind != FAILED:
            raise _user_error(error, options) from None
        logger.warning("huggingface_repo_id: %s. Training starts, and uploads are tried at each save", error)


def check_token(options: HubOptions) -> None:
    """Raises UserError if uploads are asked for and no token is found. Needs no network."""
    if options.huggingface_repo_id:
        try:
            HubCall("check_token", options.huggingface_token).result(START_PATIENCE)
        except HubError as error:
            raise _user_error(error, options) from None


def download_start(config: Config) -> Path:
    """Downloads what `resume` names on the hub into `cache_folder`, and returns its path there.

    Files that an earlier, interrupted download completed are not sent again. Raises UserError if it fails.
    """
    assert config.resume is not None
    text = config.resume.as_posix()
    place = parse_place(text)
    folder = f"{place.repo_type}--{place.repo_id.replace('/', '--')}"
    directory = config.cache_folder.absolute() / "hub" / folder
    logger.info("downloading %s from the Hugging Face hub to %s", text, directory)
    request: Mapping[str, Any] = {**vars(place), "local_dir": str(directory)}
    try:
        commit = HubCall("download", config.huggingface_token, needs_token=False, **request).result()
    except HubError as error:
        raise UserError(Problem(str(error), key="resume", value=text)) from None
    logger.info("downloaded %s at commit %s", text, commit)
    return directory / place.path


def _user_error(error: HubError, options: HubOptions) -> UserError:
    return UserError(Problem(str(error), key="huggingface_repo_id", value=options.huggingface_repo_id))


def _environment() -> dict[str, str]:
    environment = dict(os.environ)
    if environment.get(sdxl_finetune.OFFLINE_BY_DEFAULT):
        environment.pop("HF_HUB_OFFLINE", None)
    paths = [str(Path(sdxl_finetune.__file__).parents[1]), environment.get("PYTHONPATH", "")]
    return environment | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
