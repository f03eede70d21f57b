"""Files that options name at addresses: scores, weights, rules of tags and masks give what local files give."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from accelerate import Accelerator
from PIL import Image

from sdxl_finetune.config import Config, load_config, load_datasets
from sdxl_finetune.data.entry import Entry
from sdxl_finetune.data.index import Index, build_index
from sdxl_finetune.data.masks import latent_mask, load_mask, without_bad_masks
from sdxl_finetune.data.tags import tag_rules
from sdxl_finetune.errors import UserError
from sdxl_finetune.latents.captions import Captions, find_keys
from sdxl_finetune.latents.masks import prepare_masks
from sdxl_finetune.storage import Address, Location, delete, write
from sdxl_finetune.training.option_files import saved_options

STORE = Address("s3://bucket/options")
NAMES = ["a.png", "b.png", "c.png"]


@pytest.fixture
def folder(tmp_path: Path, write_images) -> Path:
    write_images(tmp_path / "5_cat", dict.fromkeys(NAMES, (64, 64)))
    for name in NAMES:
        (tmp_path / "5_cat" / name).with_suffix(".txt").write_text(f"style_{name[0]}, 1girl")
    return tmp_path / "5_cat"


@pytest.fixture
def build(folder: Path, subset, dataset) -> Callable[..., Index]:
    def build(images: Location = folder, **options) -> Index:
        own = subset(images, caption_extension=".txt", **options)
        return build_index([dataset(own)], folder.parent / "cache", "stop")

    return build


def put(path: Path) -> Address:
    """Uploads a file."""
    write(STORE / path.name, path)
    return STORE / path.name


def write_scores(path: Path, values: list[float]) -> Path:
    rows = [{"path": name, "score": value} for name, value in zip(NAMES, values, strict=False)]
    match path.suffix:
        case ".parquet":
            pa.parquet.write_table(pa.Table.from_pylist(rows), path)
        case ".csv":
            path.write_text("path,score\n" + "".join(f"{row['path']},{row['score']}\n" for row in rows))
        case ".json":
            path.write_text(json.dumps(rows))
        case ".jsonl":
            path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("ending", [".csv", ".json", ".jsonl", ".parquet"])
def test_scores_at_an_address(s3, build, tmp_path: Path, ending: str) -> None:
    """They are read once, and again when the object has changed."""
    path = write_scores(tmp_path / f"scores{ending}", [0.9, 0.1, 0.9])
    options = {"quality_tags": "good > 0.5, bad", "quality_scores": str(put(path))}
    index = build(**options)
    assert [index.quality_tag(row) for row in range(3)] == ["good", "bad", "good"]
    s3.clear()
    assert build(**options).path == index.path
    assert s3.requests["GET"] == 0 and s3.requests["HEAD"] == 1
    put(write_scores(path, [0.1, 0.1, 0.9]))
    index = build(**options)
    assert [index.quality_tag(row) for row in range(3)] == ["bad", "bad", "good"]


@pytest.mark.parametrize("ending", [".toml", ".csv"])
def test_weights_at_an_address(s3, build, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"weights{ending}"
    path.write_text("[tags]\nstyle_b = { repeats = 3 }\n" if ending == ".toml" else "path,repeats\nb.png,3\n")
    assert build(image_weights=put(path)).repeats.tolist() == [1, 3, 1]
    broken = tmp_path / "broken.toml"
    broken.write_text("[tags")
    with pytest.raises(UserError, match=r"s3://bucket/options/broken\.toml: not valid TOML"):
        build(image_weights=put(broken))


def test_rules_of_tags_at_an_address(s3, build, tmp_path: Path, monkeypatch) -> None:
    protected, groups = tmp_path / "protected.txt", tmp_path / "groups.toml"
    protected.write_text("1girl\n")
    groups.write_text('"hatsune miku" = ["aqua hair"]\n')
    options = {"protected_tags_file": put(protected), "caption_tag_dropout_groups": put(groups)}
    index = build(shuffle_caption=True, caption_tag_dropout_rate=0.5, **options)
    local = {"protected_tags_file": protected, "caption_tag_dropout_groups": groups}
    rules, same = (tag_rules(index.subsets[0].model_copy(update=one)) for one in (options, local))
    assert rules.protected.holds("1girl") and not rules.protected.holds("solo")
    assert rules.followers == same.followers == {"hatsune miku": ("aqua hair",)}
    captions = Captions(index, 2, "tokenizer")
    before = find_keys(captions, tmp_path / "kept", writes=True).copy()
    assert np.array_equal(find_keys(captions, tmp_path / "kept", writes=False), before)
    config = Config(output_dir=tmp_path, train_data_dir=tmp_path, **options)
    digests = saved_options(config)
    assert digests == saved_options(Config(output_dir=tmp_path, train_data_dir=tmp_path, **local))
    assert not any("s3://" in str(value) for value in digests.values())
    protected.write_text("solo\n")
    put(protected)
    assert saved_options(config) != digests, "a resumed run says that the file has changed"


def test_the_config_takes_addresses(s3, folder, tmp_path: Path) -> None:
    """On the command line, in a config file and in a dataset_config file."""
    names = {
        "image_weights": "w.toml",
        "protected_tags_file": "p.txt",
        "caption_tag_dropout_groups": "g.toml",
        "quality_scores": "s.csv",
        "conditioning_data_dir": "masks",
    }
    options = {name: str(STORE / file) for name, file in names.items()}
    needed = {"pretrained_model_name_or_path": tmp_path, "output_dir": tmp_path / "out", "resolution": 64}
    needed |= {"max_train_steps": 1, "quality_tags": "good > 0.5", "caption_tag_dropout_rate": 0.1}
    arguments = [f"--{name}={value}" for name, value in needed.items()] + ["--masked_loss"]
    write(STORE / "masks" / "a.png", b"x")
    typed = [f"--{name}={value}" for name, value in options.items()]
    config = load_config([*arguments, *typed, f"--train_data_dir={tmp_path}"], program="sdxl-train")
    table = "".join(f"{name} = '{value}'\n" for name, value in options.items())
    text = f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{folder}'\n{table}"
    (tmp_path / "d.toml").write_text(text)
    in_file = load_config([*arguments, f"--dataset_config={tmp_path / 'd.toml'}"], program="sdxl-train")
    for loaded in (config, in_file):
        assert loaded is not None
        (own,) = load_datasets(loaded)[0].subsets
        assert {name: str(getattr(own, name)) for name in options} == options
        saved = saved_options_of(loaded)
        assert "s3://" not in saved


def saved_options_of(config: Config) -> str:
    for name in ("p.txt", "g.toml"):
        write(STORE / name, b"")
    return json.dumps(saved_options(config))


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("image_weights", "none.toml"),
        ("quality_scores", "none.parquet"),
        ("protected_tags_file", "none.txt"),
        ("caption_tag_dropout_groups", "none.toml"),
        ("conditioning_data_dir", "none"),
    ],
)
def test_a_missing_object_is_named_with_its_option(s3, build, monkeypatch, option: str, name: str) -> None:
    monkeypatch.setattr("sdxl_finetune.storage.objects.PAUSES", ())
    place = STORE / name
    more = {"quality_tags": "good > 0.5"} if option == "quality_scores" else {}
    value = str(place) if option == "quality_scores" else place
    with pytest.raises(UserError) as caught:
        tag_rules(build(**more, **{option: value}).subsets[0])
    (problem,) = caught.value.problems
    wanted = "holds no masks" if option == "conditioning_data_dir" else "does not exist"
    assert str(problem).startswith(f"{option} = '{place}': {wanted}")


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    """Masks of NAMES, in a folder."""
    (tmp_path / "masks").mkdir()
    for number, name in enumerate(NAMES):
        coarse = np.random.default_rng(number).integers(0, 256, (7, 7), np.uint8)
        Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC).save(tmp_path / "masks" / name)
    return tmp_path / "masks"


def upload(folder: Path) -> Address:
    for path in folder.iterdir():
        write(STORE / folder.name / path.name, path)
    return STORE / folder.name


def load(entry: Entry) -> np.ndarray:
    return latent_mask(load_mask(entry, entry.resized, (0, 0)), 8)


@pytest.mark.parametrize("images_in_store", [False, True])
def test_masks_at_an_address_are_those_of_the_folder(s3, build, folder, masks, tmp_path, images_in_store) -> None:
    """Uncached and cached. A warm start asks for their list alone."""
    images = upload(folder) if images_in_store else folder
    place = upload(masks)
    local = build(conditioning_data_dir=masks)
    index = without_bad_masks(build(images, conditioning_data_dir=place), "stop")
    assert all(np.array_equal(load(index[row]), load(local[row])) for row in range(3))
    config = Config(output_dir=tmp_path, cache_latents=True, cache_latents_to_disk=True)
    _, store = prepare_masks(index, config, Accelerator(), 8)
    assert store is not None
    for row in range(3):
        assert np.array_equal(store.read([row], [False])[0], load(local[row]).astype(np.float16))
    s3.clear()
    again = without_bad_masks(build(images, conditioning_data_dir=place), "stop")
    prepare_masks(again, config, Accelerator(), 8)
    assert s3.requests["GET"] == len(s3.paths) == 1 + images_in_store, "one listing for each folder"


def test_masks_that_change_or_vanish_in_the_store_are_named(s3, build, masks) -> None:
    place = upload(masks)
    index = build(conditioning_data_dir=place)
    Image.new("L", (64, 64), 7).save(masks / "a.png")
    upload(masks)
    delete(place / "b.png")
    Image.new("L", (70, 64), 7).save(masks / "c.png")
    bad = without_bad_masks(build(conditioning_data_dir=place), "skip")
    assert bad.used.tolist() == [True, False, True]
    upload(masks)
    with pytest.raises(UserError) as caught:
        without_bad_masks(build(conditioning_data_dir=place), "stop")
    missing, *others = caught.value.problems
    assert missing.message == "the mask has 70x64 pixels, but its image 64x64: make them equal" and len(others) == 0
    assert missing.file == str(place / "c.png")
    with pytest.raises(Exception, match="changed since it was scanned"):
        load(index[0])
    shutil.rmtree(masks)
