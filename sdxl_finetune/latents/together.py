"""Encoding by all processes of a run: who encodes what, rounds in which they meet, and shards that all can read.

Records on the disk are encoded by all processes together. Records in memory are encoded by the processes of each
machine for that machine. While they encode, the processes meet every minute, so that none waits long for another, and
all stop when one is asked to stop.
"""

import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.latents.shards import Kind, Shard, ShardWriter, open_shards
from sdxl_finetune.progress import track
from sdxl_finetune.runtime.host import memory_bytes
from sdxl_finetune.runtime.signals import Interrupt, StopRequest

ROUND = 60
"""Seconds after which the processes meet and write their records. A kill loses at most this time."""


@dataclass(frozen=True)
class Team:
    """The processes that encode records of one kind together, as one of them sees it."""

    kind: Kind
    folder: Path | None
    """Folder of the shards; None for records in memory."""
    rank: int
    first_rank: int
    """Lowest rank on this machine."""
    ranks_here: int
    """Number of processes on this machine."""
    share: slice
    """The part of all records that this process encodes."""


def find_team(accelerator: Accelerator, kind: Kind, folder: Path | None) -> Team:
    """The team that fills `folder`, or this machine's memory if it is None. All processes call this together."""
    first_rank = accelerator.process_index - accelerator.local_process_index
    ranks_here = gather_object([first_rank]).count(first_rank)
    everyone = slice(accelerator.process_index, None, accelerator.num_processes)
    share = everyone if folder else slice(accelerator.local_process_index, None, ranks_here)
    return Team(kind, folder, accelerator.process_index, first_rank, ranks_here, share)


def open_together(team: Team, accelerator: Accelerator) -> list[Shard]:
    """The sound shards in the team's folder. The first process checks them before the other processes open them."""
    if team.folder is None:
        return []
    with accelerator.main_process_first():
        return open_shards(team.folder, team.kind, check=accelerator.is_main_process)


def encode_in_rounds(
    finished: Generator[int, None, None],
    count: int,
    writer: ShardWriter,
    team: Team,
    stop: StopRequest | None,
    unit: str,
) -> None:
    """Runs an encoder, which yields how many of this process's `count` records were finished since the last yield.

    Raises Interrupt on all processes once one was asked to stop.
    """
    total, active = sum(gather_object([count])), True
    with closing(finished) as running, track("encoding", total, unit, shown=not team.rank) as progress:
        while active:
            started, own, has_more = time.monotonic(), 0, False
            for number in running:
                own += number
                progress.update(number)
                has_more = stop is None or stop.number is None
                if not has_more or time.monotonic() > started + ROUND:
                    break
            else:
                has_more = False
            writer.flush()
            all_ranks = gather_object([(has_more, own, stop and stop.number)])
            progress.update(sum(number for _, number, _ in all_ranks) - own)
            if numbers := [number for _, _, number in all_ranks if number is not None]:
                raise Interrupt(numbers[0])
            active = any(has_more for has_more, _, _ in all_ranks)


def readable_shards(team: Team, written: Sequence[Shard]) -> list[Shard]:
    """The shards that all processes have written and that this process can read, oldest first."""
    everything = gather_object([(team.first_rank, list(written))])
    return [shard for machine, own in everything if team.folder or machine == team.first_rank for shard in own]


def check_memory(size: int, what: str, option: str) -> None:
    """Raises UserError if `size` bytes are more than the memory of this machine. `option` keeps them in memory."""
    memory = memory_bytes()
    if size > memory:
        message = f"{what} take {size / 1e9:.1f} GB, and this machine has {memory / 1e9:.1f} GB of memory"
        raise UserError(Problem(f"{message}: set {option}_to_disk", key=option, value=True))


def check_visible(files: Sequence[Path], *, complete: bool, scratch: Path) -> None:
    """Raises UserError if this process does not see what other processes have written."""
    if not complete or not all(path.exists() for path in files):
        message = "a process does not see what another process encoded: use one folder that all machines share"
        raise UserError(Problem(message, key="cache_dir", value=str(scratch)))
