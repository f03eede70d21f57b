"""dataset_config, in_json and reg_data_dir give the reference's datasets, and every mistake in them is reported."""

import json
import logging
from pathlib import Path

import pytest
import toml

from sdxl_finetune.config import Config, Dataset, Subset, load_config, load_datasets
from sdxl_finetune.config.fields import plain
from sdxl_finetune.errors import UserError

FOLDER = {"subsets": [{"image_dir": "d"}]}
MORE_ACCEPTED = [
    {"resolution": [768], **FOLDER},
    {"resolution": "768", **FOLDER},
    {"network_multiplier": 1, **FOLDER},
    {"face_crop_aug_range": [1, 2], **FOLDER},
    {"caption_extension": ".txt", "subsets": [{"metadata_file": "m.json"}]},
    {"subsets": [{"metadata_file": "m.json"}, {"image_dir": "d"}]},
]
"""Datasets that are accepted here. The reference refuses the form of a value, or folders beside metadata files."""
REFUSED = [
    {"num_repeats": True, **FOLDER},
    {"batch_size": 0, **FOLDER},
    {"subsets": []},
    {},
]
"""Datasets that are refused here. The reference accepts them, but they mean nothing or are not supported here."""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in "def":
        Path(name).mkdir()
    Path("c").mkdir()
    Path("m.json").write_text("{}")
    return tmp_path


def datasets(content: dict, *options: str) -> tuple[Dataset, ...]:
    Path("d.json").write_text(json.dumps(content))
    config = load_config(
        ["--dataset_config", "d.json", "--pretrained_model_name_or_path", ".", "--output_dir", "out", *options],
        program="sdxl-train",
    )
    assert config is not None
    return load_datasets(config)


def test_golden_datasets_are_the_reference_s(folder, golden) -> None:
    seen = 0
    for case in golden("config.json")["dataset_config"]["examples"]:
        content, options = case["config"], case["cli"]
        given = content.get("datasets", [])
        resolution = [] if "--resolution" in options else ["--resolution", "64", "--min_bucket_reso", "32"]
        everywhere = case["config"].get("general") == {"alpha_mask": True}  # the reference takes it per subset only
        refused = "raised" in case or not given or any(one in REFUSED for one in given)
        if refused and not any(one in MORE_ACCEPTED for one in given) and not everywhere:
            with pytest.raises(UserError):
                datasets(content, *resolution, *options)
            continue
        found = datasets(content, *resolution, *options)
        seen += 1
        for dataset, expected in zip(found, case.get("datasets", found), strict=True):
            if "raised" in case:
                continue
            for name, value in expected["params"].items():
                if name in Dataset.model_fields:
                    assert getattr(dataset, name) == (tuple(value) if isinstance(value, list) else value), case
            for subset, wanted in zip(dataset.subsets, expected["subsets"], strict=True):
                for name in subset.model_fields_set | wanted.keys():
                    if name in ("image_dir", "metadata_file"):
                        assert str(getattr(subset, name) or "") in (wanted.get(name) or "."), case
                    elif name in wanted and name in Subset.model_fields:
                        found_value = getattr(subset, name)
                        value = tuple(wanted[name]) if isinstance(wanted[name], list) else wanted[name]
                        assert ("" if found_value is None else found_value) == value, (case, name)
    assert seen > 18


def test_golden_datasets_with_masks_are_the_reference_s(folder, golden) -> None:
    """Without masked_loss the reference refuses the key. Here it has no effect, and a warning says so."""
    cases = golden("config.json")["dataset_config"]
    options = ["--resolution", "64", "--min_bucket_reso", "32"]
    found = 0
    for case in cases["examples_with_masked_loss_sanitizer"]:
        for expected in case["datasets"]:
            for wanted in expected["subsets"]:
                (dataset,) = datasets(case["config"], *options, "--masked_loss")
                (subset,) = dataset.subsets
                assert str(subset.conditioning_data_dir or "") == wanted.get("conditioning_data_dir", "")
                found += subset.conditioning_data_dir is not None
    assert found == 1
    case = cases["example_conditioning_dir_without_masked_loss"]
    assert case["raised"][0] == "MultipleInvalid"
    (dataset,) = datasets(case["config"], *options)
    assert dataset.subsets[0].conditioning_data_dir is None


SCHEMA_VALUES = {
    "int": 1, "bool": True, "str": "area", "float": 0.5, "float or int": 0, "dict": {"k": 1},
    "one or list of exactly two int": [64, 96],
    "bucket_reso_steps": 32, "max_bucket_reso": 128, "min_bucket_reso": 32, "image_dir": "d", "metadata_file": "m.json",
}  # fmt: skip
"""A value for each type of a key, or for the key itself, that the reference accepts."""
NOT_HERE = {"face_crop_aug_range", "alpha_mask"}
"""Keys that this trainer does not have."""


@pytest.mark.parametrize("kind", ["DreamBooth", "fine tuning"])
def test_every_key_of_the_reference_s_schema_is_accepted_where_the_reference_takes_it(folder, golden, kind) -> None:
    schema = golden("config.json")["dataset_config"]["schema"]

    def values(level: str) -> dict:
        keys = {key: about["type"] for key, about in schema[level].items() if key not in NOT_HERE | {"subsets"}}
        return {key: SCHEMA_VALUES.get(key, SCHEMA_VALUES.get(type_)) for key, type_ in keys.items()}

    subset = values(f"subsets ({kind})")
    content = {"general": values("general"), "datasets": [{**values(f"datasets ({kind})"), "subsets": [subset]}]}
    (dataset,) = datasets(content)
    (found,) = dataset.subsets
    assert found.flip_aug and dataset.resolution == (64, 96)
    assert len(subset) > 18 and len(content["general"]) > 25


def test_a_missing_value_is_taken_from_dataset_general_and_config(folder) -> None:
    """The order is subset, dataset, general, config. False and 0 count as given."""
    content = {
        "general": {"keep_tokens": 1, "flip_aug": True, "num_repeats": 3},
        "datasets": [
            {
                "keep_tokens": 2,
                "resolution": 64,
                "batch_size": 3,
                "subsets": [{"image_dir": "d"}, {"image_dir": "e", "keep_tokens": 0}],
            },
            {"resolution": [96, 128], "subsets": [{"image_dir": "d", "flip_aug": False, "num_repeats": 5}]},
        ],
    }
    first, second = datasets(content, "--train_batch_size", "7", "--shuffle_caption", "--min_bucket_reso", "32")
    assert [(one.resolution, one.batch_size) for one in (first, second)] == [((64, 64), 3), ((96, 128), 7)]
    subsets = [*first.subsets, *second.subsets]
    assert [one.keep_tokens for one in subsets] == [2, 0, 1]
    assert [one.flip_aug for one in subsets] == [True, True, False]
    assert [one.num_repeats for one in subsets] == [3, 3, 5]
    assert all(one.shuffle_caption for one in subsets)


def test_quality_tags_and_weights_differ_between_subsets(folder) -> None:
    Path("rules.toml").write_text('[tags]\n"x" = { repeats = 2 }\n')
    own = {"image_dir": "e", "quality_tags": "", "image_weights": "rules.toml"}
    content = {"datasets": [{"resolution": 64, "subsets": [{"image_dir": "d"}, own]}]}
    (dataset,) = datasets(content, "--quality_tags", "good > 0.5, bad", "--quality_scores", ".score")
    first, second = dataset.subsets
    assert [str(tag) for tag in first.quality_tags or ()] == ["good > 0.5", "bad"] and first.quality_scores == ".score"
    assert second.quality_tags is None and second.image_weights == Path("rules.toml") and first.image_weights is None


def test_mistakes_in_quality_tags_of_a_subset_are_named_with_their_place(folder) -> None:
    wrong = {
        "image_dir": "d",
        "quality_tags": "good > 0.5, bad",
        "quality_missing": "worse",
        "image_weights": "no.toml",
    }
    with pytest.raises(UserError) as error:
        datasets({"datasets": [{"resolution": 64, "subsets": [wrong, {"image_dir": "e", "quality_tags": "a > x"}]}]})
    place = "datasets[0].subsets"
    assert {problem.key for problem in error.value.problems} == {
        f"{place}[0].quality_missing", f"{place}[0].image_weights", f"{place}[1].quality_tags",
    }  # fmt: skip


def test_a_resolution_may_be_missing_if_metadata_files_name_all_images(folder) -> None:
    content: dict = {"datasets": [{"subsets": [{"metadata_file": "m.json", "image_dir": "d"}]}]}
    (dataset,) = datasets(content)
    assert dataset.resolution is None
    content["datasets"][0]["subsets"].append({"image_dir": "e"})
    with pytest.raises(UserError, match=r"datasets\[0\]\.resolution: is needed"):
        datasets(content)


def test_a_toml_file_gives_the_same_datasets_as_json(folder) -> None:
    content = {"general": {"flip_aug": True}, "datasets": [{"resolution": 64, "subsets": [{"image_dir": "d"}]}]}
    Path("d.toml").write_text(toml.dumps(content))
    config = Config(dataset_config="d.toml", min_bucket_reso=32)
    assert load_datasets(config) == datasets(content, "--min_bucket_reso", "32")


def test_all_mistakes_are_reported_with_file_and_key(folder) -> None:
    content = {
        "genral": {},
        "general": {"keep_token": 1},
        "datasets": [
            {
                "resolution": 64,
                "batch_size": "4",
                "subsets": [{"image_dir": "nowhere"}, {"image_dir": "d", "flip_aug": 1}],
            },
            {
                "subsets": [
                    {"class_tokens": "cat"},
                    {"metadata_file": "none.json"},
                    {"image_dir": "d", "face_crop_aug_range": [3.0, 2.0]},
                ]
            },
        ],
    }
    with pytest.raises(UserError) as caught:
        datasets(content)
    assert {problem.file for problem in caught.value.problems} == {"d.json"}
    messages = {problem.key: problem.message for problem in caught.value.problems}
    assert messages.keys() == {
        "file.genral",
        "general.keep_token",
        "datasets[0].batch_size",
        "datasets[0].subsets[0].image_dir",
        "datasets[0].subsets[1].flip_aug",
        "datasets[1].resolution",
        "datasets[1].subsets[0].image_dir",
        "datasets[1].subsets[1].metadata_file",
        "datasets[1].subsets[2].face_crop_aug_range",
    }
    assert messages["general.keep_token"] == "unknown key; did you mean keep_tokens?"
    assert messages["file.genral"] == "unknown key; did you mean general?"
    assert "no such folder" in messages["datasets[0].subsets[0].image_dir"]


@pytest.mark.parametrize("text", ["[[datasets]", "x = 1", "datasets = 3", "[[datasets]]\nsubsets = 1"])
def test_files_that_describe_no_datasets_are_refused(folder, text: str) -> None:
    Path("d.toml").write_text(text)
    with pytest.raises(UserError, match=r"d\.toml"):
        load_datasets(Config(dataset_config="d.toml", resolution=64))


def test_cached_latents_exclude_augmentation_by_colour(folder) -> None:
    content = {"datasets": [{"resolution": 64, "subsets": [{"image_dir": "d", "color_aug": True}]}]}
    assert datasets(content, "--min_bucket_reso", "32")[0].subsets[0].color_aug
    with pytest.raises(UserError, match=r"color_aug = True: cannot be used with cache_latents"):
        datasets(content, "--min_bucket_reso", "32", "--cache_latents")


def test_cached_text_encoder_outputs_exclude_shuffling_in_the_subsets_that_shuffle(folder) -> None:
    """A subset may turn off what the config turns on, as in the reference, which checks each dataset."""
    subsets = [{"image_dir": "d", "shuffle_caption": False}, {"image_dir": "e"}]
    content = {"datasets": [{"resolution": 64, "subsets": subsets}]}
    options = ["--min_bucket_reso", "32", "--cache_text_encoder_outputs", "--shuffle_caption"]
    with pytest.raises(UserError) as caught:
        datasets(content, *options)
    (problem,) = caught.value.problems
    assert problem.key == "datasets[0].subsets[1].shuffle_caption"
    assert "set text_encoder_outputs_variants = 8" in problem.message
    assert len(datasets(content, *options, "--text_encoder_outputs_variants", "2")[0].subsets) == 2
    content["datasets"][0]["subsets"] = subsets[:1]
    assert len(datasets(content, *options)[0].subsets) == 1


def test_subsets_and_keys_without_effect_are_logged(folder, caplog) -> None:
    subsets = [{"image_dir": "d"}, {"image_dir": "d", "num_repeats": 4}, {"image_dir": "e", "num_repeats": 0}]
    with caplog.at_level(logging.WARNING):
        (dataset,) = datasets({"datasets": [{"resolution": 64, "subsets": subsets, "cache_info": True}]})
    assert [(one.image_dir.name, one.num_repeats) for one in dataset.subsets] == [("d", 1)]
    for words in ("d is named again", "e is not used, because num_repeats is 0", "cache_info has no effect"):
        assert words in caplog.text


def test_masks_have_one_source_for_each_subset(folder, caplog) -> None:
    """The channel of a mask file wins over the alpha channel. Keys without effect are named."""
    subsets = [
        {"image_dir": "d", "alpha_mask": True, "conditioning_data_dir": "c"},
        {"image_dir": "e", "alpha_mask": True, "face_crop_aug_range": [2.0, 4.0]},
        {"image_dir": "f", "is_reg": True},
        {"image_dir": "c", "is_reg": True, "conditioning_data_dir": "c"},
    ]
    content = {"datasets": [{"resolution": 64, "subsets": subsets}]}
    options = ["--min_bucket_reso", "32", "--cache_latents"]

    def sources(*more: str) -> list[tuple[str | None, bool]]:
        (dataset,) = datasets(content, *options, *more)
        assert not any(one.face_crop_aug_range for one in dataset.subsets), "cached latents have one crop"
        return [
            (one.conditioning_data_dir and one.conditioning_data_dir.name, one.alpha_mask) for one in dataset.subsets
        ]

    with caplog.at_level(logging.WARNING):
        assert sources() == [(None, True), (None, True), (None, False), (None, False)]
    for words in ("conditioning_data_dir has no effect without masked_loss", "subsets[1].face_crop_aug_range has no"):
        assert words in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert sources("--masked_loss") == [("c", False), (None, True), (None, False), ("c", False)]
    assert "subsets[0].alpha_mask has no effect with conditioning_data_dir" in caplog.text
    content["datasets"][0]["conditioning_data_dir"] = "d"
    assert [source for source, _ in sources("--masked_loss")] == ["c", "d", None, "c"], "not of regularisation images"
    content["datasets"][0]["conditioning_data_dir"] = "nowhere"
    with pytest.raises(UserError, match=r"subsets\[1\].conditioning_data_dir = 'nowhere': no such folder"):
        sources("--masked_loss")


def test_the_option_names_masks_for_all_folders(folder) -> None:
    """A folder of masks with the name of the folder of images holds its masks. Regularisation images have none."""
    for name in ("2_cat", "3_dog"):
        (Path("d") / name).mkdir()
        (Path("d") / name / "a.png").touch()
    (Path("e") / "b.png").touch()
    (Path("c") / "3_dog").mkdir()
    options = {"train_data_dir": "d", "reg_data_dir": "e", "resolution": 64, "conditioning_data_dir": "c"}
    (dataset,) = load_datasets(Config(**options, masked_loss=True))
    found = [(one.image_dir.name, one.conditioning_data_dir) for one in dataset.subsets]
    assert found == [("2_cat", Path("c")), ("3_dog", Path("c/3_dog")), ("e", None)]
    (dataset,) = load_datasets(Config(**options))
    assert not any(one.conditioning_data_dir for one in dataset.subsets)


def test_in_json_and_regularisation_images_give_subsets(folder) -> None:
    (Path("d") / "2_cat").mkdir()
    (Path("d") / "2_cat" / "a.avif").touch()
    (Path("e") / "b.png").touch()
    shared = {"train_data_dir": "d", "resolution": 64}
    (dataset,) = load_datasets(Config(**shared, reg_data_dir="e", dataset_repeats=3))
    assert [(one.image_dir.name, one.num_repeats, one.is_reg) for one in dataset.subsets] == [
        ("2_cat", 2, False),
        ("e", 3, True),
    ]
    (dataset,) = load_datasets(Config(**shared, in_json="m.json", dataset_repeats=3, caption_prefix="x"))
    (subset,) = dataset.subsets
    assert (subset.metadata_file, subset.image_dir, subset.num_repeats) == (Path("m.json"), Path("d"), 3)
    assert plain(subset.caption_prefix) == "x"
