"""JSON and TOML of any text either have a value or raise ValueError."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_finetune.parsing import parse_json, parse_toml_text

DEEP = 100_000


@pytest.mark.parametrize("text", ["[" * DEEP, '{"a":' * DEEP, "[" * DEEP + "]" * DEEP, "1" * 9999, "{", "", "\ud800"])
def test_json_that_is_damaged_or_nested_without_end_raises_valueerror(text: str) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


@pytest.mark.parametrize(
    "text", ["a = " + "[" * DEEP, "a = " + "{a=" * DEEP, "a = " + "1" * 9999, "a", "a = 1979-99-99"]
)
def test_toml_that_is_damaged_or_nested_without_end_raises_valueerror(text: str) -> None:
    with pytest.raises(ValueError):
        parse_toml_text(text)


@given(st.text(alphabet='[]{}",:=.0123456789eE+-#\n\\u tfn', max_size=60))
def test_no_text_raises_another_exception(text: str) -> None:
    with contextlib.suppress(ValueError):
        parse_json(text)
    with contextlib.suppress(ValueError):
        parse_toml_text(text)
