"""Uploads to a real S3 server: attempts do not overlap, and a stopped run still uploads what it has saved."""

import json
import signal
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from sdxl_finetune.config import Config
from sdxl_finetune.output import uploads as module
from sdxl_finetune.output.checkpoints import remove
from sdxl_finetune.output.store_call import StoreCall
from sdxl_finetune.output.uploads import Upload, Uploads, open_uploads
from sdxl_finetune.runtime.signals import Interrupt, StopRequest
from sdxl_finetune.storage import Address, StorageError, list_files, objects, read, write
from tests.s3_server import S3Server

OUT = Address("s3://bucket/out")
SECONDS = 60
"""Patience of the tests."""
ROOM = 0.3
"""Seconds in which a fault would show."""


@pytest.fixture
def held(s3: S3Server) -> Iterator[S3Server]:
    """The server, which holds all writes back until `s3.hold` is set."""
    with s3.holding():
        yield s3


def uploads(folder: Path, *, rank: int = 0) -> Uploads:
    return Uploads(Config(), folder, "m", remove, rank=rank, address=OUT)


def state(path: Path, content: str) -> Path:
    path.mkdir(parents=True)
    for name in ("a", "b", "manifest.json"):
        (path / name).write_text(f"{content} {name}")
    return path


def stored() -> dict[str, str]:
    return {found.name: read(OUT / found.name).decode() for found in list_files(OUT)}


def begin(call: StoreCall, seconds: float) -> tuple[threading.Thread, list[str]]:
    """Waits in a thread for the result of a call. Returns the thread, and a list that gets the reason of its error."""
    errors: list[str] = []

    def wait() -> None:
        try:
            call.result(seconds)
        except StorageError as error:
            errors.append(error.reason)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread, errors


def test_an_upload_that_takes_too_long_has_ended_when_the_next_attempt_starts(held: S3Server, tmp_path: Path) -> None:
    folder = state(tmp_path / "state", "old")
    waiting, errors = begin(StoreCall(OUT, folder), 0.1)
    assert held.held.wait(SECONDS)
    waiting.join(ROOM)
    assert waiting.is_alive(), "a request that was sent may still be carried out"
    held.hold.set()
    waiting.join(SECONDS)
    assert errors == ["not complete within 0.1 seconds"] and stored() == {"a": "old a"}
    remove(folder)
    state(folder, "new")
    StoreCall(OUT, folder).result(SECONDS)
    assert stored() == {"a": "new a", "b": "new b", "manifest.json": "new manifest.json"}
    assert [path for method, path in held.paths if method == "PUT"].count("/bucket/out/b") == 1


def test_a_stopped_upload_of_a_large_file_leaves_nothing_in_the_store(held: S3Server, tmp_path: Path) -> None:
    file, parts = tmp_path / "weights", 12
    with file.open("wb") as opened:
        opened.truncate(parts * objects.RANGE)
    call = StoreCall(OUT / "weights", file)
    waiting, errors = begin(call, SECONDS)
    assert held.held.wait(SECONDS)
    call.stop()
    held.hold.set()
    waiting.join(SECONDS)
    assert errors == ["stopped"] and not stored()
    assert sum(method == "PUT" for method, _ in held.paths) < parts
    assert ("DELETE", "/bucket/out/weights") in held.paths, "the parts are deleted"


def test_an_upload_in_parts_is_the_file(s3: S3Server, tmp_path: Path) -> None:
    content = bytes(range(251)) * (2 * objects.RANGE // 251)
    (tmp_path / "weights").write_bytes(content)
    StoreCall(OUT / "weights", tmp_path / "weights").result(SECONDS)
    assert read(OUT / "weights") == content


def test_removing_what_the_store_does_not_hold_is_no_error(s3: S3Server, tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO")
    write(OUT / "other", b"x")
    StoreCall(OUT / "nothing", None).result(SECONDS)
    assert not caplog.text and stored() == {"other": "x"} and not s3.requests["DELETE"]


def stopped_run(each: Uploads, stop: StopRequest, s3: S3Server, *paths: Path) -> None:
    with pytest.raises(Interrupt), open_uploads(each, stop):
        each.add(paths[0])
        assert s3.held.wait(SECONDS)
        for path in paths[1:]:
            each.add(path)
        stop.number = signal.SIGTERM
        assert s3.hold
        threading.Timer(ROOM, s3.hold.set).start()
        stop.check()


def test_a_stopped_run_uploads_its_state_first_and_waits_for_it(held: S3Server, tmp_path: Path, monkeypatch) -> None:
    """The wait for the store is longer than that for the hub, whose uploads nothing needs soon."""
    monkeypatch.setattr(module, "STOPPED_WAIT", 0.0)
    paths = [tmp_path / name for name in ("first", "second")]
    for path in paths:
        path.write_text(path.name)
    stopped_run(uploads(tmp_path), StopRequest(), held, *paths, state(tmp_path / "state", "last"))
    assert stored().keys() == {"first", "second", "state/a", "state/b", "state/manifest.json"}
    order = [path.removeprefix("/bucket/out/") for method, path in held.paths if method == "PUT"]
    assert order == ["first", "state/a", "state/b", "state/manifest.json", "second"]
    assert not (tmp_path / "m-uploads.json").exists()


def test_a_launcher_that_kills_soon_ends_the_wait(held: S3Server, tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "0")
    (tmp_path / "a").write_text("a")
    assert held.hold
    monkeypatch.setattr(module, "CLOSE_WAIT", 0.0)
    stop = StopRequest()
    with pytest.raises(Interrupt), open_uploads(uploads(tmp_path), stop) as each:
        each.add(tmp_path / "a")
        assert held.held.wait(SECONDS)
        stop.number = signal.SIGTERM
        stop.check()
    assert "not uploaded: a. The next run with this config uploads them" in caplog.text
    assert (tmp_path / "m-uploads.json").exists() and not stored()
    held.hold.set()
    with open_uploads(uploads(tmp_path), None):
        pass
    assert stored() == {"a": "a"}


def test_another_rank_of_a_stopped_run_waits_for_the_uploads_of_the_first(held: S3Server, tmp_path: Path) -> None:
    """A launcher kills the first rank as soon as another one on its machine has ended."""
    (tmp_path / "a").write_text("a")
    stop = StopRequest()
    stop.number = signal.SIGTERM

    def other_rank() -> None:
        with pytest.raises(Interrupt), open_uploads(uploads(tmp_path, rank=1), stop):
            stop.check()

    first, other = uploads(tmp_path), threading.Thread(target=other_rank)
    with open_uploads(first, None):
        first.add(tmp_path / "a")
        other.start()
        other.join(ROOM)
        assert other.is_alive()
        assert held.hold
        held.hold.set()
    other.join(SECONDS)
    assert not other.is_alive() and stored() == {"a": "a"}
    elsewhere = threading.Thread(target=other_rank)  # a machine with another folder does not wait
    elsewhere.start()
    elsewhere.join(SECONDS)
    assert not elsewhere.is_alive()


def test_a_machine_that_returns_does_not_replace_what_another_one_has_saved_since(s3: S3Server, tmp_path: Path) -> None:
    for name in ("old", "new"):
        write(OUT / name, b"another machine's")
        write(OUT / f"{name} removed", b"another machine's")
        (tmp_path / name).write_text("returned")
    left = [Upload(name=name, address=str(OUT / name)) for name in ("old", "new")]
    left += [Upload(name=name, address=str(OUT / name), gone=True) for name in ("old removed", "new removed")]
    (tmp_path / "m-uploads.json").write_text(json.dumps([asdict(upload) for upload in left]))
    now = (tmp_path / "m-uploads.json").stat().st_mtime
    returned = uploads(tmp_path)
    returned.give_up_replaced({"old": now + 9, "old removed": now + 9, "new": now - 9, "new removed": now - 9})
    with open_uploads(returned, None):
        pass
    assert stored() == {"old": "another machine's", "old removed": "another machine's", "new": "returned"}
