"""A dump that is damaged, or was made by somebody else on purpose, ends in one message that names the file."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdxl_finetune.batch import Batch, LatentSize, Position
from sdxl_finetune.config import Config, load_config
from sdxl_finetune.errors import UserError
from sdxl_finetune.model.random_model import SMALL, TINY
from sdxl_finetune.training.dump_reading import check_fit, read_dump
from sdxl_finetune.training.dumps import BATCHES, STEP, Dump, DumpedBatch, _write
from sdxl_finetune.training.loop import train
from sdxl_finetune.training.reproduce import NOT_REPRODUCED
from tests.training.toy_runs import config


def made_batch(count: int = 2, **changes: object) -> Batch:
    sizes = torch.tensor([[64, 64]]).expand(count, 2).contiguous()
    tokens = torch.full((count, 1, 77), 49407)
    fields = {
        "position": Position(epoch=0, step=0, micro_batch=0, micro_batches_in_step=1),
        "latents": torch.randn(count, 4, 8, 8),
        "images": None,
        "encoding_noise": None,
        "noise": torch.randn(count, 4, 8, 8),
        "input_noise": None,
        "timesteps": torch.arange(count) * 400,
        "tokens1": tokens,
        "tokens2": tokens.clone(),
        "original_size": sizes,
        "crop_top_left": torch.zeros_like(sizes),
        "target_size": sizes.clone(),
        "weights": torch.full((count,), 1 / count),
        "images_in_step": count,
    }
    return Batch(**(fields | changes))


def made_dump(folder: Path, options: Config | None = None, **changes: object) -> Path:
    batch = made_batch(**changes)
    names = [f"images/{number}.png" for number in range(len(batch.weights))]
    dumped = DumpedBatch(batch, names, [float("nan")] * len(names))
    _write(folder, options or Config(), Dump(step=1, steps=4, seed=5, ranks=1, batches=[dumped]))
    return folder


def test_a_dump_is_read_as_it_was_written(tmp_path: Path) -> None:
    given = made_batch(mask=torch.ones(2, 8, 8), token_weights=torch.ones(2, 1, 77), input_noise=torch.ones(2, 4, 8, 8))
    dump = read_dump(made_dump(tmp_path / "a", **vars(given)))
    assert (dump.step, dump.steps, dump.seed, dump.ranks) == (1, 4, 5, 1)
    (read,) = dump.batches
    assert list(read.images) == ["images/0.png", "images/1.png"]
    for name, value in vars(given).items():
        found = getattr(read.batch, name)
        assert torch.equal(found, value) if isinstance(value, Tensor) else found == value, name


NESTED = "[" * 100_000


@pytest.mark.parametrize(
    "change",
    [
        {"format": "1"}, {"format": 0}, {"step": "1"}, {"step": 0}, {"step": 5}, {"step": True}, {"steps": 2**40},
        {"steps": -1}, {"seed": -1}, {"seed": 2**63}, {"seed": None}, {"processes": 0}, {"batches": []},
        {"batches": {}}, {"batches": [3]}, {"batches": [{}]}, {"position": 3}, {"position": {}}, {"images": [3, 4]},
        {"position": {"epoch": 0, "step": 1, "micro_batch": 0, "micro_batches_in_step": 1}},
        {"position": {"epoch": 0, "step": 0, "micro_batch": 1, "micro_batches_in_step": 1}},
        {"images": ["a"]}, {"images": []}, {"losses": ["a", "b"]}, {"losses": [float("inf"), 1]}, {"losses": [1]},
        {"first_slot": 1}, {"first_slot": None}, {"first_slot": -1}, {"images_in_step": 1}, {"images_in_step": "2"},
    ],
    ids=repr,
)  # fmt: skip
def test_impossible_values_in_the_description_are_refused(tmp_path: Path, change: dict) -> None:
    path = made_dump(tmp_path / "a") / STEP
    values = json.loads(path.read_text())
    (name,) = change
    (values["batches"][0] if name in values["batches"][0] else values).update(change)
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"step\.json: this part of a dump cannot be read") as caught:
        read_dump(path.parent)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"null", b"\xff\xfe", NESTED.encode(), b'{"format": 1}', b" " * (65 << 20)]
)
def test_a_description_of_another_program_is_refused(tmp_path: Path, text: bytes) -> None:
    path = made_dump(tmp_path / "a") / STEP
    path.write_bytes(text)
    with pytest.raises(UserError, match=r"step\.json: this part of a dump cannot be read"):
        read_dump(path.parent)


def other_type(name: str, dtype: torch.dtype) -> dict:
    return {name: lambda tensor: tensor.to(dtype)}


@pytest.mark.parametrize(
    "change",
    [
        {"noise": None}, {"latents": None}, {"tokens2": None}, {"weights": None}, {"timesteps": None},
        {"noise": lambda _: torch.zeros(2, 4, 9, 8)}, {"noise": lambda _: torch.zeros(0, 4, 8, 8)},
        {"latents": lambda _: torch.zeros(2, 8, 8)}, {"weights": lambda _: torch.ones(3)},
        {"tokens1": lambda tensor: tensor + 1}, {"tokens2": lambda tensor: tensor - 2**40},
        {"tokens1": lambda _: torch.zeros(2, 1, 76, dtype=torch.int64)},
        {"target_size": lambda _: torch.zeros(2, 3, dtype=torch.int64)},
        other_type("latents", torch.float64), other_type("tokens1", torch.int32), other_type("weights", torch.float16),
        other_type("timesteps", torch.uint8), other_type("timesteps", torch.bool),
        other_type("timesteps", torch.complex64),
        {"images": lambda _: torch.zeros(2, 3, 64, 64)}, {"hidden": lambda _: torch.zeros(2, 77, 64)},
        {"mask": lambda _: torch.ones(2, 1, 8, 8)}, {"input_noise": lambda _: torch.ones(2, 3, 8, 8)},
    ],
)  # fmt: skip
def test_tensors_that_are_no_batch_are_refused(tmp_path: Path, change: dict) -> None:
    path = made_dump(tmp_path / "a") / BATCHES
    tensors = load_file(path)
    ((name, make),) = change.items()
    given = tensors.pop(f"0.{name}", None)
    save_file(tensors | {f"0.{name}": make(given)} if make else tensors, path)
    with pytest.raises(UserError, match=r"batches\.safetensors: this part of a dump cannot be read") as caught:
        read_dump(path.parent)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"PK\x03\x04", (1 << 40).to_bytes(8, "little") + b"{}", NESTED.encode(),
     (100_000).to_bytes(8, "little") + NESTED.encode()],
)  # fmt: skip
def test_a_file_that_holds_no_tensors_is_refused(tmp_path: Path, content: bytes) -> None:
    path = made_dump(tmp_path / "a") / BATCHES
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"batches\.safetensors: this part of a dump cannot be read"):
        read_dump(path.parent)


def test_a_header_that_claims_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    path = made_dump(tmp_path / "a") / BATCHES
    header = json.dumps({"0.noise": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UserError, match="cannot be read"):
        read_dump(path.parent)


def test_random_damage_gives_a_dump_or_one_message(tmp_path: Path) -> None:
    folder = made_dump(tmp_path / "a")
    whole = {name: (folder / name).read_bytes() for name in (STEP, BATCHES)}
    draw, refused = random.Random(1), 0
    for number in range(400):
        name = draw.choice([STEP, BATCHES])
        data = bytearray(whole[name])
        for _ in range(draw.choice([1, 1, 3, 30])):
            place = draw.randrange(min(len(data), 3000))
            match draw.randrange(3):
                case 0:
                    data[place] = draw.randrange(256)
                case 1:
                    del data[place : place + draw.randrange(1, 20)]
                case 2:
                    data[place:place] = data[draw.randrange(len(data)) :][: draw.randrange(1, 20)]
        (folder / name).write_bytes(data[: draw.randrange(len(data))] if number % 10 == 0 else data)
        try:
            read_dump(folder)
        except UserError as error:
            refused += 1
            (problem,) = error.problems
            assert (problem.file or "") == str(folder / name), problem
        (folder / name).write_bytes(whole[name])
    assert 100 < refused < 400


@pytest.mark.parametrize(
    ("changes", "architecture", "options", "said"),
    [
        ({"latents": torch.zeros(2, 16, 8, 8), "noise": torch.zeros(2, 16, 8, 8)}, TINY, {}, "noise has 16 channels"),
        ({"latents": None, "images": torch.zeros(2, 3, 64, 72)}, TINY, {}, r"images have the size \[64, 72\]"),
        ({"timesteps": torch.tensor([1, 1000])}, TINY, {}, "from 0 to 999"),
        ({"timesteps": torch.tensor([1, -1])}, TINY, {}, "from 0 to 999"),
        ({"timesteps": torch.tensor([1.0, 2.0])}, TINY, {}, "from 0 to 999, or flow_model = true"),
        ({"timesteps": torch.tensor([1.0, 2.0])}, TINY, {"flow_model": True}, None),
        ({"count": 1, "latents": torch.ones(1, 4, 2, 2), "noise": torch.ones(1, 4, 2, 2)}, TINY, {}, "cannot compute"),
        ({}, TINY, {"cache_text_encoder_outputs": True}, "it holds tokens"),
        ({"tokens1": None, "tokens2": None, "hidden": torch.zeros(2, 77, 9), "pooled": torch.zeros(2, 5)}, TINY, {},
         "pooled has the width 5"),
        ({"tokens1": None, "tokens2": None, "hidden": torch.zeros(2, 77, SMALL.te1.width + SMALL.te2.width),
          "pooled": torch.zeros(2, SMALL.te2.projection)}, SMALL, {}, None),
    ],
)  # fmt: skip
def test_batches_that_do_not_fit_the_model_are_refused(tmp_path, changes, architecture, options, said) -> None:
    folder = made_dump(tmp_path / "a", **changes)
    arguments = (read_dump(folder), folder, Config(**options), architecture, LatentSize())
    if said is None:
        check_fit(*arguments)
        return
    with pytest.raises(UserError, match=rf"batches\.safetensors: batch 0 does not fit .*{said}"):
        check_fit(*arguments)


def test_the_exit_status_says_whether_the_fault_comes_back(work, capsys) -> None:
    """A batch with a weight that is infinite, and the same batch without it."""
    for weights, status, said in (
        (torch.tensor([1.0, torch.inf]), 0, "reproduced"),
        (torch.ones(2), NOT_REPRODUCED, "not reproduced: all numbers are finite"),
    ):
        folder = made_dump(work / "out" / f"dump{status}", config(), weights=weights)
        loaded = load_config(["--reproduce", str(folder)], program="sdxl-train")
        assert loaded is not None
        assert train(loaded) == status
        AcceleratorState._reset_state(reset_partial_state=True)
        assert capsys.readouterr().out.splitlines()[-1] == said


def test_the_program_names_the_file_and_prints_no_traceback(work) -> None:
    """The checks of types that the tests add to the package do not run in a process of its own."""
    folder = made_dump(work / "out" / "dump", config())
    save_file(load_file(folder / BATCHES) | {"0.noise": torch.zeros(2, 4, 8, 9)}, folder / BATCHES)
    command = [sys.executable, "-m", "sdxl_finetune", "--reproduce", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error:")] == [
        f"error: {folder / BATCHES}: this part of a dump cannot be read (0.noise is float32 of the shape [2, 4, 8, 9],"
        " and must be Float32 of the shape [k z h w]): use another dump"
    ]
    assert "Traceback" not in done.stderr
