"""The two tables of a tag report: a row for each tag, and a row for each image that a tag was measured on.

A report is two Parquet files in one folder, `NAME.parquet` and `NAME.images.parquet`. NAME is the number of optimizer
steps of the model, with leading zeros, or the name of a model that does not say its step. Both files carry the facts of
the report in the metadata of their schema.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.files import atomic_path
from sdxl_finetune.parsing import parse_json

STATES = ("learned", "underfitted", "contradictory", "unclear")
"""States of a tag. A contradictory tag was seen often and is told worse than rarer tags: its images show several
things. The figures of an unclear tag disagree, or have too large an error to decide."""
CHANGES = ("gain_since_base", "gain_since_last", "accuracy_since_base", "accuracy_since_last")
"""Columns that compare a tag with an earlier report. Null: the earlier report does not exist or lacks the tag."""
TAGS = pa.schema(
    [
        pa.field("tag", pa.string(), nullable=False),
        pa.field("images", pa.int32(), nullable=False),
        pa.field("held_out", pa.int32(), nullable=False),
        pa.field("exposures", pa.int64()),
        pa.field("repeats", pa.float32()),
        pa.field("gain", pa.float32(), nullable=False),
        pa.field("gain_error", pa.float32()),
        pa.field("accuracy", pa.float32(), nullable=False),
        pa.field("accuracy_error", pa.float32()),
        pa.field("chance", pa.float32(), nullable=False),
        *(pa.field(name, pa.float32()) for name in CHANGES),
        pa.field("state", pa.string(), nullable=False),
    ]
)
"""The tags table.

images: images measured. held_out: those of them that are held out. exposures: images with the tag that training has
seen so far, null if unknown. repeats: factor that `image_weights` gave the images with the tag. gain: share of the loss
that the tag takes away. accuracy: share of images and timesteps at which the right tag has the lowest loss. Errors are
standard errors of these means; null for a tag measured on one image. chance: accuracy of a model that does not know the
tag; 1 for a tag that competes with none.
"""
IMAGES = pa.schema(
    [
        pa.field("tag", pa.string(), nullable=False),
        pa.field("image", pa.string(), nullable=False),
        pa.field("held_out", pa.bool_(), nullable=False),
        pa.field("gain", pa.float32(), nullable=False),
        pa.field("rank", pa.int16(), nullable=False),
        pa.field("exposures", pa.int64()),
    ]
)
"""The images table.

image: the image's folder and name, joined by a /. gain: share of this image's loss that the tag takes away. rank: how
many of the other tags have a lower loss than the right one, over all timesteps together. exposures: how often training
has seen the image.
"""
FOLDER = "tags"
"""Folder of the reports in `output_dir`."""
FACTS = b"tag_report"
"""Key of the schema's metadata that holds the facts, as JSON."""
TAGS_ENDING, IMAGES_ENDING = ".parquet", ".images.parquet"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The model, the options and the bounds of a report."""

    model: str
    """File name of the model."""
    model_hash: str | None = None
    """First ten hexadecimal digits of the SHA-256 hash of the model's file. None during training."""
    step: int | None = None
    """Optimizer steps of the model; None if the model does not say them."""
    epoch: int | None = None
    options: Mapping[str, Any]
    """Options of the measurement. Figures compare only where these are equal."""
    bounds: Mapping[str, float]
    """The bounds by which the states were decided."""


@dataclass(frozen=True)
class Report:
    """A measurement of one model."""

    facts: Facts
    tags: pa.Table
    images: pa.Table


def report_name(facts: Facts) -> str:
    """The name of a report's files without their endings."""
    return Path(facts.model).stem if facts.step is None else f"{facts.step:08d}"


def report_paths(folder: Path) -> list[Path]:
    """The tags tables of all reports in a folder, by name. A folder that does not exist has none."""
    return sorted(path for path in folder.glob(f"*{TAGS_ENDING}") if not path.name.endswith(IMAGES_ENDING))


def save_report(folder: Path, report: Report) -> Path:
    """Writes the two files of a report. Returns the path of the tags table, which is written last.

    Raises ValueError for tables that are not as TAGS and IMAGES say.
    """
    check_tables(report.tags, report.images)
    facts = {FACTS: json.dumps(asdict(report.facts), sort_keys=True, default=str).encode()}
    name = report_name(report.facts)
    for ending, table in ((IMAGES_ENDING, report.images), (TAGS_ENDING, report.tags)):
        with atomic_path(folder / f"{name}{ending}") as temporary:
            pa.parquet.write_table(table.replace_schema_metadata(facts), os.fspath(temporary))
    return folder / f"{name}{TAGS_ENDING}"


def load_report(path: Path) -> Report:
    """Reads a report by the path of its tags table. Raises UserError for a file that is no tag report."""
    try:
        tags = pa.parquet.read_table(path)
        images = pa.parquet.read_table(path.with_name(path.name.removesuffix(TAGS_ENDING) + IMAGES_ENDING))
        facts = Facts(**parse_json((tags.schema.metadata or {})[FACTS]))
        tags, images = tags.replace_schema_metadata(None), images.replace_schema_metadata(None)
        check_tables(tags, images)
    except OSError as error:
        message = f"the tag report cannot be read: {error.strerror or error}. Give the path of its tags table"
        raise UserError(Problem(message, file=str(path))) from None
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        message = f"not a tag report of this version ({error}). Measure again with sdxl-model tags"
        raise UserError(Problem(message, file=str(path))) from None
    return Report(facts, tags, images)


def check_tables(tags: pa.Table, images: pa.Table) -> None:
    """Raises ValueError unless the tables have the columns of TAGS and IMAGES, and values that are possible."""
    for table, schema in ((tags, TAGS), (images, IMAGES)):
        if not table.schema.equals(schema):
            raise ValueError(f"the columns are {table.schema.names}, and must be {schema.names} with their types")
        for field in schema:
            if not field.nullable and table[field.name].null_count:
                raise ValueError(f"the column {field.name} has missing values")
    names = tags["tag"].to_pylist()
    if len(set(names)) < len(names):
        raise ValueError("a tag has two rows")
    if unknown := set(images["tag"].to_pylist()) - set(names):
        raise ValueError(f"an image was measured for {sorted(unknown)[0]!r}, which is not among the tags")
    if unknown := set(tags["state"].to_pylist()) - set(STATES):
        raise ValueError(f"{sorted(unknown)[0]!r} is not one of the states {', '.join(STATES)}")
