"""The release page shows the texts of a foreign model letter for letter. No value of its metadata ends the program."""

import io
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from PIL import Image, PngImagePlugin

from sdxl_finetune.card.escaping import escape
from sdxl_finetune.card.samples import load_samples
from sdxl_finetune.card.text import code, code_block
from sdxl_finetune.errors import UserError
from sdxl_finetune.output.stages import stages_of
from tests.card.test_card import rows, with_metadata, write_card

HOSTILE = [
    "<script>alert(1)</script>",
    '<img src=x onerror="alert(2)">',
    "[click](javascript:alert(3))",
    "![a](http://host/pixel.png)",
    "<javascript:alert(4)>",
    "| a | b |",
    "a\n| b | c |\n| --- | --- |\n\n# heading",
    "&lt;b&gt; &#60;i&#62;",
    "_a_ __b__ *c* **d** ~~e~~ $f$",
    "`code` ```` fence",
    "- item", "+ item", "* item", "1. item", "23) item", "# heading #", "> quote", "===", "---", "    indented",
    "[a]: http://host", "a\\", "\\| a", "x\x1b[2J\x07 \u202eevil \udcff \x00",
    "style_v2.0_final (bf16), 50% of https://host/a_b?c=d&e=f",
]  # fmt: skip


class Text(HTMLParser):
    """The text of HTML, and the names of its elements."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.tags = "", []
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)


def shown(value: str) -> str:
    """The text that a reader sees: in one line, with visible control characters."""
    line = " ".join(value.split())
    for letter in "\x1b\x07\x00":
        line = line.replace(letter, f"\\x{ord(letter):02x}")
    return line.replace("\u202e", "\\u202e").replace("\udcff", "\\udcff")


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize(("layout", "elements"), [("# {}", ["h1"]), ("{}", ["p"]), ("- {}", ["ul", "li"])])
def test_escaped_text_is_the_text_that_is_shown(value: str, layout: str, elements: list[str]) -> None:
    page = Text(MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(layout.format(escape(value))))
    assert (page.text.strip(), page.tags) == (shown(value), elements)


@pytest.mark.parametrize("value", HOSTILE)
def test_escaped_text_stays_in_its_cell_of_a_table(value: str) -> None:
    table = f"| a | b |\n| --- | --- |\n| x | {escape(value)} |"
    page = Text(MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(table))
    assert page.tags == ["table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td"]
    assert shown(value) in page.text


def test_plain_text_is_not_changed() -> None:
    for text in ("Anime Style XL", "style_v2.0-final (bf16)", "图 & 文".replace("& ", ""), "CC BY-NC 4.0, 50 %!"):
        assert escape(text) == text


@pytest.mark.parametrize("value", HOSTILE)
def test_code_holds_no_control_characters(value: str) -> None:
    for text in (code(value), code_block(value)):
        assert "\x1b" not in text and "\u202e" not in text
        text.encode("utf-8")


def test_the_page_shows_metadata_as_text(base: Path, tmp_path: Path) -> None:
    names = ("title", "author", "license", "description", "usage_hint", "trigger_phrase", "resolution", "merged_from")
    said = {f"modelspec.{name}": f"{name} {HOSTILE[0]} {HOSTILE[2]} | x |\n\n# {name}" for name in names}
    stage = {"name": f"s {HOSTILE[1]} | y |", "seconds": {f"gpu {HOSTILE[2]}": 7200.0}, "steps": 3, "base": {}}
    stage["base"] = {name: f"base {name} {HOSTILE[0]}" for name in ("name", "author", "license")}
    said["sdxl_finetune.stages"] = json.dumps([stage])
    said["sdxl_finetune.config"] = json.dumps({"max_token_length": HOSTILE[1], "quality_tags": "a <b>, c"})
    model = with_metadata(base, tmp_path / "m [x](javascript:y) <b>.safetensors", said)
    files = write_card(model, tmp_path / "card")
    for name in ("card.md", "card.zh-CN.md"):
        page = Text(MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(files[name]))
        allowed = {"h1", "h2", "h3", "p", "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "code", "pre"}
        assert set(page.tags) <= allowed | {"strong", "em"}
        assert page.tags.count("h1") == 1
        for each in names:
            assert f"{each} {HOSTILE[0]} {HOSTILE[2]} | x | # {each}" in page.text, each
        assert f"s {HOSTILE[1]} | y |" in page.text and f"gpu {HOSTILE[2]}" in page.text
        assert f"base license {HOSTILE[0]}" in page.text
        html = files[name.replace(".md", ".html")]
        assert "<script" not in html and "<img" not in html and "<b>" not in html and 'href="javascript' not in html
        title = html.partition("<title>")[2].partition("</title>")[0]
        assert title == f"title {HOSTILE[0]} {HOSTILE[2]} | x | # title".replace("<", "&lt;").replace(">", "&gt;")
    assert any(len(row) == 6 and "2 h" in row for row in rows(files["card.md"].replace("\\|", "")))


def test_an_open_field_names_the_stage_as_it_was_recorded(base: Path, tmp_path: Path, capsys) -> None:
    """The author copies the name into the file of --facts."""
    said = {"sdxl_finetune.stages": json.dumps([{"name": "a*b_[c]", "steps": 3}])}
    model = with_metadata(base, tmp_path / "m.safetensors", said)
    assert "a\\*b\\_\\[c\\]" in write_card(model, tmp_path / "card")["card.md"].replace("b_", "b\\_")
    assert '[[stages]] table with name = "a*b_[c]"' in capsys.readouterr().out
    (tmp_path / "facts.toml").write_text('[[stages]]\nname = "a*b_[c]"\nhours = 4\nhardware = "A40"\n')
    text = write_card(model, tmp_path / "other", "--facts", str(tmp_path / "facts.toml"))["card.md"]
    assert ["a*b_[c]", "A40", "4 h", "", "", "3"] in rows(text)


@pytest.mark.parametrize(
    "said",
    [
        {"sdxl_finetune.config": "[" * 100_000},
        {"sdxl_finetune.config": '[["max_token_length", 75], [1, 2]]'},
        {"sdxl_finetune.config": json.dumps({"quality_tags": "a, b, a", "enable_bucket": [], "x\ny": {"a": [None]}})},
        {"sdxl_finetune.config": json.dumps({"seed": None, "a": [[["b"]]], "use_zero_cond": [], "flow_model": 7})},
        {"sdxl_finetune.stages": "[" * 100_000},
        {"sdxl_finetune.stages": '[{"seconds": {"a": 1e999}, "epochs": 1e999, "tags": {"x": 3, "1": 2}}]'},
        {"sdxl_finetune.stages": '[{"seconds": {"a": NaN}, "epochs": NaN, "steps": -5, "images": -1}]'},
        {"sdxl_finetune.step": "inf", "sdxl_finetune.epoch": "nan"},
        {"sdxl_finetune.step": "9" * 5000, "sdxl_finetune.epoch": "9" * 5000},
        {"ss_steps": "1e999", "ss_training_started_at": "1e300", "ss_training_finished_at": "nan"},
        {"ss_training_started_at": "-1e15", "ss_training_finished_at": "1e18", "ss_num_epochs": "inf"},
        {"sdxl_finetune.latents": "[" * 100_000},
        {"sdxl_finetune.latents": '{"channels": 1e999}'},
    ],
)
def test_impossible_metadata_ends_in_a_page_or_one_message(base: Path, tmp_path: Path, said: dict[str, str]) -> None:
    stages_of(said)
    try:
        files = write_card(with_metadata(base, tmp_path / "m.safetensors", said), tmp_path / "card")
        assert files["card.md"].startswith("# m\n")
    except UserError as error:
        assert "m.safetensors" in str(error)


def test_pictures_that_are_no_pictures_are_named(tmp_path: Path) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", "a" * (1 << 23), zip=True)
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "PNG", pnginfo=text)
    large = bytearray(data.getvalue())
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    for number, content in enumerate((b"", b"no picture", bytes(large), eps, bytes(large[:60]))):
        path = tmp_path / f"{number}.png"
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{number}\.png.*the picture cannot be read"):
            load_samples([path])
