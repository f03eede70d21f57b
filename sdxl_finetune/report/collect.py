"""Collects everything that the report says about a dataset. Nothing here knows of the page."""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from sdxl_finetune.config import Config, load_datasets
from sdxl_finetune.data.caption_lengths import WholeCaptions
from sdxl_finetune.data.index import Index, build_index
from sdxl_finetune.data.tokens import tokenizer_of
from sdxl_finetune.errors import VARYING, Tally
from sdxl_finetune.progress import track
from sdxl_finetune.report.captions import SAMPLE as CAPTION_SAMPLE
from sdxl_finetune.report.captions import Lengths, draw_sample, measure_lengths
from sdxl_finetune.report.duplicates import Duplicates, Groups, find_duplicates, group_rows
from sdxl_finetune.report.findings import (
    EXAMPLES,
    CaptionFindings,
    Example,
    Finding,
    find_cut_captions,
    find_in_sizes,
)
from sdxl_finetune.report.rows import Rows
from sdxl_finetune.report.scores import Scores, measure_scores
from sdxl_finetune.report.sizes import Sizes, measure_sizes
from sdxl_finetune.report.tags import SAMPLE as PAIR_SAMPLE
from sdxl_finetune.report.tags import TagCounter, Tags, Together, count_together

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Report:
    """All statistics of a dataset, and what a person should look at."""

    index: Index
    config: Config
    rare: int
    """Images below which a tag is called rare."""
    sizes: Sizes
    tags: Tags
    together: Together
    lengths: Lengths
    equal_captions: Groups
    duplicates: Duplicates
    scores: Scores | None
    findings: Sequence[Finding]
    seconds: dict[str, float] = field(default_factory=dict)
    """Time that each part took."""

    @property
    def rare_tags(self) -> int:
        """Number of tags in fewer than `rare` images."""
        return int((self.tags.images < self.rare).sum())


def collect(config: Config, rare: int) -> Report:
    """Reads the index of a config's images and collects the report. Raises UserError if there is nothing to report."""
    index, bad_files = read_index(config)
    return describe(index, config, rare, bad_files)


def read_index(config: Config) -> tuple[Index, Tally]:
    """The index of the usable images, and the problems of the others. Raises UserError if no image is usable."""
    bad_files = Tally()
    datasets, skip_check = load_datasets(config), config.skip_cache_check
    index = build_index(datasets, config.cache_folder, "skip", skip_check=skip_check, bad_files=bad_files)
    return index, bad_files


def describe(index: Index, config: Config, rare: int, bad_files: Tally | None = None) -> Report:
    """Collects the report of an index. `bad_files` are those that are not in the index."""
    seconds: dict[str, float] = {}
    rows = Rows(index)
    with _timed("sizes and buckets", seconds):
        sizes = measure_sizes(index)
    with _timed("tags and equal captions", seconds):
        tags, equal_captions, in_captions = _read_captions(rows)
    with _timed("tags that occur together", seconds):
        together = count_together(rows.tags(draw_sample(len(index), PAIR_SAMPLE)), tags)
    with _timed("tokens of captions", seconds):
        sample = draw_sample(len(index), CAPTION_SAMPLE)
        lengths = measure_lengths(sample, WholeCaptions(index, "report").text, rows.separator, tokenizer_of(config))
    with _timed("duplicates", seconds):
        duplicates = find_duplicates(index, config)
    with _timed("scores", seconds):
        scores = measure_scores(rows, config.cache_folder)
    findings = [
        *find_unusable(bad_files or Tally(), len(index)),
        *in_captions,
        *find_cut_captions(rows, lengths),
        *find_in_sizes(index, sizes),
    ]
    return Report(
        index=index,
        config=config,
        rare=rare,
        sizes=sizes,
        tags=tags,
        together=together,
        lengths=lengths,
        equal_captions=equal_captions,
        duplicates=duplicates,
        scores=scores,
        findings=findings,
        seconds=seconds,
    )


def _read_captions(rows: Rows) -> tuple[Tags, Groups, list[Finding]]:
    """Tags, groups of equal captions, and what is wrong with captions, in one pass over all captions for each."""
    counter, findings = TagCounter(), CaptionFindings(rows.index)
    with track("counting tags", len(rows.index), "images") as progress:
        for tags in rows.tags():
            counter.add(tags)
            progress.update(len(tags))
    hashes = np.empty(len(rows.index), np.int64)
    has_text = np.empty(len(rows.index), bool)
    for start, texts in rows.chunks():
        findings.add(start, texts)
        chunk = texts.to_pylist()
        # Python's hash of a text is the fastest one here: two seconds for five million captions.
        hashes[start : start + len(chunk)] = np.fromiter(map(hash, chunk), np.int64, len(chunk))
        has_text[start : start + len(chunk)] = np.fromiter(map(bool, chunk), bool, len(chunk))
    captioned = np.flatnonzero(has_text)
    groups = group_rows([hashes[captioned]])
    groups = Groups(groups.groups, groups.rows, [captioned[group] for group in groups.largest])
    return counter.result(), groups, findings.result()


def find_unusable(bad_files: Tally, usable: int) -> list[Finding]:
    """The files that cannot be used, by kind of problem, the most frequent kind first."""
    counts: Counter[str] = Counter()
    first: dict[str, list[Example]] = {}
    for problem, count in bad_files.counted():
        kind = VARYING.sub("…", problem.message).removesuffix(" …")
        counts[kind] += count
        first.setdefault(kind, []).append(Example(name=problem.file or "", note=problem.message))
    return [
        Finding(
            title=f"not usable: {kind}",
            remedy="These files are left out, or stop the run, as on_bad_image says. Repair or remove them.",
            count=count,
            total=usable + len(bad_files),
            examples=first[kind][:EXAMPLES],
            is_problem=True,
        )
        for kind, count in counts.most_common()
    ]


@contextmanager
def _timed(what: str, seconds: dict[str, float]) -> Iterator[None]:
    logger.info("report: %s", what)
    began = time.perf_counter()
    yield
    seconds[what] = time.perf_counter() - began
