"""The images directly below an address in an object store, with the captions that stand beside them.

One listing gives names, sizes in bytes and versions of all objects. Of each image only the first kilobytes are read,
for its size in pixels. The sizes and the texts are kept in `cache_dir`, and read again only for objects that have
changed. Threads wait for the answers: a store answers many requests at once, each after some milliseconds.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
from jaxtyping import Bool, Int64

from sdxl_finetune.config.dataset import Subset
from sdxl_finetune.data.images import ImageError, image_extensions, image_size, size_of_start
from sdxl_finetune.data.sources.beside import Texts, Wanted, captions_of, read_text, wanted_of
from sdxl_finetune.data.sources.folders import list_folder
from sdxl_finetune.data.sources.listed import Listing, listed_table
from sdxl_finetune.data.sources.names import encoded, stems
from sdxl_finetune.data.tables import map_table, one_chunk, write_table
from sdxl_finetune.data.unusable import NUMBERS, Unusable
from sdxl_finetune.errors import Problem, Tally
from sdxl_finetune.progress import track
from sdxl_finetune.storage import Address, StorageError, read

FORMAT = 1
"""Version of the files of objects in `cache_dir`. Files of another version are not found."""
THREADS = 64
"""Images of which something is read at once."""
CHUNK = 1 << 13
"""Images that are Python objects at once."""
HEAD = 1 << 15
"""Bytes of an image that are read for its size. The whole image is read if they are not enough."""


@dataclass(frozen=True)
class Objects:
    """Objects below an address, in columns."""

    names: pa.Array
    sizes: Int64[np.ndarray, " n"]
    """Bytes."""
    versions: Int64[np.ndarray, " n"]
    """Numbers that change with the content."""

    def take(self, rows: Int64[np.ndarray, " k"]) -> "Objects":
        """The objects of these rows, in this order."""
        return Objects(self.names.take(pa.array(rows)), self.sizes[rows], self.versions[rows])

    def where(self, rows: Bool[np.ndarray, " n"]) -> "Objects":
        """The objects for which `rows` is true."""
        return self.take(np.flatnonzero(rows))


def read_objects(subset: Subset, folder: Address, cache_dir: Path, *, with_texts: bool) -> Listing:
    """Lists the images directly below the address of a subset, with or without the texts beside them."""
    wanted = wanted_of(subset, in_tars=False) if with_texts else Wanted(())
    everything = list_objects(folder)
    endings = pa.compute.extract_regex(everything.names.cast(pa.large_string()), r"(?P<ending>\.[^./]*)$")
    endings = pa.compute.utf8_lower(pa.compute.struct_field(endings, "ending").fill_null(""))
    of_image = pa.compute.is_in(endings, value_set=pa.array(image_extensions(), pa.large_string()))
    is_image = of_image.to_numpy(zero_copy_only=False)
    images = everything.where(is_image)
    beside = {
        ending: everything.where(pa.compute.equal(endings, ending).to_numpy(zero_copy_only=False))
        for ending in sorted(wanted.endings)
    }
    values = endings.filter(pa.array(~is_image)).value_counts()
    others = Counter({one["values"].as_py(): one["counts"].as_py() for one in values})
    table, problems = _contents(folder, images, beside, wanted, cache_dir)
    columns = {name: table[name] for name in ("name", "width", "height", "score", "bytes", "mtime")}
    if with_texts:
        columns["captions"] = captions_of(subset, {name: one_chunk(table[name]) for name in wanted.texts})
    return Listing(listed_table(columns), others, problems)


def list_objects(folder: Address) -> Objects:
    """The objects directly below an address, without those whose names begin with a dot."""
    found = list_folder(folder)
    names, sizes, versions = [pa.array([], pa.large_binary())], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    while chunk := list(islice(found, CHUNK)):
        names.append(encoded([one.name for one in chunk]))
        sizes.append(np.array([one.size for one in chunk], np.int64))
        versions.append(np.array([one.version for one in chunk], np.int64))
    return Objects(pa.concat_arrays(names), np.concatenate(sizes), np.concatenate(versions))


def schema(wanted: Wanted) -> pa.Schema:
    """Columns of what was read of images and of the texts beside them."""
    numbers = {"bytes": pa.int64(), "mtime": pa.int64(), "text_version": pa.int64()}
    read_columns = {"width": pa.int32(), "height": pa.int32(), "score": pa.float32()}
    texts = dict.fromkeys(wanted.texts, pa.large_string())
    return pa.schema({"name": pa.large_binary(), **numbers, **read_columns, **texts})


@dataclass(frozen=True)
class Reading:
    """An image and the files beside it, which one thread reads."""

    folder: Address
    wanted: Wanted
    name: str
    size: int
    beside: Mapping[str, str]
    """Names of the files beside the image, by ending."""

    def __call__(self) -> tuple[tuple[int, int], Texts]:
        """Size in pixels and texts of the image. Raises ImageError, StorageError, or ValueError for a text."""
        texts = Texts()
        for ending, name in self.beside.items():
            read_text(ending, read(self.folder / name), self.wanted, texts)
        place = self.folder / self.name
        head = read(place, 0, min(HEAD, self.size)) if self.size else b""
        if len(head) == self.size:
            return image_size(place, head), texts
        return size_of_start(place, head) or image_size(place, read(place)), texts


def _contents(
    folder: Address, images: Objects, beside: Mapping[str, Objects], wanted: Wanted, cache_dir: Path
) -> tuple[pa.Table, Tally]:
    """Sizes in pixels and texts of these images, from `cache_dir` where neither image nor texts have changed."""
    key = hashlib.blake2b(repr((FORMAT, str(folder), wanted)).encode("utf-8", "surrogateescape"), digest_size=12)
    kept = cache_dir / "objects" / f"{key.hexdigest()}.objects"
    known = _load(kept, schema(wanted))
    stem = stems(images.names)
    places = {ending: _places(stem, stems(one.names)) for ending, one in beside.items()}
    now = {"bytes": images.sizes, "mtime": images.versions, "text_version": _text_versions(stem, places, beside)}
    known_place = pa.compute.index_in(images.names, value_set=one_chunk(known["name"])).fill_null(-1).to_numpy()
    is_same = known_place >= 0
    for name, values in now.items():
        is_same &= np.append(one_chunk(known[name]).to_numpy(), -1)[known_place] == values
    unusable, problems = Unusable.load(kept.with_suffix(".unusable")), Tally()
    numbers = [now[name] for name in ("bytes", "mtime", "text_version")]
    known_bad = unusable.find(unusable.places(0, images.names), dict(zip(NUMBERS, numbers, strict=True)))
    for row, own in known_bad.items():
        unusable.add(0, images.names[row].as_py(), [int(column[row]) for column in numbers], own)
        problems.add(own[0])
    to_read = ~is_same
    to_read[list(known_bad)] = False
    rows = np.flatnonzero(to_read)
    names = {ending: one.names.take(places[ending].take(pa.array(rows))) for ending, one in beside.items()}
    tables = [known.take(pa.array(known_place[is_same]))]
    pool = ThreadPoolExecutor(THREADS)
    try:
        with track("reading sizes and captions", len(rows), "images") as progress:
            for start in range(0, len(rows), CHUNK):
                chunk = images.take(rows[start : start + CHUNK])
                texts = [one[start : start + CHUNK].to_pylist() for one in names.values()]
                jobs = [
                    Reading(folder, wanted, os.fsdecode(name), size, _names(beside, own))
                    for name, size, *own in zip(chunk.names.to_pylist(), chunk.sizes.tolist(), *texts, strict=True)
                ]
                versions = {name: values[rows[start : start + CHUNK]] for name, values in now.items()}
                tables.append(_table(jobs, list(pool.map(_attempt, jobs)), versions, problems, unusable))
                progress.update(len(jobs))
    finally:
        pool.shutdown(cancel_futures=True)
        table = pa.concat_tables(tables).combine_chunks()
        if len(rows) or table.num_rows != known.num_rows:
            unusable.save()
            write_table(kept, table)  # also after an interruption, because the reading may have taken long
    return table, problems


def _places(stem: pa.Array, texts: pa.Array) -> pa.Array:
    """The place of the text of each image, by names without ending; null without a text.

    A face cutout that lacks a text has that of the original image, as in a folder.
    """
    original = pa.compute.replace_substring_regex(stem, rb"^(.+)_\d+_\d+_\d+_\d+$", rb"\1")
    own, of_original = (pa.compute.index_in(names, value_set=texts) for names in (stem, original))
    return pa.compute.coalesce(own, of_original)


def _text_versions(
    stem: pa.Array, places: Mapping[str, pa.Array], beside: Mapping[str, Objects]
) -> Int64[np.ndarray, " n"]:
    """A number for each image that changes if a text beside it changes, appears or disappears."""
    mixed = np.zeros(len(stem), np.uint64)
    for ending, place in places.items():
        versions = np.append(beside[ending].versions, 0)[place.fill_null(-1).to_numpy()]
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + versions.astype(np.uint64)  # an odd number, so nothing is lost
    return mixed.view(np.int64)


def _names(beside: Mapping[str, Objects], names: Sequence[bytes | None]) -> dict[str, str]:
    return {ending: os.fsdecode(name) for ending, name in zip(beside, names, strict=True) if name is not None}


@dataclass(frozen=True)
class Failed:
    """An image that cannot be used."""

    problem: Problem
    is_lasting: bool
    """True if the content of the object is the problem."""


def _attempt(reading: Reading) -> tuple[tuple[int, int], Texts] | Failed:
    try:
        return reading()
    except ImageError as error:
        return Failed(Problem(error.reason, file=error.path), error.is_lasting)
    except StorageError as error:
        return Failed(error.problems[0], is_lasting=False)
    except ValueError as error:
        return Failed(Problem(str(error), file=str(reading.folder / reading.name)), is_lasting=True)


def _table(
    jobs: Sequence[Reading],
    results: Sequence[tuple[tuple[int, int], Texts] | Failed],
    versions: Mapping[str, Int64[np.ndarray, " k"]],
    problems: Tally,
    unusable: Unusable,
) -> pa.Table:
    """The usable images of a chunk in columns. Counts the problems of the others, and notes lasting ones."""
    rows = []
    for job, result, *version in zip(jobs, results, *versions.values(), strict=True):
        if isinstance(result, Failed):
            problems.add(result.problem)
            if result.is_lasting:
                unusable.add(0, os.fsencode(job.name), list(map(int, version)), [result.problem])
            continue
        size, texts = result
        rows.append((os.fsencode(job.name), *version, *size, texts.score, *map(texts.texts.get, job.wanted.texts)))
    fields = schema(jobs[0].wanted)
    columns = list(zip(*rows, strict=True)) or [()] * len(fields)
    return pa.table([pa.array(column, one.type) for column, one in zip(columns, fields, strict=True)], schema=fields)


def _load(path: Path, fields: pa.Schema) -> pa.Table:
    """The table that the last run kept. It is empty if there is no such file, or if the file is damaged."""
    try:
        table = map_table(path, mapped=os.name != "nt")
    except (OSError, pa.ArrowException):
        return fields.empty_table()
    return table if table.schema.equals(fields) else fields.empty_table()
