"""The datasets of a config: from a metadata file (`in_json`), from folders, or from a file of their own.

`dataset_config` is a TOML or JSON file of several datasets, each of several subsets, with options of their own:

    [general]                    what holds for all
    [[datasets]]                 resolution, batch_size, buckets; and what holds for its subsets
      [[datasets.subsets]]       image_dir or metadata_file, num_repeats, captions and changes to images

The value of a subset is its own, else its dataset's, else that of [general], else the config's (golden config.json,
dataset_config). Keys are the reference's; one that is unknown, of the wrong type or not supported is refused.
"""

import difflib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sdxl_finetune.config.dataset import Dataset, Subset, find_folders
from sdxl_finetune.config.fields import expected
from sdxl_finetune.config.options import Config
from sdxl_finetune.config.reading import parse_toml
from sdxl_finetune.errors import Problem, UserError

logger = logging.getLogger(__name__)

RENAMED = {"train_batch_size": "batch_size", "dataset_repeats": "num_repeats"}
"""The config's names of keys that have another one here."""
OF_DATASETS = Dataset.model_fields.keys() - {"subsets"}
OF_SUBSETS = set(Subset.model_fields)
ONLY_OF_SUBSETS = {"image_dir", "metadata_file", "is_reg"}
NO_EFFECT = {
    "cache_info": "unchanged images are never read again",
    "network_multiplier": "it belongs to LoRA training",
    "custom_attributes": "SDXL training does not use them",
}
REFUSED = {
    "face_crop_aug_range": "not supported yet; leave it out",
    "alpha_mask": "not supported yet; train without masks",
    "conditioning_data_dir": "not supported yet; train without masks",
}
OFF: tuple[object, ...] = (False, 0, None, "")


def load_datasets(config: Config) -> tuple[Dataset, ...]:
    """The datasets of a config, as the folders on the disk are now.

    Raises UserError when there is nothing to train on; says which folders are not used.
    """
    if config.dataset_config:
        return _read_file(config.dataset_config, config)
    assert config.resolution is not None
    shared = {name: getattr(config, name) for name in Subset.model_fields if name in Config.model_fields}
    common = {name: getattr(config, name) for name in Dataset.model_fields if name in Config.model_fields}
    if config.in_json:
        folder = config.train_data_dir or Path()
        sources = [
            Subset(
                **shared,
                image_dir=folder,
                metadata_file=config.in_json,
                num_repeats=config.dataset_repeats,
                class_tokens=None,
            )
        ]
    else:
        sources = [
            Subset(
                **shared,
                image_dir=path,
                num_repeats=config.dataset_repeats if repeats is None else repeats,
                class_tokens=words,
                is_reg=option == "reg_data_dir",
            )
            for option in ("train_data_dir", "reg_data_dir")
            for path, repeats, words in _folders(config, option)
        ]
    return (Dataset(**common, batch_size=config.train_batch_size, subsets=tuple(sources)),)


def _folders(config: Config, option: str) -> list[tuple[Path, int | None, str | None]]:
    root = getattr(config, option)
    if root is None:
        return []
    folders = find_folders(root)
    for remark in folders.remarks:
        logger.warning("%s", remark)
    if folders.problem:
        raise UserError(Problem(folders.problem, option, str(root)))
    return folders.used


class _Reading:
    """What is wrong with the file, all of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[Problem] = []

    def wrong(self, message: str, key: str, value: object = None) -> None:
        self.problems.append(Problem(message, key, value, str(self.path)))

    def table(self, value: object, place: str, known: set[str]) -> dict[str, Any]:
        """The keys that count; what is wrong with the others is noted."""
        if not isinstance(value, dict):
            self.wrong("must be a table", place)
            return {}
        kept = {}
        for key, given in value.items():
            if key in known:
                kept[key] = given
            elif key in NO_EFFECT:
                logger.warning("%s: %s.%s has no effect: %s", self.path, place, key, NO_EFFECT[key])
            elif key not in REFUSED:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
                self.wrong(f"unknown key; did you mean {near[0]}?" if near else "unknown key", f"{place}.{key}", given)
            elif given not in OFF:
                self.wrong(REFUSED[key], f"{place}.{key}", given)
        return kept

    def tables(self, value: object, place: str) -> Iterator[tuple[str, object]]:
        if not isinstance(value, list):
            self.wrong(f"must be tables, each under [[{place}]]", place)
            return
        yield from ((f"{place}[{number}]", one) for number, one in enumerate(value))


def _read_file(path: Path, config: Config) -> tuple[Dataset, ...]:
    """The datasets of the file at `path`. Raises UserError with everything that is wrong with it."""
    reading = _Reading(path)
    content = reading.table(_parse(path), "file", {"general", "datasets"})
    shared = {RENAMED.get(name, name): value for name, value in config if value is not None}
    general = reading.table(content.get("general", {}), "general", OF_DATASETS | OF_SUBSETS - ONLY_OF_SUBSETS)
    datasets = []
    for place, value in reading.tables(content.get("datasets", []), "datasets"):
        known = {*OF_DATASETS, *(OF_SUBSETS - ONLY_OF_SUBSETS), "subsets"}
        own = reading.table(value, place, known)
        subsets = own.pop("subsets", [])
        built = [
            _subset(reading, subset, at, {**shared, **general, **own}, config)
            for at, subset in reading.tables(subsets, f"{place}.subsets")
        ]
        if not subsets:
            reading.wrong("names no images: add [[datasets.subsets]]", f"{place}.subsets")
        values = {name: value for name, value in {**shared, **general, **own}.items() if name in OF_DATASETS}
        if "resolution" not in values:
            reading.wrong("is needed: here, in [general] or as the option resolution", f"{place}.resolution")
            continue
        used = tuple(_used(reading.path, [subset for subset in built if subset]))
        if dataset := _build(reading, Dataset, values | {"subsets": used}, place):
            datasets.append(dataset)
    datasets = [dataset for dataset in datasets if dataset.subsets]
    if not datasets and not reading.problems:
        reading.wrong("names no images: add [[datasets]] with [[datasets.subsets]]", "datasets")
    if reading.problems:
        raise UserError(reading.problems)
    return tuple(datasets)


def _subset(reading: _Reading, value: object, place: str, fallback: Mapping[str, Any], config: Config) -> Subset | None:
    own = reading.table(value, place, OF_SUBSETS)
    if not own.keys() & {"image_dir", "metadata_file"}:
        reading.wrong("is needed: a folder of images (or metadata_file)", f"{place}.image_dir")
        return None
    for key in ("is_reg", "class_tokens", "caption_extension"):
        if "metadata_file" in own and own.get(key):
            reading.wrong("does not go with metadata_file", f"{place}.{key}", own[key])
    for key in ("image_dir", "metadata_file"):
        if isinstance(own.get(key), str):
            own[key] = Path(own[key])
    values = {name: value for name, value in {**fallback, **own}.items() if name in OF_SUBSETS}
    subset = _build(reading, Subset, {"num_repeats": 1, "class_tokens": None, **values}, place)
    if subset is None:
        return None
    for key in ("color_aug", "random_crop"):
        if config.cache_latents and getattr(subset, key):
            reading.wrong("does not go with cache_latents", f"{place}.{key}", True)
    if subset.metadata_file is None and not subset.image_dir.is_dir():
        reading.wrong(
            f"no such folder (the working directory is {Path.cwd()})", f"{place}.image_dir", str(subset.image_dir)
        )
    if subset.metadata_file is not None and not subset.metadata_file.is_file():
        name = str(subset.metadata_file)
        reading.wrong(f"no such file (the working directory is {Path.cwd()})", f"{place}.metadata_file", name)
    return subset


def _used(path: Path, subsets: list[Subset]) -> Iterator[Subset]:
    """As in the reference, without those of no repeats and without repetitions of an earlier one."""
    seen = set()
    for subset in subsets:
        source = subset.metadata_file or subset.image_dir
        if subset.num_repeats < 1:
            logger.warning("%s: %s is not used: num_repeats is %d", path, source, subset.num_repeats)
        elif source in seen:
            logger.warning("%s: %s is named again; only its first subset is used", path, source)
        else:
            seen.add(source)
            yield subset


def _build(reading: _Reading, kind: Any, values: Mapping[str, Any], place: str) -> Any:
    try:
        return kind(**values)
    except ValidationError as error:
        for name in sorted({str(mistake["loc"][0]) for mistake in error.errors()}):
            reading.wrong(f"must be {expected(kind.model_fields[name])}", f"{place}.{name}", values.get(name))
        return None


def _parse(path: Path) -> Any:
    if path.suffix.lower() != ".json":
        return parse_toml(path)[0]
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(Problem(f"not valid JSON: {error}", file=str(path))) from None
    except OSError as error:
        raise UserError(Problem(f"cannot be read: {error.strerror}", file=str(path))) from None
