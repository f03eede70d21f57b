"""Loads the datasets of a config: from folders, from a metadata file (`in_json`), or from a `dataset_config` file.

`dataset_config` is a TOML or JSON file of several datasets, each of several subsets, with options of their own:

    [general]                    values for all datasets
    [[datasets]]                 resolution, batch_size, buckets; and values for the dataset's subsets
      [[datasets.subsets]]       image_dir or metadata_file, num_repeats, captions and augmentation

A value of a subset wins over its dataset's, then [general]'s, then the config's. The golden file config.json records
this under dataset_config. Keys are the reference's. An unknown key, a wrong type and an unsupported key are refused.
"""

import difflib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sdxl_finetune.config.dataset import (
    Dataset,
    Subset,
    caption_conflicts,
    find_folders,
    is_metadata,
    mark_problems,
    not_found,
    split_tars,
)
from sdxl_finetune.config.fields import expected, reasons
from sdxl_finetune.config.options import Config
from sdxl_finetune.config.reading import parse_toml
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.parsing import parse_json
from sdxl_finetune.storage import Address, Location, list_page, naming, parse_location

logger = logging.getLogger(__name__)

RENAMED = {"train_batch_size": "batch_size", "dataset_repeats": "num_repeats"}
"""Options of the config that have another name as keys of the file."""
DATASET_KEYS = Dataset.model_fields.keys() - {"subsets"}
SUBSET_KEYS = set(Subset.model_fields) - {"caption_break", "draws_source", "tar_files"}
"""Keys of a subset. The tokenizer of the run reads `caption_break`, so it is one value for all subsets."""
SHARED_KEYS = SUBSET_KEYS - {"image_dir", "metadata_file", "is_reg"}
"""Keys of subsets that a dataset or [general] may hold for all their subsets."""
NO_EFFECT = {
    "cache_info": "unchanged images are never read again",
    "network_multiplier": "it belongs to LoRA training",
    "custom_attributes": "SDXL training does not use them",
    "latents_only": "latents are cached with cache_latents, and images are read without it",
}


def load_datasets(config: Config) -> tuple[Dataset, ...]:
    """Returns the datasets of a config. Warns about folders that are not used.

    Raises UserError if there is nothing to train on, with all mistakes of a `dataset_config` file.
    """
    datasets = _read_file(config.dataset_config, config) if config.dataset_config else _from_folders(config)
    return tuple(
        dataset.model_copy(update={"subsets": tuple(_settled(subset, config) for subset in dataset.subsets)})
        for dataset in datasets
    )


def _settled(subset: Subset, config: Config) -> Subset:
    """The subset without options that have no effect with this config.

    Mask files count only with `masked_loss`, and then the alpha channel does not. Cached latents have one crop.
    """
    without = ["face_crop_aug_range"] if config.cache_latents else []
    if subset.conditioning_data_dir:
        without.append("alpha_mask" if config.masked_loss else "conditioning_data_dir")
    return subset.model_copy(update={name: Subset.model_fields[name].default for name in without})


def _from_folders(config: Config) -> tuple[Dataset, ...]:
    shared = {name: getattr(config, name) for name in Subset.model_fields if name in Config.model_fields}
    common = {name: getattr(config, name) for name in Dataset.model_fields if name in Config.model_fields}
    sources: list[dict[str, Any]] = []
    if config.in_json:
        folder, tars = split_tars(config.train_data_dir or Path())
        sources = [{"image_dir": folder, "tar_files": tars, "metadata_file": config.in_json}]
    else:
        for option in ("train_data_dir", "reg_data_dir"):
            folder, tars = split_tars(getattr(config, option) or Path())
            found = [(folder, None, None)] if tars else _folders(option, getattr(config, option))
            is_reg = option == "reg_data_dir"
            sources += [
                {"image_dir": path, "tar_files": tars, "num_repeats": repeats, "class_tokens": words, "is_reg": is_reg}
                for path, repeats, words in found
            ]
    for source in sources:
        if source.setdefault("num_repeats", None) is None:
            source["num_repeats"] = config.dataset_repeats
        source.setdefault("class_tokens", None)
        source["conditioning_data_dir"] = None if source.get("is_reg") else _mask_folder(config, source["image_dir"])
    subsets = tuple(Subset(**{**shared, **source}) for source in sources)
    return (Dataset(**common, batch_size=config.train_batch_size, subsets=subsets),)


def _mask_folder(config: Config, images: Location) -> Location | None:
    """The folder of the masks of a folder of images: one of the same name in conditioning_data_dir, or that itself."""
    root = config.conditioning_data_dir
    if root is None or not config.masked_loss:
        return root
    own = root / images.name
    with naming("conditioning_data_dir"):
        return own if (bool(list_page(own)) if isinstance(own, Address) else own.is_dir()) else root


def _folders(option: str, root: Location | None) -> list[tuple[Location, int | None, str | None]]:
    if root is None:
        return []
    folders = find_folders(root)
    for remark in folders.remarks:
        logger.warning("%s: %s", option, remark)
    if folders.problem:
        raise UserError(Problem(folders.problem, option, str(root)))
    return folders.used


class _Mistakes:
    """Collects all mistakes in a `dataset_config` file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[Problem] = []

    def add(self, message: str, key: str, value: object = None) -> None:
        self.problems.append(Problem(message, key, value, str(self.path)))

    def known_keys(self, table: object, place: str, known: set[str]) -> dict[str, Any]:
        """Returns the known keys of a table. The others are mistakes, or have no effect."""
        if not isinstance(table, dict):
            self.add("must be a table", place)
            return {}
        for key, value in table.items():
            if key in NO_EFFECT:
                logger.warning("%s: %s.%s has no effect: %s", self.path, place, key, NO_EFFECT[key])
            elif key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
                self.add(f"unknown key; {hint}", f"{place}.{key}", value)
        return {key: value for key, value in table.items() if key in known}

    def tables(self, value: object, place: str) -> Iterator[tuple[str, object]]:
        """Yields the tables of a list, each with its place such as "datasets[0]"."""
        if isinstance(value, list):
            yield from ((f"{place}[{number}]", table) for number, table in enumerate(value))
        else:
            self.add(f"must be tables, each under [[{place}]]", place)

    def build(self, kind: Any, values: Mapping[str, Any], place: str) -> Any:
        """Returns a Dataset or Subset of the values; None if a value is wrong."""
        try:
            return kind(**values)
        except ValidationError as error:
            for name, reason in sorted(reasons(error).items()):
                message = f"must be {expected(kind.model_fields[name])}"
                self.add(f"{reason}: {message}" if reason else message, f"{place}.{name}", values.get(name))
            return None


def _read_file(path: Path, config: Config) -> tuple[Dataset, ...]:
    """Returns the datasets of a `dataset_config` file. Raises UserError with all mistakes in it."""
    mistakes = _Mistakes(path)
    content = mistakes.known_keys(_parse(path), "file", {"general", "datasets"})
    from_config = {RENAMED.get(name, name): value for name, value in config if value is not None}
    general = mistakes.known_keys(content.get("general", {}), "general", DATASET_KEYS | SHARED_KEYS)
    datasets = []
    for place, table in mistakes.tables(content.get("datasets", []), "datasets"):
        keys = mistakes.known_keys(table, place, {*DATASET_KEYS, *SHARED_KEYS, "subsets"})
        subset_tables = keys.pop("subsets", [])
        values = {**from_config, **general, **keys}
        subsets = [
            _subset(mistakes, subset_table, subset_place, values, config)
            for subset_place, subset_table in mistakes.tables(subset_tables, f"{place}.subsets")
        ]
        if not subset_tables:
            mistakes.add("names no images: add [[datasets.subsets]]", f"{place}.subsets")
        # A metadata file may name each image's bucket. The index checks whether it does.
        if "resolution" not in values and not all(subset and subset.metadata_file for subset in subsets):
            mistakes.add("is needed: set it here, in [general] or as an option", f"{place}.resolution")
            continue
        used = tuple(_used(path, [subset for subset in subsets if subset]))
        dataset_values = {"resolution": None, **values}
        dataset_values = {name: value for name, value in dataset_values.items() if name in DATASET_KEYS}
        if dataset := mistakes.build(Dataset, dataset_values | {"subsets": used}, place):
            datasets.append(dataset)
    datasets = [dataset for dataset in datasets if dataset.subsets]
    if not datasets and not mistakes.problems:
        mistakes.add("names no images: add [[datasets]] with [[datasets.subsets]]", "datasets")
    if mistakes.problems:
        raise UserError(mistakes.problems)
    return tuple(datasets)


def _subset(
    mistakes: _Mistakes, table: object, place: str, inherited: Mapping[str, Any], config: Config
) -> Subset | None:
    keys = mistakes.known_keys(table, place, SUBSET_KEYS)
    if not keys.keys() & {"image_dir", "metadata_file"}:
        mistakes.add("is needed: set it, or metadata_file", f"{place}.image_dir")
        return None
    for key in ("is_reg", "class_tokens", "caption_extension"):
        if "metadata_file" in keys and keys.get(key):
            mistakes.add("cannot be used with metadata_file: remove one of them", f"{place}.{key}", keys[key])
    for key in ("image_dir", "metadata_file"):
        if isinstance(keys.get(key), str):
            try:
                keys[key] = parse_location(keys[key])
            except ValueError as error:
                mistakes.add(str(error), f"{place}.{key}")
                return None
    values = {name: value for name, value in {**inherited, **keys}.items() if name in Subset.model_fields}
    if keys.get("is_reg") and "conditioning_data_dir" not in keys:
        values["conditioning_data_dir"] = None  # masks of the images that are learned, not of regularisation images
    if isinstance(values.get("image_dir"), Path | Address):
        values["image_dir"], values["tar_files"] = split_tars(values["image_dir"])
    subset = mistakes.build(Subset, {"num_repeats": 1, "class_tokens": None, **values}, place)
    if subset is None:
        return None
    for key in ("color_aug", "random_crop"):
        if config.cache_latents and getattr(subset, key):
            mistakes.add(f"cannot be used with {config.cached_for}: keep one of them", f"{place}.{key}", True)
    for key, message in _without_effect(subset, config):
        logger.warning("%s: %s.%s has no effect %s", mistakes.path, place, key, message)
    for key, message in mark_problems(subset, subset, subset):
        mistakes.add(message, f"{place}.{key}", getattr(subset, key))
    if config.cache_text_encoder_outputs:
        for key, message in caption_conflicts(subset, config.text_encoder_outputs_variants):
            mistakes.add(message, f"{place}.{key}", getattr(subset, key))
    images, metadata = subset.image_dir, subset.metadata_file
    if metadata is None and isinstance(images, Path) and not images.is_dir():
        mistakes.add(not_found(images, "folder"), f"{place}.image_dir", str(images))
    if metadata and not is_metadata(metadata):
        mistakes.add(not_found(metadata, "file"), f"{place}.metadata_file", str(metadata))
    masks = subset.conditioning_data_dir
    if config.masked_loss and isinstance(masks, Path) and not masks.is_dir():
        mistakes.add(not_found(masks, "folder"), f"{place}.conditioning_data_dir", str(masks))
    return subset


def _without_effect(subset: Subset, config: Config) -> Iterator[tuple[str, str]]:
    """Yields keys of a subset that have no effect, and why."""
    if subset.face_crop_aug_range and config.cache_latents:
        yield "face_crop_aug_range", "with cache_latents"
    if subset.conditioning_data_dir and not config.masked_loss:
        yield "conditioning_data_dir", "without masked_loss"
    elif subset.conditioning_data_dir and subset.alpha_mask:
        yield "alpha_mask", "with conditioning_data_dir"


def _used(path: Path, subsets: list[Subset]) -> Iterator[Subset]:
    """Yields the subsets that the reference uses: not those without repeats, and not those named a second time."""
    seen = set()
    for subset in subsets:
        source = subset.metadata_file or subset.image_dir / (subset.tar_files or "")
        if subset.num_repeats < 1:
            logger.warning("%s: %s is not used, because num_repeats is %d", path, source, subset.num_repeats)
        elif source in seen:
            logger.warning("%s: %s is named again; only its first subset is used", path, source)
        else:
            seen.add(source)
            yield subset


def _parse(path: Path) -> Any:
    if path.suffix.lower() != ".json":
        return parse_toml(path)[0]
    try:
        return parse_json(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(Problem(f"not valid JSON: {error}", file=str(path))) from None
    except OSError as error:
        raise UserError(Problem(f"cannot be read: {error.strerror}", file=str(path))) from None
