"""Local images of an index on another machine, where the same folders may stand at other paths."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sdxl_finetune.config import Config, load_datasets
from sdxl_finetune.config.dataset import Dataset, Subset
from sdxl_finetune.data.index import Index
from sdxl_finetune.errors import Problem, UserError

PLACES = frozenset(
    {"image_dir", "conditioning_data_dir", "metadata_file", "image_weights", "quality_scores"}
    | {"protected_tags_file", "caption_tag_dropout_groups"}
)
"""Options of a subset that may differ from machine to machine."""


def with_folders_of_this_machine(index: Index, config: Config) -> Index:
    """Returns the first machine's index with the folders of this machine's config, if those of the index are missing.

    The folders of both configs must have the same names and options, in the same order. Raises UserError, which names
    a folder of each machine, if they do not.
    """
    if all(_is_here(one) for one in index.subsets):
        return index
    datasets = load_datasets(config)
    own = [subset for dataset in datasets for subset in dataset.subsets]
    if _outline(datasets) == _outline(index.datasets) and all(map(_is_here, own)):
        return replace(index, datasets=datasets)
    missing = next(one.image_dir for one in index.subsets if not _is_here(one))
    here = ", ".join(str(one.image_dir) for one in own[:3])
    message = f"the first machine reads images from {missing}, which this machine does not have. Its own config names"
    message += f" {here}. Mount the images at the same path, or name folders of the same names and options"
    raise UserError(Problem(message, key="dataset_config" if config.dataset_config else "train_data_dir"))


def _is_here(subset: Subset) -> bool:
    folders = (subset.image_dir, subset.conditioning_data_dir)
    return all(folder.is_dir() for folder in folders if isinstance(folder, Path))


def _outline(datasets: Sequence[Dataset]) -> list:
    """Returns all that must be equal on all machines: options, and names of folders without the path to them."""
    return [
        (
            dataset.model_dump(exclude={"subsets"}),
            [(one.image_dir.name, one.model_dump(exclude=set(PLACES))) for one in dataset.subsets],
        )
        for dataset in datasets
    ]
