"""The page as HTML that loads nothing: the style and the pictures stand in the file.

The HTML is made from the blocks of the Markdown file, so that both say the same. HTML in the text of the page is shown
as text, and the page's Content-Security-Policy forbids all scripts.
"""

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path

from markdown_it import MarkdownIt
from PIL import Image

from sdxl_finetune.card.facts import Language
from sdxl_finetune.card.sections import Block

STYLE = Path(__file__).parent / "page.css"
LANGUAGES: Mapping[Language, tuple[str, str]] = {"en": ("en", "English"), "zh": ("zh-CN", "简体中文")}
"""The code and the name of each language."""
LONGEST_SIDE = 1024
"""Pixels of a picture in the page. The pictures beside the Markdown file keep their size."""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page_html(
    blocks: Sequence[Block], pictures: Mapping[str, Image.Image], language: Language, others: Mapping[Language, str]
) -> str:
    """The HTML text of a page.

    `pictures` are by their paths in the Markdown. `others` are the file names of the pages in other languages.
    """
    parts = []
    for kind, group in groupby(blocks, lambda block: block.kind):
        rendered = [_render(block.text) for block in group]
        if kind == "sample":
            rendered = [f'<div class="sample">\n{text}</div>\n' for text in rendered]
            parts.append(f'<div class="samples">\n{"".join(rendered)}</div>\n')
        else:
            parts += rendered
    body = "".join(parts)
    for path, picture in pictures.items():
        body = body.replace(f'src="{path}"', f'src="{_data_url(picture)}"')
    title = re.sub(r"<[^<>]*>", "", _render(blocks[0].text)).strip()
    code = LANGUAGES[language][0]
    links = " · ".join(
        f'<a href="{html.escape(name)}" hreflang="{LANGUAGES[one][0]}">{LANGUAGES[one][1]}</a>'
        for one, name in others.items()
    )
    return (
        f'<!doctype html>\n<html lang="{code}">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{title}</title>\n<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n<main>\n"
        f"{f'<nav>{links}</nav>' if links else ''}\n{body}</main>\n</body>\n</html>\n"
    )


@cache
def _parser() -> MarkdownIt:
    return MarkdownIt("commonmark", {"html": False}).enable("table")


def _render(text: str) -> str:
    """HTML of a block. Wide tables scroll by themselves, and open fields are marked."""
    rendered = str(_parser().render(text))
    rendered = rendered.replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>")
    for start, end in (("<strong>(to be filled", ")</strong>"), ("<strong>待作者填写", "</strong>")):
        before, *rest = rendered.split(start)
        marked = [f"<mark>{start}{part.replace(end, f'{end}</mark>', 1)}" for part in rest]
        rendered = "".join([before, *marked])
    return rendered


@cache
def _encoded(content: bytes, size: tuple[int, int]) -> str:
    picture = Image.frombytes("RGB", size, content)
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    data = io.BytesIO()
    picture.save(data, "WEBP", quality=90)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"


def _data_url(picture: Image.Image) -> str:
    """The picture in the page, smaller and compressed."""
    rgb = picture.convert("RGB")
    return _encoded(rgb.tobytes(), rgb.size)
