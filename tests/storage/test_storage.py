"""Locations and what is done at them: local files and a real S3 server, over connections that break too."""

import os
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote
from urllib.request import Request, urlopen

import pytest

from sdxl_finetune.storage import (
    Address,
    Location,
    StorageError,
    delete,
    exists,
    list_files,
    objects,
    parse_location,
    read,
    stat,
    write,
)
from sdxl_finetune.storage.folders import fetch
from tests.s3_server import CREDENTIALS, Proxy, S3Server

STRANGE = "a b#%41é+&=?x"


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, s3: S3Server) -> Location:
    return tmp_path / "folder" if request.param == "local" else Address("s3://bucket/folder")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "PAUSES", (0.05, 0.1, 0.1))


@pytest.fixture
def broken(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[type]:
    """broken(faults=, limit=, stall=): puts a breaking proxy before the server."""
    proxies = []

    def start(**options: object) -> Proxy:
        proxies.append(Proxy(s3.port, **options))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxies[-1].port}")
        objects.forget_stores()
        return proxies[-1]

    yield start
    for proxy in proxies:
        proxy.close()


class TestParsing:
    def test_address_works_like_a_path(self) -> None:
        address = parse_location("s3://bucket/a/b.txt")
        assert isinstance(address, Address)
        assert (str(address), address.store, address.key) == ("s3://bucket/a/b.txt", "s3://bucket", "a/b.txt")
        assert (address.name, address.suffix, str(address.parent)) == ("b.txt", ".txt", "s3://bucket/a")
        assert str(parse_location("s3://bucket") / "c" / "d") == "s3://bucket/c/d"
        assert str(address.with_name("z")) == "s3://bucket/a/z"
        assert pickle.loads(pickle.dumps(address)) == address and hash(address) == hash(Address(str(address)))

    def test_local_functions_refuse_an_address(self) -> None:
        with pytest.raises(TypeError, match="s3://bucket/a is no local file"):
            Path(os.fspath(Address("s3://bucket/a")))

    def test_any_other_text_is_a_local_path(self) -> None:
        for text in ("a/b", "/a", "C:\\train", "s3:/x", "auto", "user/name:main:model"):
            assert parse_location(text) == Path(text)

    @pytest.mark.parametrize("text", ["ftp://host/a", "s3://", "s3:///key", "s3://bucket/../x"])
    def test_wrong_address_is_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match="address"):
            parse_location(text)

    @pytest.mark.parametrize("text", ["https://me:passw0rd@host/a", "https://host/a?X-Amz-Signature=passw0rd"])
    def test_address_with_a_password_is_refused_without_showing_it(self, text: str) -> None:
        with pytest.raises(ValueError, match="environment") as error:
            parse_location(text)
        assert "passw0rd" not in str(error.value)


class TestAccess:
    def test_write_then_read(self, folder: Location) -> None:
        place = folder / STRANGE / "x.bin"
        write(place, b"0123456789")
        assert (read(place), read(place, 3), read(place, 3, 4), read(place, 2, 0)) == (
            b"0123456789", b"3456789", b"3456", b"",
        )  # fmt: skip
        assert stat(place).size == 10 and 0 <= stat(place).version < 2**63
        assert exists(place) and not exists(folder / "none")

    def test_version_changes_with_the_content(self, folder: Location) -> None:
        write(folder / "a", b"old")
        before = stat(folder / "a").version
        write(folder / "a", b"new")
        assert stat(folder / "a").version != before

    def test_listing_finds_everything_below_the_folder_alone(self, folder: Location) -> None:
        names = {"a", "sub/b", f"sub/{STRANGE}"}
        for name in names:
            write(folder / name, name.encode())
        write(folder.with_name("folder2") / "c", b"another folder with the same beginning")
        found = {one.name: one for one in list_files(folder)}
        assert set(found) == names
        assert all(stat(folder / name).version == one.version and one.size == len(name.encode())
                   for name, one in found.items())  # fmt: skip
        assert list(list_files(folder / "none")) == []

    def test_large_file_passes_in_ranges(self, folder: Location, tmp_path: Path) -> None:
        data = os.urandom(objects.RANGE * 2 + 12345)
        (tmp_path / "source").write_bytes(data)
        write(folder / "big", tmp_path / "source")
        assert read(folder / "big") == data
        assert read(folder / "big", 7, objects.RANGE + 1) == data[7 : objects.RANGE + 8]

    def test_delete(self, folder: Location) -> None:
        write(folder / "a", b"x")
        delete(folder / "a")
        delete(folder / "a")
        assert not exists(folder / "a")

    def test_missing_and_short_files_are_named(self, folder: Location, quick: None) -> None:
        with pytest.raises(StorageError) as missing:
            read(folder / "none")
        assert missing.value.missing and str(missing.value).startswith(f"{folder}/none: ")
        copy = pickle.loads(pickle.dumps(missing.value))
        assert (str(copy), copy.missing) == (str(missing.value), True)
        write(folder / "short", b"123")
        with pytest.raises(StorageError, match="short: ends after 3 bytes, of 9 expected"):
            read(folder / "short", 1, 8)

    def test_small_object_costs_one_request(self, s3: S3Server) -> None:
        write(Address("s3://bucket/a"), b"x")
        read(Address("s3://bucket/a"))
        read(Address("s3://bucket/a"), 0, 1)
        assert s3.requests == {"PUT": 1, "GET": 2}

    def test_listing_costs_one_request_for_1000_objects(self, s3: S3Server) -> None:
        for number in range(1001):
            write(Address(f"s3://bucket/many/{number}"), b"")
        s3.clear()
        assert sum(1 for _ in list_files(Address("s3://bucket/many"))) == 1001
        assert s3.requests == {"GET": 2}


def put(s3: S3Server, place: str, data: bytes = b"") -> None:
    """Writes an object as another program does, which allows any name. `place` is bucket and key."""
    headers = {"Host": "localhost", "Content-Type": "application/octet-stream"}
    with urlopen(Request(f"{s3.url}/{quote(place)}", data, headers, method="PUT")):
        pass


class TestObjectsOfOtherPrograms:
    def test_a_folder_that_a_console_made_is_downloaded(self, s3: S3Server, tmp_path: Path) -> None:
        """Consoles make a folder as an empty object, whose name ends in a slash."""
        for name in ("", "unet/", "unet/sub/", "unet/sub/empty.txt"):
            put(s3, f"bucket/model/{name}")
        put(s3, "bucket/model/unet/config.json", b"{}")
        path = fetch(Address("s3://bucket/model"), tmp_path)
        files = {one.relative_to(path).as_posix(): one.read_bytes() for one in path.rglob("*") if one.is_file()}
        assert files == {"unet/config.json": b"{}", "unet/sub/empty.txt": b""}

    @pytest.mark.parametrize(("folder", "name"), [("1", "a//b.png"), ("2", "./c.png"), ("3", "tab\t.png")])
    def test_a_name_that_cannot_be_used_is_named(self, s3: S3Server, folder: str, name: str) -> None:
        s3.create("others")  # the bucket of all tests is emptied through these functions
        key = f"{folder}/{name}"
        put(s3, f"others/{key}")
        with pytest.raises(StorageError) as error:
            list(list_files(Address(f"s3://others/{folder}")))
        beginning = f"s3://others/{folder}: cannot be listed: an object's name ({key!a}) has"
        assert str(error.value).startswith(beginning) and str(error.value).endswith("rename the object")


class TestFaults:
    def test_dropped_connections_are_retried(self, broken: type, quick: None) -> None:
        data = os.urandom(1 << 20)
        write(Address("s3://bucket/a"), data)
        proxy = broken(faults=4, limit=100_000)
        assert read(Address("s3://bucket/a")) == data
        assert proxy.connections > proxy.faults

    def test_dropped_connections_during_a_listing_lose_no_name(self, broken: type, quick: None, s3: S3Server) -> None:
        names = [f"{number:05d}" for number in range(1200)]
        for name in names:
            write(Address(f"s3://bucket/many/{name}"), b"")
        proxy = broken(faults=3, limit=20_000)
        assert [one.name for one in list_files(Address("s3://bucket/many"))] == names
        assert proxy.connections > proxy.faults

    def test_dropped_connections_during_an_upload_are_retried(self, broken: type, quick: None) -> None:
        broken(faults=3, limit=10)
        write(Address("s3://bucket/a"), b"whole" * 1000)
        assert read(Address("s3://bucket/a")) == b"whole" * 1000

    def test_stalled_answer_is_given_up_and_asked_for_again(
        self, broken: type, quick: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = os.urandom(1 << 20)
        write(Address("s3://bucket/a"), data)
        monkeypatch.setattr(objects, "TIMEOUT", 0.5)
        broken(faults=1, limit=1000, stall=True)
        assert read(Address("s3://bucket/a")) == data

    def test_dead_server_is_one_error_that_names_the_object(self, broken: type, quick: None) -> None:
        broken(faults=1000, limit=0)
        with pytest.raises(StorageError, match=r"^s3://bucket/a: cannot be read, after 4 attempts: "):
            read(Address("s3://bucket/a"))

    @pytest.mark.parametrize("action", ["read", "write", "list", "stat", "delete"])
    @pytest.mark.parametrize("fault", ["drop", "missing bucket", "refused"])
    def test_no_error_shows_credentials(
        self, broken: type, quick: None, s3: S3Server, monkeypatch: pytest.MonkeyPatch, action: str, fault: str
    ) -> None:
        if fault == "drop":
            broken(faults=1000, limit=30)
        elif fault == "refused":
            monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
            objects.forget_stores()
        bucket = "missing" if fault == "missing bucket" else "bucket"
        place = Address(f"s3://{bucket}/a")
        actions = {
            "read": lambda: read(place),
            "write": lambda: write(place, b"x"),
            "list": lambda: list(list_files(place)),
            "stat": lambda: stat(place),
            "delete": lambda: delete(place),
        }
        try:
            actions[action]()
        except StorageError as error:
            shown = f"{error} {error!r} {error.__cause__}"
            assert f"s3://{bucket}/a" in shown
            for secret in (CREDENTIALS["AWS_ACCESS_KEY_ID"], CREDENTIALS["AWS_SECRET_ACCESS_KEY"], "Signature"):
                assert secret not in shown
        else:
            assert fault == "missing bucket" and action == "delete"


@pytest.mark.parametrize(
    ("address", "variables", "reason"),
    [
        ("az://box/a.png", {}, "the environment names no account: set AZURE_STORAGE_ACCOUNT_NAME"),
        (
            "abfs://box/a.png",
            {"AZURE_STORAGE_ACCOUNT_NAME": "x", "AZURE_STORAGE_ACCOUNT_KEY": "my secret!"},
            "AZURE_STORAGE_ACCOUNT_KEY in the environment is no valid key: correct it",
        ),
        (
            "gs://box/a.png",
            {"GOOGLE_SERVICE_ACCOUNT": "/my secret.json"},
            "the credentials that GOOGLE_SERVICE_ACCOUNT names cannot be read: correct it",
        ),
        (
            "gs://box/a.png",
            {"GOOGLE_SERVICE_ACCOUNT_KEY": "{my secret"},
            "the credentials that GOOGLE_SERVICE_ACCOUNT names cannot be read: correct it",
        ),
    ],
)
def test_impossible_credentials_of_other_stores_are_named_at_once(monkeypatch, address, variables, reason) -> None:
    """No request is made, nothing is tried again, and no credential is shown."""
    for name in list(os.environ):
        if name.startswith(("AZURE_", "GOOGLE_")):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(time, "sleep", lambda _seconds: pytest.fail("tried again"))
    objects.forget_stores()
    place = parse_location(address)
    assert isinstance(place, Address)
    for function in (stat, read, lambda one: list(list_files(one)), lambda one: write(one, b"x"), delete):
        with pytest.raises(StorageError) as caught:
            function(place)
        assert str(caught.value) == f"{place.store}: cannot be used: {reason}"
    objects.forget_stores()


def test_missing_credentials_are_not_asked_for_again(s3: S3Server, monkeypatch) -> None:
    """Without variables the library asks the metadata service of a cloud, which most machines do not have."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(time, "sleep", lambda _seconds: pytest.fail("tried again"))
    objects.forget_stores()
    for function in (stat, read, lambda one: list(list_files(one))):
        with pytest.raises(StorageError, match="no credentials: set them in the environment"):
            function(Address("s3://bucket/a"))
    objects.forget_stores()


def test_clients_of_google_and_azure_are_made_from_the_environment(monkeypatch) -> None:
    """No request is made: these tests have no server for either."""
    from obstore.store import AzureStore, GCSStore

    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "c2VjcmV0")
    objects.forget_stores()
    for text, kind in (("az://box/a", AzureStore), ("abfs://box/a", AzureStore), ("gs://box/a", GCSStore)):
        place = parse_location(text)
        assert isinstance(place, Address) and place.key == "a"
        assert isinstance(objects._store(place.store), kind)
    objects.forget_stores()


def test_a_file_that_goes_away_hides_no_other_file(tmp_path: Path) -> None:
    """A link without a target is listed by the system, and then not found, as a file that was just renamed."""
    for number in range(20):
        (tmp_path / f"{number}").write_text("x")
        (tmp_path / f"{number} gone").symlink_to(tmp_path / "nowhere")
    assert {found.name for found in list_files(tmp_path)} == {f"{number}" for number in range(20)}
