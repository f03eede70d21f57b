"""The folders of a train_data_dir that are trained on."""

from pathlib import Path

import pytest

from sdxl_finetune.config import Config, load_datasets
from sdxl_finetune.config.dataset import find_folders, holds_tars, split_tars
from sdxl_finetune.errors import UserError


def images(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_folders_named_n_words_are_used_as_in_the_reference(golden, tmp_path):
    recorded = golden("config.json")["train_data_dir_subfolders"]
    images(tmp_path, *(f"{name}/a.png" for name in recorded["created"]))
    found = find_folders(tmp_path)
    expected = [(s["image_dir"], s["num_repeats"], s["class_tokens"]) for s in recorded["subsets"]]
    assert [(path.name, repeats, words) for path, repeats, words in found.used] == expected
    (remark,) = found.remarks
    assert all(name in remark for name in ("0_zero", "nonumber", "-1_neg"))


def test_images_directly_in_the_folder_are_used_if_no_folder_is_named_n_words(tmp_path):
    images(tmp_path, "A.JPG", "b.txt", "other/c.webp")
    found = find_folders(tmp_path)
    assert found.used == [(tmp_path, None, None)]
    assert found.remarks == ["folders not used, because their names are not N_words (as 5_cat): other"]


def test_named_folders_win_over_images_directly_in_the_folder(tmp_path, caplog):
    images(tmp_path, "a.png", "2_cat/b.png", "3_dog/readme.txt")
    (dataset,) = load_datasets(Config(train_data_dir=str(tmp_path), resolution=64))
    assert [(s.image_dir.name, s.num_repeats, s.class_tokens) for s in dataset.subsets] == [("2_cat", 2, "cat")]
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "images directly in" in said and "3_dog" in said


def test_a_folder_without_images_is_refused(tmp_path):
    images(tmp_path, "cats/nested/a.png", "notes.txt")
    with pytest.raises(UserError, match="only the folders cats") as caught:
        load_datasets(Config(train_data_dir=str(tmp_path), resolution=64))
    assert "named N_words" in str(caught.value)
    assert find_folders(tmp_path / "none").problem == "no such folder: check the path"
    relative = f"no such folder: check the path, which is relative to {Path.cwd()}"
    assert find_folders(Path("none")).problem == relative


def test_a_message_lists_at_most_ten_folders(tmp_path):
    images(tmp_path, "a.png", *(f"x{number:02d}/a.png" for number in range(12)))
    assert find_folders(tmp_path).remarks[0].endswith("x09 and 2 more")


def test_options_reach_the_dataset(tmp_path):
    images(tmp_path, "a.png")
    config = Config(
        train_data_dir=str(tmp_path),
        resolution="1024,768",
        train_batch_size=5,
        enable_bucket=True,
        min_bucket_reso=100,
        max_bucket_reso=1030,
        bucket_reso_steps=32,
        resize_interpolation="area",
        shuffle_caption=True,
        keep_tokens=4,
        flip_aug=True,
        caption_extension=".txt",
        token_warmup_step=0.5,
    )
    (dataset,) = load_datasets(config)
    (subset,) = dataset.subsets
    assert (dataset.resolution, dataset.batch_size, subset.resize_interpolation) == ((1024, 768), 5, "area")
    assert (dataset.min_bucket_reso, dataset.max_bucket_reso) == (100, 1030)  # buckets round them
    assert (subset.shuffle_caption, subset.keep_tokens, subset.flip_aug) == (True, 4, True)
    assert (subset.caption_extension, subset.token_warmup_step, subset.is_reg) == (".txt", 0.5, False)
    (square,) = load_datasets(Config(train_data_dir=str(tmp_path), resolution=64, min_bucket_reso=3))
    assert square.min_bucket_reso == 3 and not square.enable_bucket


def test_a_compressed_tar_file_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "x.tar.gz").write_bytes(b"")
    assert "unpack it with gunzip" in str(find_folders(tmp_path / "x.tar.gz").problem)


def test_folders_of_tar_files(tmp_path: Path) -> None:
    for name in ("5_cat/x.tar", "3_dog/a.png", "2_empty/x.txt", "6_both/a.png", "6_both/x.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [(path.name, repeats) for path, repeats, _ in find_folders(tmp_path).used] == [
        ("3_dog", 3),
        ("5_cat", 5),
        ("6_both", 6),
    ]
    assert holds_tars(tmp_path / "5_cat") and not holds_tars(tmp_path / "6_both")
    assert split_tars(tmp_path / "5_cat" / "x-{0..3}.tar") == (tmp_path / "5_cat", "x-{0..3}.tar")
    (tmp_path / "folder.tar").mkdir()
    assert split_tars(tmp_path / "folder.tar") == (tmp_path / "folder.tar", None)
