"""Uploads to a hub on this machine, through the real client: what arrives, what is tried again, what is said."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdxl_finetune.config import Config
from sdxl_finetune.errors import UserError
from sdxl_finetune.output import uploads as module
from sdxl_finetune.output.checkpoints import remove
from sdxl_finetune.output.hub import FAILED, HubCall, HubError, check_access, check_token, download_start
from sdxl_finetune.output.uploads import Uploads, open_uploads
from sdxl_finetune.runtime.signals import Interrupt, StopRequest
from tests.hub_server import TOKEN, HubServer, Repository

SECONDS = 120
"""Patience of the tests."""


def options(**values) -> Config:
    return Config(**{"huggingface_repo_id": "user/repo", "huggingface_token": TOKEN, **values})


def uploads(folder: Path, **values) -> Uploads:
    return Uploads(options(**values), folder, "m", remove)


def write(path: Path, seed: int, size: int = 20_000) -> bytes:
    content = bytes((seed + number * number) % 251 for number in range(size))
    path.write_bytes(content)
    return content


def until(condition) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_files_and_folders_arrive_unchanged(hub: HubServer, tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.INFO)
    weights = write(tmp_path / "a.safetensors", 1)
    (tmp_path / "a-state").mkdir()
    parts = {name: write(tmp_path / "a-state" / name, size, size) for name, size in (("w", 9000), ("m.json", 40))}
    check_access(options())
    with open_uploads(uploads(tmp_path, huggingface_path_in_repo="some/folder/"), None) as each:
        each.add(tmp_path / "a.safetensors")
        each.add(tmp_path / "a-state")
    repository = hub.repositories["user/repo"]
    arrived = {f"some/folder/a-state/{name}": content for name, content in parts.items()}
    assert repository.files == {"some/folder/a.safetensors": weights, **arrived}
    assert repository.private and sorted(path.name for path in tmp_path.iterdir()) == ["a-state", "a.safetensors"]
    assert "uploaded a.safetensors to user/repo/some/folder/a.safetensors" in caplog.text
    assert all(record.levelno == logging.INFO for record in caplog.records)


@pytest.mark.parametrize(("visibility", "private"), [("public", False), ("private", True), (None, True)])
def test_a_repository_is_made_with_the_visibility_asked_for(hub: HubServer, visibility, private) -> None:
    check_access(options(huggingface_repo_visibility=visibility))
    assert hub.repositories["user/repo"].private is private


def test_a_failed_upload_is_tried_again_at_the_next_save(hub: HubServer, tmp_path: Path, caplog) -> None:
    hub.faults = [500]
    first, second = write(tmp_path / "a", 1), write(tmp_path / "b", 2)
    with open_uploads(uploads(tmp_path), None) as each:
        each.add(tmp_path / "a")
        until(lambda: "was not uploaded" in caplog.text)
        each.remove(tmp_path / "a")  # what waits for its upload is deleted only afterwards
        assert (tmp_path / "a").exists()
        each.add(tmp_path / "b")
        until(lambda: not (tmp_path / "a").exists())
    assert hub.repositories["user/repo"].files == {"a": first, "b": second}
    (warning,) = caplog.records
    assert "a was not uploaded to user/repo" in warning.getMessage() and "check the network" in warning.getMessage()


def test_what_is_left_is_uploaded_by_the_next_run(hub: HubServer, tmp_path: Path, caplog) -> None:
    hub.status = 500
    started = time.monotonic()
    with open_uploads(uploads(tmp_path, huggingface_path_in_repo="x"), None) as each:
        content = write(tmp_path / "a b", 1)
        each.add(tmp_path / "a b")
    assert time.monotonic() - started < SECONDS
    assert f"hf upload user/repo '{tmp_path / 'a b'}' 'x/a b' --private" in caplog.text
    assert [entry["name"] for entry in json.loads((tmp_path / "m-uploads.json").read_text())] == ["a b"]
    hub.status = None
    with open_uploads(uploads(tmp_path), None):
        pass
    assert hub.repositories["user/repo"].files == {"x/a b": content}
    assert [path.name for path in tmp_path.iterdir()] == ["a b"]


def test_what_the_hub_has_is_not_sent_again(hub: HubServer, tmp_path: Path) -> None:
    content = write(tmp_path / "a", 1)
    for _ in range(2):
        with open_uploads(uploads(tmp_path), None) as each:
            each.add(tmp_path / "a")
        assert hub.repositories["user/repo"].files == {"a": content}
        hub.repositories.clear()  # as if the run had been killed between the upload and the commit
    assert len(hub.sent) == 1


KILLED = """
import sys
from pathlib import Path
from sdxl_finetune.config import Config
from sdxl_finetune.output.uploads import Uploads
folder, token = Path(sys.argv[1]), sys.argv[2]
each = Uploads(Config(huggingface_repo_id="user/repo", huggingface_token=token), folder, "m", print)
each.start()
each.add(folder / "a")
input()
"""


def test_an_upload_whose_run_is_killed_ends_and_goes_on_with_the_next_run(hub: HubServer, tmp_path: Path) -> None:
    content = os.urandom(32 << 20)  # more than the buffers of a connection hold
    (tmp_path / "a").write_bytes(content)
    hub.hold = module.threading.Event()
    run = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path), TOKEN], stdin=subprocess.PIPE)
    try:
        assert hub.held.wait(SECONDS)
        os.kill(run.pid, signal.SIGKILL)
    finally:
        run.kill()
        run.communicate()
    time.sleep(0.5)
    hub.hold.set()
    assert hub.lost.wait(SECONDS)
    hub.hold = None
    with open_uploads(uploads(tmp_path), None):
        pass
    assert hub.repositories["user/repo"].files == {"a": content}


def test_a_file_saved_again_during_its_upload_is_uploaded_again(hub: HubServer, tmp_path: Path) -> None:
    write(tmp_path / "a", 1)
    hub.hold = module.threading.Event()
    with open_uploads(uploads(tmp_path), None) as each:
        each.add(tmp_path / "a")
        assert hub.held.wait(SECONDS)
        content = write(tmp_path / "new", 2)
        (tmp_path / "new").replace(tmp_path / "a")
        hub.hold.set()
    assert hub.repositories["user/repo"].files == {"a": content}


def test_a_stopped_run_waits_a_short_time_only(hub: HubServer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "STOPPED_WAIT", 0.3)
    write(tmp_path / "a", 1)
    hub.hold = module.threading.Event()
    stop = StopRequest()
    started = time.monotonic()
    with pytest.raises(Interrupt), open_uploads(uploads(tmp_path), stop) as each:
        each.add(tmp_path / "a")
        assert hub.held.wait(SECONDS)
        stop.number = signal.SIGTERM
        stop.check()
    assert time.monotonic() - started < SECONDS and (tmp_path / "m-uploads.json").exists()
    stop = StopRequest()  # a signal ends the wait of a complete run, which is no interruption
    with open_uploads(uploads(tmp_path), stop):
        module.threading.Timer(0.3, lambda: setattr(stop, "number", signal.SIGINT)).start()
    assert (tmp_path / "m-uploads.json").exists()


def test_with_async_upload_false_a_save_waits_for_its_upload(hub: HubServer, tmp_path: Path) -> None:
    content = write(tmp_path / "a", 1)
    with open_uploads(uploads(tmp_path, async_upload=False), None) as each:
        each.add(tmp_path / "a")
        assert hub.repositories["user/repo"].files == {"a": content}


def test_a_full_disk_comes_before_an_upload(hub: HubServer, tmp_path: Path, monkeypatch, caplog) -> None:
    hub.status = 500
    for name in ("a", "b"):
        write(tmp_path / name, 1)
    with open_uploads(uploads(tmp_path), None) as each:
        for name in ("a", "b"):
            each.add(tmp_path / name)
        each.remove(tmp_path / "a")
        assert (tmp_path / "a").exists()
        monkeypatch.setattr(module, "free_bytes", lambda _: 100)
        each.remove(tmp_path / "b")
        assert list(tmp_path.iterdir()) == []
    assert "a is deleted before its upload, because the disk is nearly full" in caplog.text


def test_secrets_are_in_no_message(hub: HubServer, tmp_path: Path, caplog) -> None:
    hub.object_status = 403
    write(tmp_path / "a", 1)
    with open_uploads(uploads(tmp_path), None) as each:
        each.add(tmp_path / "a")
    assert "403" in caplog.text and hub.sent
    assert "signature" not in caplog.text and TOKEN not in caplog.text
    assert TOKEN.encode() not in b"".join(path.read_bytes() for path in tmp_path.iterdir())


def refusal(function, config: Config) -> str:
    with pytest.raises(UserError) as caught:
        function(config)
    assert str(config.huggingface_token) not in str(caught.value)
    return str(caught.value)


def test_a_token_that_can_never_work_is_refused_at_the_start(hub: HubServer, monkeypatch) -> None:
    advice = "give a token that may write there, as HF_TOKEN in the environment or as huggingface_token"
    assert advice in refusal(check_access, options(huggingface_token="hf_wrong"))
    assert advice in refusal(check_access, options(huggingface_repo_id="stranger/repo"))
    hub.repositories["user/read-only"] = Repository(private=False)
    hub.readers.add("user/read-only")
    assert advice in refusal(check_access, options(huggingface_repo_id="user/read-only"))
    asked = len(hub.requests)
    assert "huggingface_repo_id = 'user/repo': there is no token: make" in refusal(
        check_token, options(huggingface_token=None)
    )
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    check_token(options(huggingface_token=None))
    assert not any("/api/models/" in request for request in hub.requests[asked:])
    check_access(options(huggingface_token=None))


def test_a_hub_that_cannot_be_reached_is_only_a_warning(hub: HubServer, monkeypatch, caplog) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    check_access(options())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    check_access(options())
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "Training starts, and uploads are tried at each save" in caplog.text and "HF_HUB_OFFLINE" in caplog.text


def test_a_download_goes_on_where_it_stopped(hub: HubServer, tmp_path: Path) -> None:
    state = {"w": os.urandom(24 << 20), "z": b"small"}  # the client writes parts of 10 MB
    files = {f"x/s/{name}": content for name, content in state.items()} | {"x/s2/w": b"other", "y": b"no"}
    hub.repositories["user/repo"] = Repository(private=True, files=files)
    hub.most_bytes, hub.withheld = 15 << 20, "x/s/z"
    config = options(resume=Path("user/repo/x/s:main:model"), resume_from_huggingface=True, output_dir=tmp_path)
    assert "withheld" in refusal(download_start, config)
    (first, start), (second, resumed) = hub.served
    assert first == second == "x/s/w" and start == 0 and resumed >= 10_000_000  # the connection broke off
    hub.withheld = None
    path = download_start(config)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == state
    assert [file for file, _ in hub.served] == ["x/s/w", "x/s/w", "x/s/z"]
    assert download_start(config) == path and len(hub.served) == 3
    hub.status = 500
    assert "check the network" in refusal(download_start, config)  # not what an earlier download left
    hub.status = None
    missing = config.model_copy(update={"resume": Path("user/repo/x/none")})
    assert "has no file or folder x/none" in refusal(download_start, missing)
    assert "check user, name" in refusal(download_start, config.model_copy(update={"resume": Path("user/no/x")}))


def test_parts_of_a_killed_download_are_removed(hub: HubServer, tmp_path: Path) -> None:
    hub.repositories["user/repo"] = Repository(private=True, files={"s/w": b"all"})
    config = options(resume=Path("user/repo/s"), resume_from_huggingface=True, output_dir=tmp_path)
    path = download_start(config)
    part = path.parent / ".cache" / "huggingface" / "download" / "s" / "w.1234.incomplete"
    part.write_bytes(b"part")
    download_start(config)
    assert not part.exists() and (path / "w").read_bytes() == b"all"


@pytest.mark.parametrize(
    "answer", ["[", "[" * 100_000, "3", "[]", "{}", '{"error": 3}', '{"error": "x", "message": [1]}']
)
def test_an_answer_that_cannot_be_read_is_a_failed_call(tmp_path: Path, monkeypatch, answer: str) -> None:
    """The process that talks to the hub was killed while it wrote, or something else has written."""
    program = tmp_path / "python"
    (tmp_path / "answer").write_text(answer)
    program.write_text(f"#!/bin/sh\nread request\ncat {tmp_path / 'answer'}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(HubError) as caught:
        HubCall("check_access", "token").result(60)
    assert caught.value.kind == FAILED and "check the network" in str(caught.value)
