"""Pickled checkpoints and optimizer states run no code, and ask for no memory out of proportion."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from sdxl_finetune.errors import UserError
from sdxl_finetune.model.pickles import load_pickle
from sdxl_finetune.model.tensorfile import open_tensors


class MakesFile:
    """Makes a file when it is unpickled by a loader that runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def zipped(content: object) -> bytes:
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("read", [load_pickle, open_tensors])
def test_code_in_a_file_is_never_run(tmp_path: Path, is_zip: bool, read) -> None:
    made, path = tmp_path / "made", tmp_path / "model.ckpt"
    content = {"state_dict": {"a": torch.zeros(2)}, "code": MakesFile(made)}
    path.write_bytes(zipped(content) if is_zip else pickle.dumps(content))
    with pytest.raises(UserError, match="could run any code: convert it"):
        read(path)
    assert not made.exists()
    torch.load(path, weights_only=False) if is_zip else pickle.loads(path.read_bytes())
    assert made.exists()  # the file is dangerous to other readers


def test_tensors_that_claim_more_values_than_the_file_has_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(zipped({"state_dict": {"a": torch.zeros(1).expand(1 << 20, 1 << 20)}}))
    assert path.stat().st_size < 10_000
    with pytest.raises(UserError, match=r"a tensor of the shape \(1048576, 1048576\) has fewer values than that"):
        load_pickle(path)


def test_members_that_unpack_to_far_more_than_the_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    packed = io.BytesIO(zipped({"a": torch.zeros(2)}))
    with zipfile.ZipFile(packed) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
        new.writestr("archive/data/1", bytes(50_000_000))
    with pytest.raises(UserError, match="its members would unpack to 50,"):
        load_pickle(path)


@pytest.mark.parametrize("place", range(0, 100, 7))
def test_damaged_files_have_one_message(tmp_path: Path, place: int) -> None:
    """Each byte in a hundredth of the file is changed. A change that is not in use may stay without effect."""
    path = tmp_path / "model.ckpt"
    data = bytearray(zipped({"state_dict": {f"a{number}": torch.ones(3) for number in range(4)}}))
    start, end = len(data) * place // 100, len(data) * (place + 1) // 100
    data[start:end] = bytes(byte ^ 0xFF for byte in data[start:end])
    path.write_bytes(data)
    try:
        load_pickle(path)
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error)


def test_keys_that_are_no_text_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(zipped({"state_dict": {1: torch.zeros(1), "a": torch.zeros(1)}}))
    assert list(open_tensors(path).tensors) == ["a"]
    path.write_bytes(zipped({"state_dict": 3}))
    with pytest.raises(UserError, match="holds no named tensors"):
        open_tensors(path)
