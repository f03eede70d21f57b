"""The process that talks to the Hugging Face hub: one request on its standard input, one answer on its output.

    python -m sdxl_finetune.output.hub_process

hub.py starts this process. A connection that hangs, or a crash of the client, stays without effect on the training.
The request is a line of JSON. It holds the token, because other processes can read arguments and environments. The
answer is a line of JSON too: `{"result": ...}`, or `{"error": kind, "message": text}`. The process ends when its input
is closed, so that it never outlives the run.
"""

import contextlib
import glob
import json
import os
import re
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token

NO_TOKEN, REFUSED, NOT_FOUND, FAILED = "no token", "refused", "not found", "failed"
"""Kinds of errors. REFUSED: the hub does not accept the token. FAILED: another attempt may succeed."""
KINDS = {401: REFUSED, 403: REFUSED, 404: NOT_FOUND}
"""Kind of error by HTTP status."""


class _KnownError(Exception):
    """An error whose kind is known: its arguments are kind and message."""


def check_token(api: HfApi, request: dict[str, Any]) -> None:
    """Does nothing: a missing token is found before."""


def check_access(api: HfApi, request: dict[str, Any]) -> None:
    """Creates the repository if it is missing, and checks that the token may write to it."""
    _create_repository(api, request)
    api.auth_check(request["repo_id"], repo_type=request["repo_type"], write=True)


def upload(api: HfApi, request: dict[str, Any]) -> str:
    """Uploads a file or a folder to a path in the repository. The client sends only what the hub does not have."""
    _create_repository(api, request)
    target = {name: request[name] for name in ("repo_id", "repo_type", "path_in_repo")}
    path = Path(request["path"])
    if path.is_dir():
        return str(api.upload_folder(folder_path=path, commit_message=f"Upload {path.name}", **target))
    return str(api.upload_file(path_or_fileobj=path, commit_message=f"Upload {path.name}", **target))


def download(api: HfApi, request: dict[str, Any]) -> str:
    """Downloads a file or folder into `local_dir`, and returns the commit. Complete files are not sent again."""
    repository = {name: request[name] for name in ("repo_id", "repo_type")}
    # The commit is asked for first. Without it the client takes old files for current ones when the hub is not reached.
    commit = api.repo_info(revision=request["revision"], **repository).sha
    for part in Path(request["local_dir"]).glob(".cache/huggingface/download/**/*.incomplete"):
        part.unlink()  # of a download that was killed; the client never uses it again
    path = glob.escape(request["path"])
    api.snapshot_download(
        revision=commit,
        local_dir=request["local_dir"],
        allow_patterns=[path, f"{path}/*"] if path else None,
        **repository,
    )
    if not Path(request["local_dir"], request["path"]).exists():
        raise _KnownError(NOT_FOUND, f"the repository has no file or folder {request['path']}")
    return str(commit)


def _create_repository(api: HfApi, request: dict[str, Any]) -> None:
    repository = {name: request[name] for name in ("repo_id", "repo_type")}
    if not api.repo_exists(**repository):
        api.create_repo(private=request["private"], exist_ok=True, **repository)


ACTIONS = {"check_token": check_token, "check_access": check_access, "upload": upload, "download": download}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request. An error is part of the answer, so that no traceback can show the token."""
    token = request["token"]
    try:
        token = token or get_token()
        if not token and request["needs_token"]:
            raise _KnownError(NO_TOKEN, "there is no token")
        return {"result": ACTIONS[request["action"]](HfApi(token=token), request)}
    except _KnownError as error:
        kind, message = error.args
    except Exception as error:
        response = getattr(error, "response", None)
        kind = KINDS.get(getattr(response, "status_code", 0), FAILED)
        # The client hides why an object was not accepted behind a RuntimeError.
        cause = error.__cause__ or error if isinstance(error, RuntimeError) else error
        message = " ".join(str(cause).split()) or type(cause).__name__
    message = message.replace(token or "\0", "[token]").replace("For more information check: ", "")
    message = re.sub(r"\?\S+|https://developer\S+ ?", "", message)  # queries of URLs hold signatures
    return {"error": kind, "message": message[:300]}


def main() -> None:
    """Reads the request, writes the answer, and ends at once if the run ends before."""
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the run, which decides what becomes of this process
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):
        os.nice(10)
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    request = json.loads(sys.stdin.buffer.readline())

    def end_with_the_run() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    threading.Thread(target=end_with_the_run, daemon=True).start()
    print(json.dumps(answer(request)), file=output, flush=True)
    os._exit(0)  # without waiting for threads of the client that hang


if __name__ == "__main__":
    main()
