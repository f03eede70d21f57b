"""A process that is stopped, or that is late for the others, takes the run down with a message that names it."""

import os
import signal
from pathlib import Path

from tests.runtime.test_processes import children, launch, output, wait_for

QUICK = """
import sdxl_finetune.runtime.watch as watch
watch.BEAT, watch.SILENT = 0.5, 45
from sdxl_finetune.cli import train
if __name__ == "__main__":
    train()
"""


def rank_of(pid: int) -> str:
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(entry[5:].decode() for entry in environment if entry.startswith(b"RANK="))


def test_a_stopped_rank_takes_the_run_down_and_is_named(work) -> None:
    Path("quick.py").write_text(QUICK)
    options = ["--max_train_epochs", "500", "--save_every_n_epochs", "1"]
    process = launch(*options, program=["quick.py"], TORCH_ELASTIC_SHUTDOWN_TIMEOUT="5")
    wait_for(Path("out"), "*-000001.safetensors", process)
    stopped = next(pid for pid in children(process) if rank_of(pid) == "1")
    os.kill(stopped, signal.SIGSTOP)
    printed = output(process, seconds=600)
    assert process.returncode == 1
    assert f"error: no sign of life for 45 seconds from rank 1 (process {stopped} on {os.uname().nodename})" in printed
    assert printed.count("error: ") == 1 and "rank 1" in printed.partition("Root Cause")[2], printed
    assert not Path(f"/proc/{stopped}").exists()
    assert not list(Path("out").glob(".*.tmp"))


LATE = """
import time
import sdxl_finetune.runtime.watch as watch
watch.BEAT = 0.5
import sdxl_finetune.data.loader as loader
read = loader.TrainingDataset.__getitem__
def slow(self, micro_batch):
    if micro_batch.position.step == 1:
        watch.MARGIN = 570
        time.sleep(3600 * self.rank)
    return read(self, micro_batch)
loader.TrainingDataset.__getitem__ = slow
from sdxl_finetune.cli import train
if __name__ == "__main__":
    train()
"""


def test_a_rank_that_hangs_in_a_read_takes_the_run_down_and_is_named(work) -> None:
    """The limit of torch is 10 minutes. Here, a process reports after it has waited for 30 seconds."""
    Path("late.py").write_text(LATE)
    process = launch(
        "--ddp_timeout", "10", "--max_train_epochs", "20", program=["late.py"], TORCH_ELASTIC_SHUTDOWN_TIMEOUT="5"
    )
    printed = output(process, seconds=600)
    assert process.returncode == 1
    assert printed.count("error: ") == 1, printed
    assert "seconds for one another: rank 1 (process " in printed and "data/workers.py" in printed, printed
    assert "ddp_timeout" in printed
