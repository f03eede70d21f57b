"""Prompt files and names of previews equal the golden values of sd-scripts, except where we differ on purpose."""

import json
import logging
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_finetune.errors import UserError
from sdxl_finetune.output.prompts import PreviewFiles, Prompt, line_values, load_prompts

DIFFERENT = {
    # An option follows white space and begins with a letter.
    "a cat -- w 512": {"prompt": "a cat -- w 512"},
    "a cat --w  512": {"prompt": "a cat", "width": 512},
    "tab\t--w 512": {"prompt": "tab", "width": 512},
    "a --n text -- with dashes --w 512": {"prompt": "a", "negative_prompt": "text -- with dashes", "width": 512},
    # An option may stand at the start of a line.
    "--w 512 --h 512": {"prompt": "", "width": 512, "height": 512},
    # Without dashes, the start of a line is part of the prompt.
    "w 512": {"prompt": "w 512"},
    "w 512 --h 640": {"prompt": "w 512", "height": 640},
    "s 30 cats --w 640": {"prompt": "s 30 cats", "width": 640},
    "n negative looking --d 5": {"prompt": "n negative looking", "seed": 5},
    "d 7 days --w 64": {"prompt": "d 7 days", "width": 64},
    "h 3": {"prompt": "h 3"},
    "l 5 things": {"prompt": "l 5 things"},
    "ss something": {"prompt": "ss something"},
}
"""differences.md: Lines of prompt files."""
PROBLEMS = {"a cat --w abc": "width", "a cat --l x": "scale", "a cat --l 1.2.3": "scale", "a cat --l -3": "scale"}
"""differences.md: Unreadable options of prompts."""


def read(tmp_path, name: str, content: str) -> tuple[Prompt, ...]:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    return load_prompts(path)


def expected(values: dict) -> Prompt:
    """Returns the prompt for golden options.

    Sizes are rounded down as in the golden pipeline_calls. White space at the ends is removed: no encoder sees it.
    """
    options = {key: values[key] for key in ("prompt", "negative_prompt", "scale", "seed") if key in values}
    options |= {key: max(64, values[key] // 8 * 8) for key in ("width", "height") if key in values}
    options |= {ours: values[key] for ours, key in NAMES.items() if key in values}
    for key in ("prompt", "negative_prompt"):
        if key in options:
            options[key] = options[key].strip() or ("" if key == "prompt" else None)
    return Prompt(**options)


NAMES = {"steps": "sample_steps", "sampler": "sample_sampler"}


def test_lines_of_prompt_files_are_golden(golden, tmp_path) -> None:
    cases = golden("sample_prompts.json")["lines"]
    assert {case["line"] for case in cases} >= {*DIFFERENT, *PROBLEMS}
    for case in cases:
        line = case["line"]
        if line in PROBLEMS:
            with pytest.raises(UserError) as caught:
                read(tmp_path, "p.json", json.dumps([line]))
            assert [problem.key for problem in caught.value.problems] == [PROBLEMS[line]]
        else:
            (prompt,) = read(tmp_path, "p.json", json.dumps([line]))
            assert prompt == expected(DIFFERENT.get(line, case["out"])), line


def test_prompt_files_are_golden(golden, tmp_path) -> None:
    """differences.md: Prompt files."""
    ours = {
        "p.txt": [{"prompt": "a cat", "width": 512}, {"prompt": "b dog"}, {"prompt": "c"}],
        "p2.txt": [{"prompt": "a"}],
        "p_overlap.toml": [{"prompt": "a", "width": 512}],
        "p_nosub.toml": [{"prompt": "a"}],
        "p_obj.json": [{"prompt": "a"}],
        "p.TXT": [{"prompt": "a"}],
    }
    for case in golden("sample_prompts.json")["files"]:
        if case["file"] == "p.yaml":
            with pytest.raises(UserError, match=r"\.txt, \.toml or \.json"):
                read(tmp_path, case["file"], case["content"])
        else:
            prompts = read(tmp_path, case["file"], case["content"])
            wanted = ours.get(case["file"]) or case["load_prompts"]
            assert prompts == tuple(expected(values) for values in wanted), case["file"]


def test_defaults_of_prompts_are_golden(golden) -> None:
    defaults = golden("sample_prompts.json")["defaults_when_not_given"]
    assert Prompt(prompt="") == expected(defaults | {"prompt": "", "negative_prompt": "", "sample_sampler": None})


def test_every_problem_names_its_file_line_and_option(tmp_path) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, "p.txt", "a --w x --ss fast\n\nb\nc --d 99999999999999999999999999\n")
    reported = [(problem.file.rpartition("/")[2], problem.key) for problem in caught.value.problems]
    assert reported == [("p.txt:1", "sample_sampler"), ("p.txt:1", "width"), ("p.txt:4", "seed")]
    with pytest.raises(UserError, match=r"p\.json: prompt 2: negative_prompt = 3: must be text"):
        read(tmp_path, "p.json", '[{"prompt": "a"}, {"prompt": "b", "negative_prompt": 3}]')


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.json", "[", "line 1"),
        ("p.json", "[3]", "prompt 1 is neither"),
        ("p.toml", "\n[prompt\n", "line 2"),
        ("p.toml", "prompt = 3", "no .prompt. table"),
        ("p.toml", "[prompt]\nsubset = 3", "list of tables"),
    ],
)
def test_a_file_that_is_no_prompt_file_is_refused(tmp_path, name: str, content: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, name, content)


def test_a_missing_file_and_other_encodings_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="No such file"):
        load_prompts(tmp_path / "none.txt")
    (tmp_path / "p.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError, match="utf-8"):
        load_prompts(tmp_path / "p.txt")


def test_each_option_without_effect_is_reported_once(tmp_path, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        prompts = read(tmp_path, "p.txt", "a --g 3\nb --cn x.png --g 3\n")
    assert [prompt.prompt for prompt in prompts] == ["a", "b"]
    reported = [record.getMessage().rpartition("/")[2] for record in caplog.records]
    assert reported == ["p.txt:1: --g has no effect on previews", "p.txt:2: --cn has no effect on previews"]


def test_an_option_may_have_an_equals_sign_or_lack_its_value(tmp_path, caplog) -> None:
    (prompt,) = read(tmp_path, "p.txt", "a cat = a pet --w=64 --h= 96 --n=b=c --d")
    assert prompt == Prompt(prompt="a cat = a pet", width=64, height=96, negative_prompt="b=c")
    assert caplog.messages[-1].endswith("p.txt:1: --d has no effect on previews")


def test_a_negative_seed_means_a_new_seed_for_each_preview(tmp_path) -> None:
    """differences.md: Negative seeds of previews."""
    prompts = read(tmp_path, "p.json", '[{"prompt": "a", "seed": -1}, "a --d -1"]')
    assert [prompt.seed for prompt in prompts] == [None, None]


@given(st.text().filter(lambda text: "--" not in text))
def test_a_line_without_options_is_a_prompt(text: str) -> None:
    assert line_values(text) == {"prompt": text.strip()}


def test_any_white_space_may_stand_before_and_after_an_option() -> None:
    assert line_values("a\t--w\t512  --N  b  c ") == {"prompt": "a", "width": "512", "negative_prompt": "b  c"}


def test_file_names_are_golden(golden, tmp_path) -> None:
    now = datetime(2024, 10, 5, 1, 2, 3)
    calls = [call for call in golden("sample_prompts.json")["one_call"] if "files" in call]
    assert len(calls) == 6
    for call in calls:
        name, epoch, step = call["output_name"], call["epoch"], call["steps"]
        files = PreviewFiles(folder=tmp_path, output_name=name, epoch=epoch, step=step, time=now)
        paths = [files.path(index, seed) for index, seed in enumerate([42, None, None, 1])]
        assert all(path.parent == tmp_path for path in paths)
        assert [path.name.replace("20241005010203", "YYYYmmddHHMMSS") for path in paths] == call["files"]
