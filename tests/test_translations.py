"""The Chinese pages say the same as the English ones: same headings, code, options, links, lists and figures.

The test cannot read Chinese. It finds what was added, removed or changed on one page and not on the other.
"""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAIRS = {"README.md": "README.zh-CN.md", "docs/guide.md": "docs/guide.zh-CN.md"}
SWITCH = re.compile(r"^\[(简体中文|English)\]\((\S+)\)\n\n", re.MULTILINE)
BLOCK = re.compile(r"^( *)```\w*\n.*?^\1```", re.DOTALL | re.MULTILINE)
FIGURE = re.compile(r"(?<![\w.])\d+(?:[.,]\d+)*(?![\w])")
NOT_FIGURES = re.compile(r"\]\([^)]*\)|`[^`]*`|(?:float|SHA-|CLIP-)\d+")
"""Parts of a text whose numbers are not counted: targets of links, code and names."""


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str) -> list[str]:
    """Code blocks without the comments in them, which may be translated."""
    return [re.sub(r" +# .*", "", block[0]) for block in BLOCK.finditer(text)]


def prose(text: str) -> str:
    """The text without code blocks and without the link to the other language."""
    return SWITCH.sub("", BLOCK.sub("", text))


def structure(text: str) -> dict[str, object]:
    """Everything that must be equal, by a name that says what differs."""
    text = prose(text)
    targets = [target.partition("#") for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    return {
        "headings": re.findall(r"^#+(?= )", text, re.MULTILINE),
        "code in the text": Counter(re.findall(r"`[^`]+`", text)),
        "links": Counter(name.replace(".zh-CN", "") + mark for name, mark, _ in targets),
        "pictures": re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text),
        "list items": re.findall(r"^ *(?:-|\d+\.)(?= )", text, re.MULTILINE),
        "columns of table rows": [line.count("|") for line in text.splitlines() if line.startswith("|")],
        "notes": len(re.findall(r"^> \*\*", text, re.MULTILINE)),
        "figures": Counter(
            FIGURE.findall(re.sub(r"(?<=[^\x00-\x7f])(?=\d)|(?<=\d)(?=[^\x00-\x7f])", " ", NOT_FIGURES.sub(" ", text)))
        ),
    }


@pytest.mark.parametrize(("english", "chinese"), PAIRS.items(), ids=list(PAIRS))
def test_pages_have_the_same_content(english: str, chinese: str) -> None:
    wanted, found = structure(read(english)), structure(read(chinese))
    for name in wanted:
        assert found[name] == wanted[name], f"{chinese}: {name}"


@pytest.mark.parametrize(("english", "chinese"), PAIRS.items(), ids=list(PAIRS))
def test_pages_have_the_same_code(english: str, chinese: str) -> None:
    assert blocks(read(chinese)) == blocks(read(english))


@pytest.mark.parametrize(("english", "chinese"), PAIRS.items(), ids=list(PAIRS))
def test_pages_link_to_each_other_at_the_top(english: str, chinese: str) -> None:
    for page, other in ((english, chinese), (chinese, english)):
        (link,) = SWITCH.finditer(read(page))
        assert link[2] == Path(other).name and read(page)[: link.start()].count("\n") == 2


def test_every_paragraph_of_a_chinese_page_is_chinese() -> None:
    """An English paragraph that was copied and not translated is found."""
    for chinese in PAIRS.values():
        for paragraph in re.split(r"\n\s*\n", prose(read(chinese))):
            is_text = re.search(
                r"[A-Za-z]{3,} [A-Za-z]{3,} [A-Za-z]{3,} [A-Za-z]{3,}", re.sub(r"`[^`]*`", "", paragraph)
            )
            assert not is_text or re.search(r"[\u4e00-\u9fff]", paragraph), f"{chinese}: {paragraph[:80]}"


def test_a_difference_is_found() -> None:
    text = read("README.md")
    for old, new, name in (
        ("20.2 GiB", "21.2 GiB", "figures"),
        ("`save_state`", "`save_states`", "code in the text"),
        ("](docs/gpu.md)", "](docs/resume.md)", "links"),
        ("\n## Licence", "\n### Licence", "headings"),
        ("| [gpu](docs/gpu.md) | the first run on a GPU |\n", "", "columns of table rows"),
    ):
        assert old in text and structure(text.replace(old, new))[name] != structure(text)[name]
    changed = text.replace("--resume auto\n", "--resume automatic\n")
    assert blocks(changed) != blocks(text)
