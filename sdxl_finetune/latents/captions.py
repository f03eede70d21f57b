"""Cached outputs of the text encoders: variants of captions, their keys, and encoding those that are missing.

A caption is encoded as it is trained: from one of its sources, with prefix and suffix, one of its lines, and its
wildcards drawn. With `text_encoder_outputs_variants` = N there are N such draws of each caption, which also differ by
shuffled and dropped tags. Variant number i is a function of text and options of the caption, so that equal captions are
encoded and stored once. A key is the hash of the variant's text and of the tokenizer. Outputs are computed in float32
and kept in float16.
"""

import contextlib
import hashlib
import logging
import math
import os
import random
import secrets
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Bool, Float16, Int32, Int64, Shaped, UInt8
from torch import Tensor

from sdxl_finetune.config import Config, Subset
from sdxl_finetune.data.caption_sources import Texts, choose_text
from sdxl_finetune.data.captions import AS_WRITTEN, caption
from sdxl_finetune.data.index import Index
from sdxl_finetune.data.tables import kept_file, map_array
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.latents.alone import again_if_filled
from sdxl_finetune.latents.keys import hash16
from sdxl_finetune.latents.library import Library
from sdxl_finetune.latents.records import Records
from sdxl_finetune.latents.shards import Kind, Shard, ShardWriter
from sdxl_finetune.latents.store import TextStore, write_table
from sdxl_finetune.latents.together import (
    Team,
    check_complete,
    check_memory,
    encode_in_rounds,
    find_team,
    join_shards,
    open_together,
    readable_shards,
)
from sdxl_finetune.runtime.signals import StopRequest
from sdxl_finetune.seeding import position_random
from sdxl_finetune.storage import Address, Location, read
from sdxl_finetune.storage.copies import touch

logger = logging.getLogger(__name__)

OUTPUTS_VERSION = "1"
"""Version of the way from a caption's text to a record. Another version gives other keys."""
ROWS = 1 << 12
"""Rows of the index whose captions are in Python's memory at once, and of which one process makes the keys."""
KEYS_FOLDER = "caption_keys"
"""Folder of files of keys in `cache_dir`."""
KEYS = ".keys.npy"
"""Ending of a file of keys."""
KEPT = 4
"""Files of keys that are kept, the newest ones. Each has 16 bytes for each image and variant."""
CHECKED = 100
"""Images whose keys are made again at each start: at most 0.1 seconds."""
LOOKED_AT = 100
"""Images beside which the reference's cached outputs are looked for; a reference run writes one for each image."""
ALWAYS_KEPT = {"caption_dropout_rate": 0.0, "caption_dropout_every_n_epochs": 0}
"""Options of captions to encode. A dropped caption is the empty one, which has an output of its own."""
GOLDEN_SECTION = (math.sqrt(5) - 1) / 2
NEVER_DRAWN = random.Random(0)
"""Generator for captions in which nothing is random."""
TOO_LARGE = "remove it, because 16-bit numbers cannot hold the text encoders' outputs for the caption"

EncodeText = Callable[[Sequence[str]], Callable[[], Float16[Tensor, "k n"]]]
"""Starts to encode captions. Returns a function that waits for their records: hidden states and pooled output."""


@runtime_checkable  # jaxtyping checks annotations in the tests
class TextEncoder(Protocol):
    """Both text encoders and their tokenizer, as far as the cache knows them."""

    hidden_shape: tuple[int, int]
    """Positions and channels of the hidden states."""
    pooled_size: int
    """Channels of the pooled output."""
    tokenizer_identity: str
    """A text that is equal for tokenizers that give the same tokens."""
    zeroed: Callable[[str], bool] | None
    """True for captions whose outputs are zero. None: there are no such captions."""

    def identity(self) -> str:
        """A name that depends on the weights of both encoders alone."""
        ...

    def on_device(self) -> AbstractContextManager[EncodeText]:
        """A context in which the encoders are on the training device and encode."""
        ...


@dataclass(frozen=True)
class Captions:
    """All captions of an index, each in `variants` variants. The row after the last image is the empty caption."""

    index: Index
    variants: int
    tokenizer: str
    """Identity of the tokenizer."""
    zeroed: Callable[[str], bool] | None = None
    """As in TextEncoder. Zeros have keys of their own, so that all other outputs are found again."""

    @property
    def used(self) -> Bool[np.ndarray, " rows"]:
        """True for captions that are trained on or validated, and for the empty caption."""
        return np.append(self.index.used, True)

    def text(self, row: int, number: int) -> str:
        """The caption of this row in the variant of this number."""
        return "" if row == len(self.index) else self._variant(row, self.index.captions(row, row + 1)[0], number)

    def keys(self) -> UInt8[np.ndarray, "rows v 16"]:
        """The keys of all captions in use, in all variants; 0 for captions that are not in use."""
        keys = np.zeros((len(self.index) + 1, self.variants, 16), np.uint8)
        self.fill(keys)
        return keys

    def fill(self, keys: UInt8[np.ndarray, "rows v 16"], part: int = 0, parts: int = 1) -> None:
        """Writes the keys of one of several equal parts of the captions into an array, and those of the empty caption.

        A part is every `parts`-th block of ROWS rows.
        """
        used = self.index.used
        for start in range(part * ROWS, len(self.index), parts * ROWS):
            for row, texts in enumerate(self.index.captions(start, start + ROWS), start):
                if used[row]:
                    keys[row] = self._keys_of(row, texts)
        keys[-1] = self.keys_of(len(self.index))

    def keys_of(self, row: int) -> UInt8[np.ndarray, "v 16"]:
        """The keys of one caption."""
        if row < len(self.index):
            return self._keys_of(row, self.index.captions(row, row + 1)[0])
        return np.tile(np.frombuffer(self._key(""), np.uint8), (self.variants, 1))

    def _keys_of(self, row: int, texts: Texts) -> UInt8[np.ndarray, "v 16"]:
        variants = self.variants if self._is_drawn(row, texts) else 1
        own = b"".join(self._key(self._variant(row, texts, number)) for number in range(variants))
        return np.broadcast_to(np.frombuffer(own, np.uint8).reshape(variants, 16), (self.variants, 16))

    def _variant(self, row: int, texts: Texts, number: int) -> str:
        options = self._options[self._subset[row]][int(self.index.held_out[row])]
        text, whole = choose_text(options, texts, partial(_source_draw, texts, number))
        rng = NEVER_DRAWN
        if options.enable_wildcard or self._is_drawn(row, texts):
            entropy = np.frombuffer(hash16(text.encode()), np.uint32).tolist()
            rng = position_random(0, "caption variant", number, *entropy)
        quality = self.index.quality_tag(row)
        return caption(options, text, rng, epoch=0, step=0, max_steps=1, whole=whole, quality=quality)

    def _is_drawn(self, row: int, texts: Texts) -> bool:
        """True if the variants of this caption differ. A held-out caption has one variant, whole and in order."""
        options = self._options[self._subset[row]][0]
        drawn = options.enable_wildcard or options.shuffle_caption or options.caption_tag_dropout_rate > 0
        return (drawn or sum(text is not None for text in texts) > 1) and not self.index.held_out[row]

    def _key(self, text: str) -> bytes:
        zeros = "zeros " if self.zeroed and self.zeroed(text) else ""
        return hash16(f"{zeros}{OUTPUTS_VERSION} {self.tokenizer}\n{text}".encode())

    @cached_property
    def _subset(self) -> Int32[np.ndarray, " n"]:
        return self.index.subset

    @cached_property
    def _options(self) -> list[tuple[Subset, Subset]]:
        """The options of each subset, for images to train on and for held-out images."""
        subsets = self.index.subsets
        return [(one.model_copy(update=ALWAYS_KEPT), one.model_copy(update=AS_WRITTEN)) for one in subsets]


def _source_draw(texts: Texts, number: int) -> float:
    """A number from 0 to 1 that chooses the caption source of a variant.

    Neighbouring variants are a golden section apart, so that a few variants have nearly the shares of the weights.
    """
    entropy = np.frombuffer(hash16("\0".join(text or "" for text in texts).encode()), np.uint32).tolist()
    return (position_random(0, "caption source", *entropy).random() + number * GOLDEN_SECTION) % 1.0


def find_keys(captions: Captions, folder: Path, *, writes: bool) -> UInt8[np.ndarray, "rows v 16"]:
    """The result of `captions.keys`, from a file of an earlier start if there is one. With `writes` it is kept.

    Making keys takes 30 to 500 microseconds for each image. The file's name is a hash of all that decides about
    captions. Some keys are made again and compared. Therefore keys of another version of this program are not used.
    """
    path = folder / f"{_question(captions)}{KEYS}"
    keys = _load(path, captions)
    if keys is not None:
        touch(path)
        return keys
    keys = captions.keys()
    if writes:
        with kept_file(path) as temporary, temporary.open("wb") as file:
            np.save(file, keys)
        _forget_old(folder)
    return keys


def find_keys_together(
    captions: Captions, folder: Path, team: Team, accelerator: Accelerator
) -> UInt8[np.ndarray, "rows v 16"]:
    """The result of `find_keys` on several processes. Those of a machine share the work, through a mapped file.

    All processes call this together.
    """
    path = folder / f"{_question(captions)}{KEYS}"
    keys = _load(path, captions)
    everyone = gather_object([(team.first_rank, keys is not None, f"{os.getpid()}-{secrets.token_hex(4)}")])
    if all(known for _, known, _ in everyone):
        touch(path)
        assert keys is not None
        return keys
    is_known = all(known for first, known, _ in everyone if first == team.first_rank)
    draft = path.with_name(f".{path.name}.{everyone[team.first_rank][2]}.tmp")
    shape = (len(captions.used), captions.variants, 16)
    if team.is_local_first and not is_known:
        folder.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(draft, "w+", np.uint8, shape).flush()
    accelerator.wait_for_everyone()
    if not is_known:
        mapped = np.lib.format.open_memmap(draft, "r+")
        captions.fill(mapped.view(np.ndarray), team.rank - team.first_rank, team.ranks_here)
        mapped.flush()
        del mapped
    accelerator.wait_for_everyone()
    if team.is_local_first and not is_known:
        draft.replace(path)
        _forget_old(folder)
    accelerator.wait_for_everyone()
    return find_keys(captions, folder, writes=False)


def _forget_old(folder: Path) -> None:
    """Removes all files of keys but the KEPT newest ones."""
    files = []
    for path in folder.glob(f"*{KEYS}"):
        with contextlib.suppress(OSError):  # another run may have removed it meanwhile
            files.append((path.stat().st_mtime, path))
    for _, old in sorted(files)[:-KEPT]:
        with contextlib.suppress(OSError):  # Windows removes no file that a process has mapped
            old.unlink()


def _load(path: Path, captions: Captions) -> UInt8[np.ndarray, "rows v 16"] | None:
    """The keys of a file; None if there is no such file, or if it does not hold the keys that would be made now."""
    keys = map_array(path)
    if keys is None:
        return None
    used = np.flatnonzero(captions.used)
    if keys.dtype != np.uint8 or keys.shape != (len(captions.used), captions.variants, 16):
        return None
    rows = np.unique(used[np.linspace(0, len(used) - 1, CHECKED).astype(np.int64)]).tolist()
    return keys if all(np.array_equal(keys[row], captions.keys_of(row)) for row in rows) else None


def _question(captions: Captions) -> str:
    """A hash of everything that captions depend on. The name of the index is a hash of its content."""
    index = captions.index
    about = (index.path.name, index.excluded, captions.variants, captions.tokenizer, index.subsets)
    text = repr(about) + " zeros" * (captions.zeroed is not None)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=12)
    for subset in index.subsets:
        for file in _rule_files(subset):
            digest.update(b"\0" + read(file))
    return digest.hexdigest()


def _rule_files(subset: Subset) -> Iterator[Location]:
    for value in (subset.protected_tags_file, subset.caption_tag_dropout_groups):
        if isinstance(value, Path | Address):
            yield value


@again_if_filled
def prepare_text(
    index: Index, encoder: TextEncoder, config: Config, accelerator: Accelerator, stop: StopRequest | None = None
) -> TextStore:
    """Returns the text encoders' outputs for all captions in use.

    Outputs that exist are found again; the missing ones are encoded. What was encoded is kept if this is interrupted.
    Raises UserError, OutOfMemory, and Interrupt once `stop` was requested.
    """
    scratch, on_disk = config.cache_folder, config.cache_text_encoder_outputs_to_disk
    kind = Kind("text_outputs", encoder.identity() if on_disk else "")
    team = find_team(accelerator, kind, config, on_disk=on_disk)
    captions = Captions(index, config.text_encoder_outputs_variants, encoder.tokenizer_identity, encoder.zeroed)
    keys = find_keys_together(captions, scratch / KEYS_FOLDER, team, accelerator)
    used = captions.used
    if not on_disk:
        size = 2 * (math.prod(encoder.hidden_shape) + encoder.pooled_size)
        check_memory(count_keys(keys, used) * size, "the text encoders' outputs", "cache_text_encoder_outputs")
    if accelerator.is_main_process:
        _mention_npz(index)
    shards = open_together(team, accelerator)
    places = _find_places(keys, shards)
    missing = _first_of_each(keys, used[:, None] & (places["file"] < 0))
    too_large: list[str] = []
    if sum(gather_object([len(missing)])):
        own = missing[team.share]
        with encoder.on_device() as encode, team.writer() as writer:
            job = _encode_captions(captions, keys, own, encode, config.text_encoder_batch_size, writer, too_large)
            encode_in_rounds(job, len(own), writer, team, stop, "captions")
        if too_large := gather_object(too_large):
            raise UserError(Problem(f"{TOO_LARGE} {too_large[0]!r}", key="cache_text_encoder_outputs", value=True))
        shards = join_shards(team, shards, readable_shards(team, writer.shards))
        places = _find_places(keys, shards)
    logger.info(
        "text encoder outputs in %s: %d encoded, %d there already",
        team.shelf.folder if team.shelf else "memory",
        len(missing),
        count_keys(keys, used) - len(missing),
    )
    is_complete = bool((places["file"] >= 0)[used].all())
    check_complete(team, complete=is_complete)
    records = Records(tuple(shard.path for shard in shards), team.copies)
    return TextStore(
        index, write_table(places, scratch), records, captions.variants, encoder.hidden_shape, encoder.pooled_size
    )


def count_keys(keys: UInt8[np.ndarray, "rows v 16"], used: Bool[np.ndarray, " rows"]) -> int:
    """Number of different captions in use."""
    return len(np.unique(keys[used].reshape(-1, 16), axis=0))


def _mention_npz(index: Index) -> None:
    """Logs that the reference's cached outputs are not used, if there are any beside the first images."""
    for row in np.flatnonzero(index.used)[:LOOKED_AT].tolist():
        image = index[row].path
        if not isinstance(image, Path):
            return
        if (path := image.with_name(f"{image.stem}_te_outputs.npz")).is_file():
            logger.info("%s and other files like it are not used: sd-scripts encodes the pooled output wrongly", path)
            return


def _find_places(keys: UInt8[np.ndarray, "rows v 16"], shards: Sequence[Shard]) -> Shaped[np.ndarray, "rows v"]:
    return Library(shards).places(keys.reshape(-1, 16)).reshape(keys.shape[:2])


def _first_of_each(
    keys: UInt8[np.ndarray, "rows v 16"], wanted: Bool[np.ndarray, "rows v"]
) -> Int64[np.ndarray, "k 2"]:
    """Row and variant of the first caption of each wanted key, in the order of the keys on every process."""
    places = np.argwhere(wanted)
    _, first = np.unique(keys[wanted], axis=0, return_index=True)
    return places[first]


def _encode_captions(
    captions: Captions,
    keys: UInt8[np.ndarray, "rows v 16"],
    places: Int64[np.ndarray, "k 2"],
    encode: EncodeText,
    batch_size: int,
    writer: ShardWriter,
    too_large: list[str],
) -> Generator[int, None, None]:
    """Encodes the captions of these rows and variants, and yields how many were finished since the last yield.

    The device is one batch behind the host, which makes the tokens of the next batch. Captions with an output that
    float16 cannot hold are added to `too_large`.
    """
    running: deque[tuple[np.ndarray, Callable[[], Tensor]]] = deque()

    def store(part: Int64[np.ndarray, "k 2"], wait: Callable[[], Tensor]) -> int:
        for (row, number), record in zip(part.tolist(), wait().numpy(), strict=True):
            if np.isfinite(record).all():
                writer.add(keys[row, number].tobytes(), record)
            else:
                too_large.append(captions.text(row, number))
        return len(part)

    try:
        for start in range(0, len(places), batch_size):
            part = places[start : start + batch_size]
            running.append((part, encode([captions.text(row, number) for row, number in part.tolist()])))
            if len(running) > 1:
                yield store(*running.popleft())
    finally:
        finished = [store(*started) for started in running]
    yield from finished
