"""The report of scripts/gpu_acceptance.sh also works on a CPU.

Checks that can run on a CPU pass, checks that need CUDA say so, and exceptions become lines that say FAIL.
"""

import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scripts.benchmarks import gpu_acceptance, gpu_checks, gpu_speed, running
from scripts.benchmarks.gpu_acceptance import (
    head,
    memory_line,
    prepare,
    run_checks,
    table,
    unusable_gpu,
    utilisation_of,
)
from scripts.benchmarks.gpu_checks import Bench, Line, guarded_steps
from scripts.benchmarks.gpu_speed import enlarge
from sdxl_finetune.optim import update
from sdxl_finetune.runtime.out_of_memory import OutOfMemory
from sdxl_finetune.training.setup import build_run

NEED_CUDA = {"xformers against SDPA", "peak memory against the estimate"}
IN_PROCESS = [name for name in gpu_acceptance.CHECKS if name != "ranks"]
"""tests/runtime/test_processes.py starts two ranks."""

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # from torch's compiler, when it is imported
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),  # dynamo reads .grad and handles the warning
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return prepare(tmp_path_factory.mktemp("gpu"), cuda=False, quick=True)


def test_checks_that_can_run_on_a_cpu_pass(bench: Bench, monkeypatch) -> None:
    monkeypatch.setattr(gpu_checks, "SLICE", 1 << 14)
    monkeypatch.setattr(update, "SLICE", 1 << 14)
    lines = list(run_checks(bench, IN_PROCESS))
    assert [line for line in lines if line.outcome == "FAIL"] == []
    left_out = {line.name for line in lines if line.outcome == "not run"}
    assert left_out >= NEED_CUDA and sum(name.startswith("no waiting") for name in left_out - NEED_CUDA) == 3
    assert len(left_out) == 5 and len(lines) - len(left_out) == 8
    assert all("CUDA" in line.measured for line in lines if line.outcome == "not run")
    report = "\n".join([*head(), *table(lines)])
    assert "- device: CPU" in report and torch.__version__ in report
    assert report.count("| not run |") == 5 and report.count("| pass |") == 8


def test_a_check_that_raises_has_failed_and_the_others_still_run(bench: Bench, monkeypatch) -> None:
    def broken(_: Bench):
        yield Line("first", "something", "pass")
        raise ValueError("no | such\nthing")

    checks = {"broken": broken, "attention": gpu_acceptance.check_attention}
    monkeypatch.setattr(gpu_acceptance, "CHECKS", checks)
    lines = list(run_checks(bench, list(checks)))
    assert [line.outcome for line in lines] == ["pass", "FAIL", "not run"]
    assert lines[1].measured.startswith("raised ValueError: no | such (test_gpu_acceptance.py:")
    assert table(lines)[3].count("|") == 4


def test_guarded_steps_are_made_and_logged(bench: Bench) -> None:
    """On a GPU the guard makes torch raise where the host waits for the device."""
    assert guarded_steps(bench.build_config("--mixed_precision", "bf16", steps=4), nullcontext) == 2


def test_utilisation_uses_the_peak_of_the_named_device() -> None:
    assert utilisation_of("NVIDIA A100-SXM4-80GB", 7.0).endswith("144 of 312 TFLOP/s: model FLOP utilisation 46.2%")
    assert "149.7" in utilisation_of("NVIDIA A40", 1.0)
    for unknown in ("NVIDIA RTX A4000", "NVIDIA H100 PCIe"):
        assert utilisation_of(unknown, 1.0) == "21 TFLOP/s (unknown device: no peak to compare with)"


def test_peak_memory_is_compared_with_the_estimate(bench: Bench, monkeypatch) -> None:
    on_gpu, rows = replace(bench, cuda=True), [{"batch": 1, "peak_bytes": 2 << 30}, {"batch": 2, "peak_bytes": 3 << 30}]
    line = memory_line(on_gpu, bench.folder / "start.safetensors", rows)
    assert re.match(r"batch 1: 2.00 GiB \(estimate [0-9.]+ GiB\); batch 2: 3.00 GiB \(estimate ", line.measured)
    for share, outcome in ((1.05, "pass"), (1.2, "FAIL")):
        monkeypatch.setattr(
            gpu_acceptance, "estimated_peak_bytes", lambda config, at=share: at * ((1 + config.train_batch_size) << 30)
        )
        assert memory_line(on_gpu, bench.folder / "start.safetensors", rows).outcome == outcome


def test_a_torch_that_cannot_use_the_gpu_is_reported(monkeypatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", "")
    assert unusable_gpu() is None
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is a build without CUDA. Install one with it: .venv/bin/pip install" in unusable_gpu()
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    assert "driver is older than its CUDA 12.6" in unusable_gpu()


def test_a_batch_is_enlarged_by_repeating_its_images(bench: Bench) -> None:
    with build_run(bench.build_config("--train_batch_size", "1", steps=1)) as run:
        batch = next(run.batches())
    larger = enlarge(batch, 3)
    assert larger.latents.shape == (3, *batch.latents.shape[1:]) and larger.images_in_step == 3
    assert larger.weights.sum().item() == pytest.approx(1) and torch.equal(larger.tokens1[2], batch.tokens1[0])


def test_a_compiler_that_does_not_work_costs_no_other_figure(bench: Bench, monkeypatch) -> None:
    """The uncompiled blocks have their lines, and the compiled blocks one that says why they have failed."""
    monkeypatch.setattr(Bench, "backend", "no_such_backend")
    plain, _, compiled = gpu_acceptance.check_speed(bench)
    assert plain.outcome == "pass" and "batch 1: " in plain.measured
    assert compiled.outcome == "FAIL" and "no_such_backend does not work here" in compiled.measured


def test_batches_of_compiled_blocks_stop_where_memory_ends(bench: Bench, monkeypatch) -> None:
    def measured(_, batch, steps: int) -> dict[str, float]:
        if batch.images_in_step > 1:
            raise OutOfMemory("too much")
        return {"batch": 1, "images_per_second": 1.0}

    monkeypatch.setattr(gpu_speed, "measure_batch", measured)
    with build_run(bench.build_config("--train_batch_size", "1", steps=1)) as run:
        rows = list(gpu_speed.measure(run.learner, next(run.batches()), [1, 2, 4], 1, compiled=True))
    assert [(row["batch"], "out_of_memory" in row) for row in rows] == [(1, False), (2, True)]
    assert all(row["compiled"] for row in rows)


def test_a_program_that_does_not_end_is_ended(monkeypatch) -> None:
    monkeypatch.setattr(running, "LONGEST", 1)
    with pytest.raises(RuntimeError, match="not ended after 1 seconds"):
        running.run_python(["-c", "import time; print('begun', flush=True); time.sleep(600)"], cpu=True)
