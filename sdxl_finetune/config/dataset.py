"""Defines a dataset, and finds the folders of images that form one.

A folder `N_words` in `train_data_dir` is used N times per epoch. The words are the caption of images without a caption
file, as for the reference's DreamBooth folders. Without such a folder, the images directly in `train_data_dir` form the
dataset, once per epoch. The reference needs a metadata file for that. A folder is searched only until the first image:
the index lists all names later.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from pydantic import Field

from sdxl_finetune.config.data_options import (
    AugmentationOptions,
    BucketOptions,
    CaptionOptions,
    HoldOutOptions,
    Interpolation,
    MaskOptions,
)
from sdxl_finetune.config.fields import FileLocation, MetadataColumns, Resolution
from sdxl_finetune.config.quality_options import MISSING_RULES, ImageWeightOptions, QualityOptions, is_ending
from sdxl_finetune.errors import counted, listed
from sdxl_finetune.storage import Address, Found, Location, list_page, parse_location

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""Endings of image files, in any case of letters, that are always read."""
OPTIONAL_SUFFIXES = {".avif": "pillow-avif-plugin", ".jxl": "pillow-jxl-plugin"}
"""Endings that are read if Pillow can read them, each with a package that teaches it to Pillow."""
UNREAD_SUFFIXES = (".gif", ".tif", ".tiff", ".jfif", ".heic", ".heif")
"""Endings of pictures that are not trained on, as in the reference. A remark counts such files."""
LOOSE_OBJECTS = 20_000
"""Objects in no folder after which a search below an address ends: 20 requests."""
TAR_SUFFIX = ".tar"
"""Ending of a file of images, as WebDataset packs them."""


def is_picture(entry: os.DirEntry, suffixes: tuple[str, ...]) -> bool:
    """True for a file with one of these endings, in lower case.

    Names that begin with a dot are no pictures: macOS writes such files beside each picture. A link to a missing file
    is a picture that cannot be read.
    """
    name = entry.name
    if not name.lower().endswith(suffixes) or name[0] == ".":
        return False
    return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))  # noqa: PTH110 (millions)


def unread_pictures(counts: Mapping[str, int]) -> str:
    """Says how many pictures of each ending are not read, and what to do about each ending."""
    remedies = {ending: f"pip install {package}" for ending, package in OPTIONAL_SUFFIXES.items()}
    remedies |= {".jfif": "rename them to .jpg"}
    return "; ".join(
        f"{counted(count, f'{ending} file')} {'is' if count == 1 else 'are'} not read: "
        f"{remedies.get(ending, 'convert them to .png or .jpg')}"
        for ending, count in sorted(counts.items())
    )


class Subset(CaptionOptions, QualityOptions, AugmentationOptions, MaskOptions, HoldOutOptions, ImageWeightOptions):
    """A folder of images with the options that may differ from folder to folder."""

    image_dir: FileLocation = Path()
    metadata_file: FileLocation | None = None
    """File of names, captions and tags of the images. Replaces a search of the folder."""
    num_repeats: int
    """Repeats of each image per epoch."""
    class_tokens: str | None
    """Caption of images without a caption file."""
    is_reg: bool = False
    """True for regularisation images."""
    resize_interpolation: Interpolation | None = None
    tar_files: str | None = None
    """Names of the tar files in `image_dir` to use, with ranges as {000..099}. Default: all, if no images are there."""
    metadata_columns: MetadataColumns | None = None
    caption_break: bool = False
    """True if tags stay on their side of the word BREAK. The option of the config, for all subsets."""
    draws_source: bool = True
    """False if the caption is always the heaviest of the image's sources, as in validation. No option."""


class Dataset(BucketOptions):
    """Subsets that are trained at one resolution and share batches."""

    resolution: Resolution | None
    """(width, height) in pixels. None: each image has the size that the metadata file gives as train_resolution."""
    batch_size: int = Field(ge=1)
    """Images per process in one micro-batch."""
    subsets: tuple[Subset, ...]


@dataclass
class Folders:
    """The folders of a `train_data_dir`."""

    used: list[tuple[Location, int | None, str | None]] = field(default_factory=list)
    """Folders of images by name: path, repeats and class tokens. The last two are None if the name does not say."""
    remarks: list[str] = field(default_factory=list)
    """Folders and images that are not used, to warn the user."""
    problem: str | None = None


def find_folders(root: Location) -> Folders:
    """Finds the folders in `root` to train on. Raises StorageError."""
    if isinstance(root, Address):
        return find_prefixes(root)
    if root.name.lower().endswith((".tar.gz", ".tgz")) and not root.is_dir():
        message = "a compressed tar file cannot be read in place: unpack it with gunzip, and name the .tar file"
        return Folders(problem=message)
    if not root.is_dir():
        return Folders(problem=not_found(root, "folder"))
    folders = Folders()
    with os.scandir(root) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and entry.name[0] != ".")
    unnamed: list[str] = []
    empty: list[str] = []
    for name in names:
        repeats, words = _parts(name)
        if not holds_images(root / name) and not holds_tars(root / name):
            pictures = unread_pictures(count_endings(root / name, UNREAD_SUFFIXES))
            empty += [name + (pictures and f" ({pictures})")] if repeats > 0 or pictures else []
        elif repeats > 0:
            if not is_text(words):
                folders.remarks.append(f"the words of {root / name} are not UTF-8 and no caption: rename the folder")
            folders.used.append((root / name, repeats, words if is_text(words) else None))
        else:
            unnamed.append(name)
    has_loose_images = holds_images(root)
    if not folders.used and (has_loose_images or holds_tars(root)):
        folders.used.append((root, None, None))
        repeats, words = _parts(root.resolve().name)
        if repeats > 0 and words:
            message = f"the name of the folder itself has no effect: name the folder above it for {repeats} repeats"
            folders.remarks.append(f"{message} and the caption {words!r}")
    elif has_loose_images:
        folders.remarks.append(f"images directly in {root} are not used, because {root} has folders N_words")
    _remark_on_unused(folders, unnamed, empty)
    if not folders.used:
        content = f"only the folders {listed(names)}" if names else "no folders"
        pictures = unread_pictures(count_endings(root, UNREAD_SUFFIXES))
        folders.problem = (
            f"no images to train on: it contains {content}{pictures and f', and {pictures}'}. Put images"
            f" ({' '.join(IMAGE_SUFFIXES)}) into it, or folders of images named N_words for N repeats, as 5_cat"
        )
    return folders


def find_prefixes(root: Address) -> Folders:
    """Finds the folders below an address to train on, by one request for each folder. Raises StorageError.

    The search ends after LOOSE_OBJECTS objects that lie in no folder.
    """
    folders, after, loose = Folders(), "", 0
    unnamed: list[str] = []
    empty: list[str] = []
    has_loose_images = False
    while loose < LOOSE_OBJECTS and (page := list_page(root, after)):
        folder, slash, _ = page[0].name.partition("/")
        own = [found.name for found in page if found.name.startswith(f"{folder}/")] if slash else _loose(page)
        holds = any(name.lower().endswith((*IMAGE_SUFFIXES, *OPTIONAL_SUFFIXES, TAR_SUFFIX)) for name in own)
        repeats, words = _parts(folder)
        if not slash:
            loose, after, has_loose_images = loose + len(own), own[-1], has_loose_images or holds
            continue
        after = f"{folder}0"  # the first name behind all that begin with "folder/"
        if holds and repeats > 0:
            folders.used.append((root / folder, repeats, words))
        elif holds or repeats > 0:
            (unnamed if holds else empty).append(folder)
    if has_loose_images and not folders.used:
        folders.used.append((root, None, None))
    elif has_loose_images:
        folders.remarks.append(f"images directly in {root} are not used, because {root} has folders N_words")
    _remark_on_unused(folders, unnamed, empty)
    if not folders.used:
        folders.problem = (
            f"no images to train on below this address: put images ({' '.join(IMAGE_SUFFIXES)}) or tar files there,"
            " or folders of them named N_words for N repeats, as 5_cat"
        )
    return folders


def _loose(page: Sequence[Found]) -> list[str]:
    """The names at the start of a page that lie in no folder."""
    return list(takewhile(lambda name: "/" not in name, (found.name for found in page)))


def _remark_on_unused(folders: Folders, unnamed: list[str], empty: list[str]) -> None:
    if unnamed:
        message = "folders not used, because their names are not N_words (as 5_cat)"
        folders.remarks.append(f"{message}: {listed(unnamed)}")
    if empty:
        folders.remarks.append(f"folders not used, because they contain no images: {listed(empty)}")


def holds_images(folder: Path) -> bool:
    """True if an image lies directly in the folder."""
    with os.scandir(folder) as entries:
        return any(is_picture(entry, (*IMAGE_SUFFIXES, *OPTIONAL_SUFFIXES)) for entry in entries)


def holds_tars(folder: Path, *, without_folders: bool = False) -> bool:
    """True if tar files lie directly in the folder and no images. With `without_folders` no folders may lie there."""
    found = False
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_picture(entry, (*IMAGE_SUFFIXES, *OPTIONAL_SUFFIXES)) or (without_folders and entry.is_dir()):
                    return False
                found |= entry.name.lower().endswith(TAR_SUFFIX) and entry.name[0] != "." and entry.is_file()
    except OSError:
        return False
    return found


def split_tars(place: Location) -> tuple[Location, str | None]:
    """The folder and the pattern of names of a path that names tar files; the path itself and None of any other."""
    is_pattern = place.name.lower().endswith(TAR_SUFFIX) and not (isinstance(place, Path) and place.is_dir())
    return (place.parent, place.name) if is_pattern else (place, None)


def count_endings(folder: Path, suffixes: tuple[str, ...]) -> Counter[str]:
    """Counts the pictures directly in the folder that have one of these endings, by ending."""
    with os.scandir(folder) as entries:
        return Counter(Path(one.name).suffix.lower() for one in entries if is_picture(one, suffixes))


def _parts(name: str) -> tuple[int, str]:
    """Repeats and words of a folder named `N_words`. Repeats are 0 or less for other names."""
    number, _, words = name.partition("_")
    return int(number) if re.fullmatch(r"\s*[+-]?\d+\s*", number) else 0, words


def is_text(name: str) -> bool:
    """False for a file name or an argument that is not UTF-8. Python holds its bytes as surrogates."""
    return not re.search("[\ud800-\udfff]", name)


def caption_conflicts(options: CaptionOptions, variants: int) -> Iterator[tuple[str, str]]:
    """Yields option and message of what text encoder outputs, cached in this number of variants, cannot follow."""
    why = "cannot be used with cache_text_encoder_outputs"
    for option in ("shuffle_caption", "caption_tag_dropout_rate"):
        if variants == 1 and getattr(options, option):
            remedy = "set text_encoder_outputs_variants = 8 to cache 8 variants of each caption, or remove one of them"
            yield option, f"{why}, which encodes each caption once: {remedy}"
    if options.token_warmup_step:
        yield "token_warmup_step", f"{why}, because captions change with the step: keep one of them"


def mark_problems(
    options: QualityOptions, captions: CaptionOptions, weights: ImageWeightOptions
) -> Iterator[tuple[str, str]]:
    """Yields option and message of what is wrong with the options of quality tags and weights."""
    rules = weights.image_weights
    if isinstance(rules, Path) and not rules.is_file():
        yield "image_weights", not_found(rules, "file")
    if not options.quality_tags:
        return
    for separator in ("caption_separator", "keep_tokens_separator", "secondary_separator"):
        mark = getattr(captions, separator)
        if held := [tag.tag for tag in options.quality_tags if mark and mark in tag.tag]:
            yield "quality_tags", f"the tag {held[0]!r} holds {mark!r}, the {separator}: choose another separator"
    if options.quality_missing not in (*MISSING_RULES, *(tag.tag for tag in options.quality_tags)):
        yield "quality_missing", f"must be one of quality_tags or of {', '.join(MISSING_RULES)}"
    scores, groups = options.quality_scores, options.quality_groups or ""
    if scores and not is_ending(scores) and (reason := _scores_problem(scores)):
        yield "quality_scores", reason
    if groups.startswith("column:") and (scores is None or is_ending(scores)):
        remedy = "set it (the metadata file may stand there too), or name tags"
        yield "quality_groups", f"needs quality_scores, the file with this column: {remedy}"


def _scores_problem(scores: str) -> str | None:
    """Says what is wrong with the path or the address of a file of scores. The index finds out if an object exists."""
    try:
        place = parse_location(scores)
    except ValueError as error:
        return str(error)
    if isinstance(place, Address) or place.is_file():
        return None
    return f'{not_found(place, "file")}. A file beside each image is named by its ending, as ".score"'


def is_metadata(location: Location) -> bool:
    """False for a path that is neither a file nor a folder of Parquet files. Addresses are looked up later."""
    if isinstance(location, Address) or location.is_file():
        return True
    return location.is_dir() and next(location.glob("*.parquet"), None) is not None


def not_found(path: Location, kind: str) -> str:
    """Returns the message for a path that is not of a kind, "file", "folder" or "file or folder"."""
    if isinstance(path, Address):
        return f"no such {kind}: check the address"
    if path.is_dir():
        return f"is a folder, and a {kind} is needed: name a {kind} in it"
    if path.exists():
        return f"is a file, and a {kind} is needed: name the {kind} that holds it"
    place = "" if path.is_absolute() else f", which is relative to {Path.cwd()}"
    return f"no such {kind}: check the path{place}"
