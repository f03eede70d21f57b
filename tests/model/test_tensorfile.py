"""Written files equal the safetensors library's byte for byte, and damaged files are named as such."""

import json
import os
import struct
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sdxl_finetune.errors import UserError
from sdxl_finetune.model.tensorfile import open_tensors, source_of, write_safetensors

DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.int64])
NAMES = st.text('abcé."\\0123', min_size=1, max_size=6)
SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(NAMES, st.tuples(SHAPES, DTYPES), min_size=1, max_size=6), st.booleans())
def test_written_bytes_are_the_library_s(
    tmp_path_factory: pytest.TempPathFactory, specs: dict, with_metadata: bool
) -> None:
    tensors = {name: torch.randint(-9, 9, shape).to(dtype) for name, (shape, dtype) in specs.items()}
    metadata = {"modelspec.title": "é"} if with_metadata else {}
    folder = tmp_path_factory.mktemp("files")
    write_safetensors(folder / "a", {name: source_of(tensor) for name, tensor in tensors.items()}, metadata)
    save_file(tensors, folder / "b", metadata or None)
    assert (folder / "a").read_bytes() == (folder / "b").read_bytes()


def test_metadata_order_changes_no_byte(tmp_path: Path) -> None:
    """The library gives metadata in an order that changes from process to process."""
    metadata = {name: name.upper() for name in "abc"}
    for name, ordered in (("there", metadata), ("back", dict(reversed(metadata.items())))):
        write_safetensors(tmp_path / name, {"x": source_of(torch.ones(2))}, ordered)
    assert (tmp_path / "there").read_bytes() == (tmp_path / "back").read_bytes()


def test_transposed_and_sliced_tensors_are_written_correctly(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    sources = {"t": source_of(tensor.t()), "s": source_of(tensor[:, 1:3])}
    write_safetensors(tmp_path / "a.safetensors", sources, {})
    read = load_file(tmp_path / "a.safetensors")
    assert torch.equal(read["t"], tensor.t())
    assert torch.equal(read["s"], tensor[:, 1:3])


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_are_read_nested_or_flat_zipped_or_old(tmp_path: Path, nested: bool, zipped: bool) -> None:
    state = {"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.float16)}
    content = {"state_dict": state, "epoch": 3, "global_step": 70} if nested else state
    torch.save(content, tmp_path / "m.ckpt", _use_new_zipfile_serialization=zipped)
    opened = open_tensors(tmp_path / "m.ckpt")
    assert (opened.epoch, opened.global_step) == ((3, 70) if nested else (None, None))
    assert opened.tensors["b"].shape == (2, 2)
    for key, tensor in state.items():
        assert opened.tensors[key].dtype == tensor.dtype
        assert torch.equal(opened.tensors[key].read(), tensor)


class Code:
    def __reduce__(self) -> tuple:
        return (print, ("run",))


def test_a_pickle_with_code_is_refused_and_its_code_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {}, "hook": Code()}, tmp_path / "m.ckpt")
    with pytest.raises(UserError, match="could run any code"):
        open_tensors(tmp_path / "m.ckpt")
    assert capsys.readouterr().out == ""


def truncated(path: Path, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("name", ["m.safetensors", "m.ckpt"])
def test_truncated_files_are_named_as_damaged(tmp_path: Path, name: str, share: float) -> None:
    path = tmp_path / name
    state = {f"tensor{n}": torch.randn(50) for n in range(20)}
    save_file(state, path) if name.endswith("safetensors") else torch.save(state, path)
    with pytest.raises(UserError, match="damaged") as error:
        open_tensors(truncated(path, share))
    assert name in str(error.value)


def test_the_format_is_known_by_content_and_not_by_name(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "m.ckpt")
    assert list(open_tensors(tmp_path / "m.ckpt").tensors) == ["a"]
    torch.save({"a": torch.ones(2)}, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="rename"):
        open_tensors(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS pointer"),
        (b"<!doctype html><html>", "web page"),
        (b"GGUF\x03\x00", "GGUF"),
        (b"\xff" * 100, "damaged"),
        (struct.pack("<Q", 9) + b"not json!" + b"\0" * 9, "damaged"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_files_that_are_no_checkpoint_are_named(tmp_path: Path, content: bytes, message: str, suffix: str) -> None:
    path = tmp_path / f"m{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_tensors(path)


def test_a_pickle_without_tensors_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "m.pt")
    with pytest.raises(UserError, match="no named tensors"):
        open_tensors(tmp_path / "m.pt")


def test_a_dtype_that_cannot_be_trained_is_named(tmp_path: Path) -> None:
    header = {"a": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [0, 2]}}
    text = json.dumps(header).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0\0")
    with pytest.raises(UserError, match="F8_E8M0"):
        open_tensors(tmp_path / "m.safetensors")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_not_utf8_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"m\xff.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "m.safetensors")
    (tmp_path / "m.safetensors").rename(path)
    with pytest.raises(UserError, match=r"m\\udcff\.safetensors: the path is not UTF-8.*rename"):
        open_tensors(path)
