"""Masks follow their images into the bucket, and unusable masks are named together."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sdxl_finetune.data.batch_plan import build_plan
from sdxl_finetune.data.images import ImageError, load_image
from sdxl_finetune.data.index import Index, build_index
from sdxl_finetune.data.loader import TrainingDataset
from sdxl_finetune.data.masks import find_mask, latent_mask, load_mask, without_bad_masks
from sdxl_finetune.data.sources import objects
from sdxl_finetune.data.tokens import Tokenizer
from sdxl_finetune.errors import UserError
from sdxl_finetune.storage import read

SIZES = {"a.png": (64, 64), "b.png": (200, 180), "c_90_60_30_40.png": (170, 140), "d.png": (90, 150)}


def save_grey(folder: Path, mask_folder: Path | None = None) -> None:
    """Grey pictures, and the same pictures as masks, or as the alpha channel if there is no folder for masks."""
    folder.mkdir(parents=True)
    for number, (name, size) in enumerate(SIZES.items()):
        coarse = np.random.default_rng(number).integers(0, 256, (9, 9), np.uint8)
        grey = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        if mask_folder is None:
            Image.merge("RGBA", (grey, grey, grey, grey)).save(folder / name)
        else:
            mask_folder.mkdir(exist_ok=True)
            grey.convert("RGB").save(folder / name)
            grey.save(mask_folder / name)


def batches(index: Index, steps: int) -> list:
    dataset = TrainingDataset(
        index=index,
        read_latents=None,
        tokenize=Tokenizer(max_token_length=None),
        draw_noise=lambda _position, shape, _latents: (torch.zeros(shape), None),
        draw_timesteps=lambda _position, images, _pixels: torch.zeros(images, dtype=torch.long),
        seed=5,
        max_steps=10,
    )
    plan = build_plan(index, ranks=1, accumulation=1, seed=5)
    return [dataset[micro_batch].batch for micro_batch in plan.micro_batches(0, steps)]


def block_means(images: Tensor) -> Tensor:
    """What a mask that equals the picture must be: the mean over the pixels of each latent, 0 to 1."""
    return torch.nn.functional.avg_pool2d((images[:, :1] + 1) / 2, 8)[:, 0]


@pytest.mark.parametrize("source", ["files", "alpha"])
def test_a_mask_is_resized_cropped_and_mirrored_as_its_image(tmp_path: Path, subset, dataset, source: str) -> None:
    """At random places, around faces and mirrored. Each mask equals its picture, so both must stay equal."""
    masks = tmp_path / "masks" if source == "files" else None
    save_grey(tmp_path / "images", masks)
    options = {"conditioning_data_dir": masks} if masks else {"alpha_mask": True}
    random = {"flip_aug": True, "random_crop": True, "face_crop_aug_range": (1.0, 3.0)}
    own = dataset(subset(tmp_path / "images", num_repeats=4, **options, **random), min_bucket_reso=32)
    crops = set()
    for batch in batches(build_index([own], tmp_path / "cache", on_bad_image="stop"), 12):
        assert batch.mask.dtype == torch.float32 and batch.mask.min() >= 0 and batch.mask.max() <= 1
        torch.testing.assert_close(batch.mask, block_means(batch.images), rtol=0, atol=1e-6)
        crops |= {tuple(place) for place in batch.crop_top_left.tolist()}
    assert len(crops) > 10


def test_images_without_a_mask_count_fully_and_a_run_without_masks_has_none(tmp_path: Path, subset, dataset) -> None:
    save_grey(tmp_path / "masked")
    save_grey(tmp_path / "plain", tmp_path / "unused")
    plain = subset(tmp_path / "plain", num_repeats=3)
    index = build_index([dataset(subset(tmp_path / "masked", alpha_mask=True), plain)], tmp_path / "cache", "stop")
    full = torch.cat([batch.mask.flatten(1).min(1).values for batch in batches(index, 6)]) == 1
    assert full.any() and not full.all()
    only_plain = build_index([dataset(plain)], tmp_path / "cache", "stop")
    assert all(batch.mask is None for batch in batches(only_plain, 3))


def test_alpha_mask_keeps_hidden_colours_and_opaque_images_count_fully(tmp_path: Path, subset, dataset) -> None:
    """As in the reference, which drops the alpha channel. Without alpha_mask, transparent parts are white."""
    colours = np.full((64, 64, 4), (200, 40, 90, 0), np.uint8)
    colours[:, 32:, 3] = 255
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(colours).save(folder / "half.png")
    Image.fromarray(colours[..., :3]).save(folder / "opaque.bmp")
    masked, plain = (
        build_index([dataset(subset(folder, alpha_mask=use))], tmp_path / "cache", "stop") for use in (True, False)
    )
    assert (masked[0].load((0, 0)) == (200, 40, 90)).all()
    assert (plain[0].load((0, 0))[:, :32] == 255).all()
    half, opaque = (latent_mask(load_mask(masked[row], (64, 64), (0, 0)), 8) for row in (0, 1))
    assert half.tolist() == [[0.0] * 4 + [1.0] * 4] * 8
    assert (opaque == 1).all()


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGB", "RGBA", "I;16"])
def test_the_red_channel_of_any_kind_of_image_is_the_mask(tmp_path: Path, subset, dataset, mode: str) -> None:
    """Its colour profile and its transparency do not count."""
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    red = np.repeat(np.repeat(np.array([[0, 255], [255, 0]], np.uint8), 32, 0), 32, 1)
    Image.fromarray(red).save(tmp_path / "images" / "a.jpg")
    if mode == "I;16":
        mask = Image.fromarray(red.astype(np.uint16) * 257)
    elif mode in ("RGB", "RGBA"):
        mask = Image.fromarray(np.stack([red, 255 - red, red * 0 + 7, red * 0][: len(mode)], -1))
    else:
        mask = Image.fromarray(red).convert(mode)
    assert mask.mode == mode
    mask.save(tmp_path / "masks" / "a.PNG")
    one = subset(tmp_path / "images", conditioning_data_dir=tmp_path / "masks")
    (entry,) = (build_index([dataset(one)], tmp_path / "cache", "stop")[row] for row in range(1))
    assert find_mask(entry).name == "a.PNG"
    assert np.array_equal(load_mask(entry, (64, 64), (0, 0)), red)


@pytest.fixture
def with_bad_masks(tmp_path: Path, subset, dataset) -> Index:
    save_grey(tmp_path / "images", tmp_path / "masks")
    (tmp_path / "masks" / "a.png").unlink()
    (tmp_path / "masks" / "b.png").write_bytes(b"no image")
    Image.new("L", (70, 80)).save(tmp_path / "masks" / "d.png")
    one = subset(tmp_path / "images", conditioning_data_dir=tmp_path / "masks")
    return build_index([dataset(one)], tmp_path / "cache", "stop")


def test_all_unusable_masks_are_named_together(with_bad_masks: Index, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        without_bad_masks(with_bad_masks, "stop")
    missing, broken, other = caught.value.problems
    assert missing.file == str(tmp_path / "images" / "a.png")
    assert missing.message == f"its mask is missing: put 'a.png' into {tmp_path / 'masks'}"
    assert broken.file == str(tmp_path / "masks" / "b.png") and "not an image" in broken.message
    assert other.file == str(tmp_path / "masks" / "d.png")
    assert other.message == "the mask has 70x80 pixels, but its image 90x150: make them equal"


def test_images_of_unusable_masks_can_be_skipped(with_bad_masks: Index, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        index = without_bad_masks(with_bad_masks, "skip")
    assert [index[row].path.name for row in np.flatnonzero(index.used).tolist()] == ["c_90_60_30_40.png"]
    assert "3 files are skipped" in caplog.text


def test_a_mask_that_breaks_during_a_run_is_skipped_at_weight_zero(tmp_path: Path, subset, dataset) -> None:
    save_grey(tmp_path / "images", tmp_path / "masks")
    one = subset(tmp_path / "images", conditioning_data_dir=tmp_path / "masks")
    index = build_index([dataset(one)], tmp_path / "cache", "stop")
    (tmp_path / "masks" / "b.png").unlink()
    weights = torch.cat([batch.weights for batch in batches(index, 4)])
    assert len(weights) == 8 and (weights == 0).sum() == 2, "two epochs"


def test_pictures_with_masks_are_read_as_before(tmp_path: Path, subset, dataset) -> None:
    """A mask file changes no pixel of the image, so cached latents stay valid."""
    save_grey(tmp_path / "images", tmp_path / "masks")
    one = subset(tmp_path / "images", conditioning_data_dir=tmp_path / "masks")
    entry = build_index([dataset(one)], tmp_path / "cache", "stop")[0]
    assert np.array_equal(entry.load((0, 0)), load_image(entry.path))


def save_masks(folder: Path, names: Sequence[str], size: tuple[int, int] = (64, 64)) -> None:
    """Masks, each of a grey value of its own."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", size, 10 * number + 10).save(folder / name)


def masks_of(index: Index) -> dict[str, str]:
    """The mask of each image, or the reason why it has none."""
    found = {}
    for row in range(len(index)):
        entry = index[row]
        name = entry.path.relative_to(entry.subset.image_dir).as_posix()
        try:
            found[name] = find_mask(entry).relative_to(entry.subset.conditioning_data_dir).as_posix()
        except ImageError as error:
            found[name] = error.reason
    return found


@pytest.fixture
def nested(tmp_path: Path, write_images, dataset, subset) -> Callable[..., Index]:
    """nested(*names): the index of images of these names, which a metadata file lists, with the folder of masks."""

    def build(*names: str) -> Index:
        images = tmp_path / "images"
        write_images(images, {})
        for name in names:
            write_images((images / name).parent, {Path(name).name: (64, 64)})
        (tmp_path / "m.json").write_text(json.dumps({name: {"caption": "x"} for name in names}))
        one = subset(images, metadata_file=tmp_path / "m.json", conditioning_data_dir=tmp_path / "masks")
        return build_index([dataset(one)], tmp_path / "cache", "stop")

    return build


def test_masks_lie_in_the_folders_of_their_images_or_without_them(nested, tmp_path: Path) -> None:
    save_masks(tmp_path / "masks", ["a/1.png", "2.png", "b/3.webp", "deep/4.png"])
    index = nested("a/1.jpg", "a/2.jpg", "x/b/3.jpg", "very/deep/4.jpg", "a/5.jpg")
    assert masks_of(index) == {
        "a/1.jpg": "a/1.png",
        "a/2.jpg": "2.png",
        "x/b/3.jpg": "b/3.webp",
        "very/deep/4.jpg": "deep/4.png",
        "a/5.jpg": f"its mask is missing: put 'a/5.png' into {tmp_path / 'masks'}",
    }


def test_a_mask_without_folder_is_not_that_of_two_images(nested, tmp_path: Path, caplog) -> None:
    """The image without a folder, and an image with a mask in its own folder, keep theirs."""
    save_masks(tmp_path / "masks", ["1.png", "2.png", "b/2.png"])
    index = nested("a/1.jpg", "b/1.jpg", "2.jpg", "a/2.jpg", "b/2.jpg")
    reason = f"{tmp_path / 'masks' / '%s'} fits images of this name in several folders: put its mask at '%s' in "
    reason += str(tmp_path / "masks")
    assert masks_of(index) == {
        "a/1.jpg": reason % ("1.png", "a/1.png"),
        "b/1.jpg": reason % ("1.png", "b/1.png"),
        "2.jpg": "2.png",
        "a/2.jpg": reason % ("2.png", "a/2.png"),
        "b/2.jpg": "b/2.png",
    }
    with pytest.raises(UserError) as caught:
        without_bad_masks(index, "stop")
    assert len(caught.value.problems) == 3
    assert without_bad_masks(index, "skip").used.tolist() == [name in ("2.jpg", "b/2.jpg") for name in masks_of(index)]
    assert "several folders, for example" not in caplog.text


def test_equal_stems_have_the_mask_of_their_whole_name_or_the_first_as_in_the_reference(nested, tmp_path: Path) -> None:
    """The reference sorts the names of masks with the image's stem, and takes the first."""
    save_masks(tmp_path / "masks", ["a.jpg", "a.png", "b.webp", "b.BMP", "c.png"])
    found = masks_of(nested("a.jpg", "a.png", "b.jpg", "c.jpg", "c.webp"))
    assert found == {"a.jpg": "a.jpg", "a.png": "a.png", "b.jpg": "b.BMP", "c.jpg": "c.png", "c.webp": "c.png"}


def test_masks_of_images_in_tar_files(tmp_path: Path, write_images, pack, subset, dataset) -> None:
    write_images(tmp_path / "plain", {"1.png": (64, 64), "2.png": (64, 64)})
    one, two = ((tmp_path / "plain" / f"{number}.png").read_bytes() for number in (1, 2))
    pack("x.tar", {"1.png": one, "2.png": two})
    pack("y.tar", {"1.png": two})
    save_masks(tmp_path / "masks", ["x.tar/1.png", "y.tar/1.png", "2.png"])
    index = build_index(
        [dataset(subset(tmp_path / "tars", conditioning_data_dir=tmp_path / "masks"))], tmp_path / "cache", "stop"
    )
    assert list(masks_of(index).values()) == ["x.tar/1.png", "2.png", "y.tar/1.png"]


def test_two_folders_of_images_that_share_a_mask_are_named(
    tmp_path: Path, write_images, subset, dataset, caplog
) -> None:
    """As in the reference they are used. The same image in two datasets has one mask without a warning."""
    for name in ("5_a", "5_b"):
        write_images(tmp_path / name, {"1.png": (64, 64)})
    save_masks(tmp_path / "masks", ["1.png"])
    first, second = (subset(tmp_path / name, conditioning_data_dir=tmp_path / "masks") for name in ("5_a", "5_b"))
    with caplog.at_level(logging.WARNING):
        index = build_index([dataset(first), dataset(first)], tmp_path / "cache", "stop")
        assert masks_of(index) == {"1.png": "1.png"} and "several folders" not in caplog.text
        index = build_index([dataset(first, second)], tmp_path / "cache", "stop")
    assert masks_of(index) == {"1.png": "1.png"} and len(index) == 2
    assert "masks are used for images of the same name in several folders, for example 1.png (1 in all)" in caplog.text


def test_a_warm_start_reads_no_mask(tmp_path: Path, subset, dataset, monkeypatch) -> None:
    """Sizes are known by size and modification time of the mask. A changed mask is read again."""
    save_grey(tmp_path / "images", tmp_path / "masks")
    one = subset(tmp_path / "images", conditioning_data_dir=tmp_path / "masks")

    def start() -> Index:
        return without_bad_masks(build_index([dataset(one)], tmp_path / "cache", "stop"), "stop")

    start()
    reads: list[str] = []
    monkeypatch.setattr(objects, "read", lambda path, *rest: reads.append(path.name) or read(path, *rest))
    assert start().used.all() and not reads
    Image.new("L", (64, 64), 9).save(tmp_path / "masks" / "a.png")
    assert start().used.all() and reads == ["a.png"]
    (tmp_path / "masks" / "b.png").unlink()
    kept = build_index([dataset(one)], tmp_path / "cache", "stop", skip_check=True)
    assert masks_of(kept)["b.png"] == "b.png", "skip_cache_check looks for no masks"


def test_a_folder_without_masks_is_named(tmp_path: Path, write_images, subset, dataset) -> None:
    write_images(tmp_path / "images", {"a.png": (64, 64)})
    (tmp_path / "masks").mkdir()
    one = subset(tmp_path / "images", conditioning_data_dir=tmp_path / "masks")
    with pytest.raises(UserError, match=r"conditioning_data_dir = .*masks': holds no masks: put images \(.png"):
        build_index([dataset(one)], tmp_path / "cache", "stop")
