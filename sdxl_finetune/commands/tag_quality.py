"""`sdxl-data tag-quality`: writes the quality tags of images into their caption files.

The tags are those that training would set. A file that holds the right tag already is not touched, so that a second run
writes nothing. Captions in metadata files, in tar files and in object stores are never written.
"""

import os
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
from jaxtyping import Bool

from sdxl_finetune.config import Config, Dataset, Subset, load_datasets
from sdxl_finetune.data.caption_sources import caption_paths
from sdxl_finetune.data.index import Index
from sdxl_finetune.data.quality import NO_TAG
from sdxl_finetune.data.quality_text import with_quality
from sdxl_finetune.errors import Problem, Tally, UserError, say_errors
from sdxl_finetune.files import atomic_path
from sdxl_finetune.output.console import console
from sdxl_finetune.progress import track
from sdxl_finetune.training.checks import index_images

BOM = "\ufeff"
"""Byte order mark, which some editors write at the start of a file."""
REMEDY = "leave them as they are, because training adds the tags of quality_tags while it loads captions"
BREAKS = re.compile(r"(\r\n|\n|\r)")


def tag_quality(config: Config, *, dry_run: bool) -> int:
    """Writes the tags into caption files, or only counts with `dry_run`. Prints counts; returns the exit status.

    Returns 2 if some files could not be written. Raises UserError if the captions are not in files of their own.
    """
    with console(config, 0):
        _check_sources(load_datasets(config))
        index = index_images(config)
        if (index.numbers("offset") >= 0).any():
            raise UserError(Problem(f"captions in tar files are not rewritten: {REMEDY}", key="quality_tags"))
        problems, done = Tally(), Counter[str]()
        files = CaptionFiles(index, dry_run)
        rows = np.flatnonzero(index.numbers("quality") != NO_TAG)
        with track("writing quality tags", len(rows), "captions") as progress:
            for row in rows.tolist():
                try:
                    done[files.write(row)] += 1
                except (OSError, ValueError) as error:
                    problems.add(Problem(f"the quality tag cannot be written ({error})", file=str(index[row].path)))
                progress.update()
    print("\n".join(index.describe_marks()))
    verb = "would change" if dry_run else "changed"
    print(f"caption files: {done['changed']:,} {verb}, {done['new']:,} new, {done['kept']:,} hold the tag already")
    say_errors(*problems.problems())
    return 2 if problems else 0


def _check_sources(datasets: Sequence[Dataset]) -> None:
    """Raises UserError if no subset asks for quality tags, or if a caption is not in a file beside its image."""
    subsets = [subset for dataset in datasets for subset in dataset.subsets if subset.quality_tags]
    if not subsets:
        raise UserError(Problem('is needed: set the tags, as "masterpiece > 0.75, worst quality"', key="quality_tags"))
    problems = [
        Problem(f"captions of a metadata file are not rewritten: {REMEDY}", "in_json", file=str(subset.metadata_file))
        for subset in subsets
        if subset.metadata_file
    ]
    problems += [
        Problem(
            f"captions of several sources are not rewritten: {REMEDY}", "caption_sources", file=str(subset.image_dir)
        )
        for subset in subsets
        if subset.caption_sources
    ]
    problems += [
        Problem(f"captions in an object store are not rewritten: {REMEDY}", file=str(subset.image_dir))
        for subset in subsets
        if not isinstance(subset.image_dir, Path)
    ]
    if problems:
        raise UserError(problems)


class CaptionFiles:
    """Writes quality tags into the caption files of an index."""

    def __init__(self, index: Index, dry_run: bool) -> None:
        self._index = index
        self._dry_run = dry_run
        self._shared = _shared_names(index)
        self._tags: dict[str, str] = {}
        """Tags of the caption files that may belong to several images."""

    def write(self, row: int) -> str:
        """Writes the tag of one image; returns "changed", "new" or "kept".

        Raises OSError if the file cannot be written, and ValueError if it belongs to another image with another tag.
        """
        entry = self._index[row]
        tag, subset = entry.quality, entry.subset
        assert tag is not None
        paths = caption_paths(str(entry.path), subset)
        path = Path(os.path.realpath(next((path for path in paths if os.path.isfile(path)), paths[0])))  # noqa: PTH113
        if self._shared[row] and self._tags.setdefault(str(path), tag) != tag:
            raise ValueError(f"{path.name} already has the tag {self._tags[str(path)]} of another image, not {tag}")
        is_new = not path.exists()
        before = "" if is_new else path.read_bytes().decode("utf-8")
        after = tagged_text(subset, (subset.class_tokens or "") if is_new else before, tag)
        if after == before:
            return "kept"
        if not self._dry_run:
            with atomic_path(path) as temporary:
                temporary.write_bytes(after.encode())
                if not is_new:
                    shutil.copymode(path, temporary)
        return "new" if is_new else "changed"


def tagged_text(options: Subset, text: str, tag: str) -> str:
    """The text of a caption file with the tag in its first line, or in every line with `enable_wildcard`.

    Empty lines, line ends, a byte order mark and space around a line stay as they are.
    """
    parts = BREAKS.split(text.removeprefix(BOM))
    places = [place for place in range(0, len(parts), 2) if parts[place].strip()] or [0]
    for place in places if options.enable_wildcard else places[:1]:
        line = parts[place].strip()
        before, _, after = parts[place].partition(line) if line else ("", "", "")
        parts[place] = before + with_quality(options, line, tag) + after
    return BOM * text.startswith(BOM) + "".join(parts)


def _shared_names(index: Index) -> Bool[np.ndarray, " n"]:
    """True for images whose caption file may also be that of another image: equal names but for ending and face."""
    names = pa.compute.replace_substring_regex(index.names, r"\.[^./]*$", "")
    names = pa.compute.replace_substring_regex(names, r"_\d+_\d+_\d+_\d+$", "")
    keys = pa.compute.binary_join_element_wise(
        pa.array(index.subset.astype("S")).cast(names.type), names, pa.scalar(b"/", names.type)
    )
    encoded = keys.dictionary_encode()
    code = encoded.indices.to_numpy()
    return np.bincount(code)[code] > 1
