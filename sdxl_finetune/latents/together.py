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

from sdxl_finetune.config import Config
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.files import free_bytes, size_text
from sdxl_finetune.latents.alone import alone
from sdxl_finetune.latents.catalogue import CATALOGUE, Shelf
from sdxl_finetune.latents.shards import Kind, Shard, ShardWriter
from sdxl_finetune.progress import track
from sdxl_finetune.runtime.host import memory_bytes
from sdxl_finetune.runtime.signals import StopRequest
from sdxl_finetune.storage import Address, LocalCopies, Location

ROUND = 60
"""Seconds after which the processes meet and write their records. A kill loses at most this time."""


@dataclass(frozen=True)
class Team:
    """The processes that encode records of one kind together, as one of them sees it."""

    kind: Kind
    shelf: Shelf | None
    """Folder of the shards; None for records in memory."""
    scratch: Path
    """Local folder for temporary files."""
    copies: LocalCopies | None
    """Local copies of shards in an object store."""
    rank: int
    first_rank: int
    """Lowest rank on this machine."""
    ranks_here: int
    """Number of processes on this machine."""
    share: slice
    """The part of all records that this process encodes."""

    @property
    def is_local_first(self) -> bool:
        """True for the first process of each machine."""
        return self.rank == self.first_rank

    @property
    def in_store(self) -> bool:
        """True if the shards are in an object store, so that each machine has a catalogue of its own."""
        return self.shelf is not None and isinstance(self.shelf.folder, Address)

    @property
    def keeps_catalogue(self) -> bool:
        """True for the process that checks the shards and writes the catalogue that this process reads."""
        return self.is_local_first if self.in_store else self.rank == 0

    def writer(self) -> ShardWriter:
        """Writes this process's records."""
        folder = self.shelf.folder if self.shelf else None
        return ShardWriter(folder, self.kind, self.rank, self.scratch, self.copies)


def find_team(accelerator: Accelerator, kind: Kind, config: Config, *, on_disk: bool) -> Team:
    """The team that fills `cache_dir`, or without `on_disk` this machine's memory. All processes call this together."""
    first_rank = accelerator.process_index - accelerator.local_process_index
    ranks_here = gather_object([first_rank]).count(first_rank)
    everyone = slice(accelerator.process_index, None, accelerator.num_processes)
    share = everyone if on_disk else slice(accelerator.local_process_index, None, ranks_here)
    scratch = config.cache_folder
    catalogue = kind.folder(scratch) / CATALOGUE
    shelf = Shelf(kind.folder(config.cache_location), kind, catalogue) if on_disk else None
    return Team(kind, shelf, scratch, config.copies, accelerator.process_index, first_rank, ranks_here, share)


def open_together(team: Team, accelerator: Accelerator) -> list[Shard]:
    """The sound shards in the team's folder that all processes see.

    The first process checks them before the other processes open them.
    """
    if team.shelf is None:
        return []
    with accelerator.local_main_process_first() if team.in_store else accelerator.main_process_first():
        shards = team.shelf.open(check=team.keeps_catalogue)
    # Another run may have added shards between two openings. All processes must find the same records missing.
    names = [set(own) for own in gather_object([[shard.path.name for shard in shards]])]
    return [shard for shard in shards if all(shard.path.name in own for own in names)]


def encode_in_rounds(
    finished: Generator[int, None, None],
    count: int,
    writer: ShardWriter,
    team: Team,
    stop: StopRequest | None,
    unit: str,
) -> None:
    """Runs an encoder, which yields how many of this process's `count` records were finished since the last yield.

    Raises Interrupt on all processes once one was asked to stop, and FilledMeanwhile after waiting for another run.
    """
    with alone(team, stop):
        _encode_in_rounds(finished, count, writer, team, stop, unit)


def _encode_in_rounds(
    finished: Generator[int, None, None],
    count: int,
    writer: ShardWriter,
    team: Team,
    stop: StopRequest | None,
    unit: str,
) -> None:
    total, active = sum(gather_object([count])), True
    with closing(finished) as running, track("encoding", total, unit, shown=not team.rank) as progress:
        while active:
            started, own, has_more = time.monotonic(), 0, False
            for number in running:
                own += number
                progress.update(number)
                has_more = stop is None or stop.cause is None
                if not has_more or time.monotonic() > started + ROUND:
                    break
            else:
                has_more = False
            writer.flush()
            all_ranks = gather_object([(has_more, own, stop and stop.cause)])
            progress.update(sum(number for _, number, _ in all_ranks) - own)
            if causes := [cause for _, _, cause in all_ranks if cause is not None]:
                raise causes[0]
            active = any(has_more for has_more, _, _ in all_ranks)


def readable_shards(team: Team, written: Sequence[Shard]) -> list[Shard]:
    """The shards that all processes have written and that this process can read, oldest first."""
    everything = gather_object([(team.first_rank, list(written))])
    return [shard for machine, own in everything if team.shelf or machine == team.first_rank for shard in own]


def join_shards(team: Team, before: Sequence[Shard], made: Sequence[Shard]) -> list[Shard]:
    """All shards, oldest first. Keeps their tables for the next start, and raises UserError if some are not seen."""
    shards = sorted([*before, *made], key=lambda shard: shard.path.name)
    if team.shelf and made:
        if not team.shelf.sees(made):
            raise _not_seen(str(team.shelf.folder))
        if team.keeps_catalogue:
            team.shelf.remember(shards)
    return shards


def check_memory(size: int, what: str, option: str) -> None:
    """Raises UserError if `size` bytes are more than the memory of this machine. `option` keeps them in memory."""
    memory = memory_bytes()
    if size > memory:
        message = f"{what} take {size / 1e9:.1f} GB, and this machine has {memory / 1e9:.1f} GB of memory"
        raise UserError(Problem(f"{message}: set {option}_to_disk", key=option, value=True))


def check_disk(size: int, what: str, folder: Location) -> None:
    """Raises UserError if `size` bytes that are to be encoded do not fit on the disk of a local folder."""
    if isinstance(folder, Path) and size > (free := free_bytes(folder)):
        message = f"{what} take {size_text(size)}, and the disk has {size_text(free)} free"
        raise UserError(Problem(f"{message}: free space, or set another cache_dir", file=str(folder)))


def check_complete(team: Team, *, complete: bool) -> None:
    """Raises UserError if this process does not find what other processes have written."""
    if not complete:
        raise _not_seen(str(team.shelf.folder if team.shelf else team.scratch))


def _not_seen(folder: str) -> UserError:
    message = "a process does not see what another process encoded: use one folder or address that all machines share"
    return UserError(Problem(message, key="cache_dir", value=folder))
