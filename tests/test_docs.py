"""The documentation names only what exists: files, tests, links, anchors and commands.

The pages are README.md in both languages, CHANGELOG.md, every page in docs/ and the README files in tests/.
"""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("README*.md"), ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md"), *ROOT.glob("tests/**/README.md")]
)
DIFFERENCES = ROOT / "docs" / "differences.md"
FIELDS = ("The reference", "Here", "Why", "Golden values", "Test")
"""The fields of an entry of docs/differences.md, in their order. Only "Golden values" may be missing."""
TEST = re.compile(r"\btests/[\w/]+\.py(?:::(\w+))?")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
MODULE = re.compile(r"-m (scripts(?:\.\w+)+)")
FILE = re.compile(r"(?<![\w./])((?:scripts|configs|sdxl_finetune|tests|docs)/[\w./-]*\w)(?![\w*])")


def page_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def without_code_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def headings(text: str) -> list[str]:
    return re.findall(r"^#+ (.*\S)", without_code_blocks(text), re.MULTILINE)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page: a repeated one is numbered."""
    slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings(text)]
    seen: Counter[str] = Counter()
    found = set()
    for slug in slugs:
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_point_to_existing_files_and_headings(page: Path) -> None:
    for target in LINK.findall(without_code_blocks(page.read_text(encoding="utf-8"))):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"the link {target}: no such file"
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), f"the link {target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_named_tests_exist(page: Path) -> None:
    for match in TEST.finditer(page.read_text(encoding="utf-8")):
        path = ROOT / match.group().partition("::")[0]
        assert path.is_file(), f"{match.group()}: no such file"
        if function := match.group(1):
            assert f"def {function}(" in path.read_text(encoding="utf-8"), f"{match.group()}: no such test"


CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands(block: re.Match[str]) -> str:
    """The commands of a console block, without what they printed."""
    return "\n".join(line for line in block.group(1).splitlines() if line.startswith("$ "))


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_named_scripts_and_files_exist(page: Path) -> None:
    text = CONSOLE.sub(commands, page.read_text(encoding="utf-8"))
    for module in MODULE.findall(text):
        if module.endswith(".NAME"):  # stands for any benchmark
            continue
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), f"python -m {module}: no such module"
    for name in FILE.findall(text):
        assert (ROOT / name).exists() or (page.parent / name).exists(), f"{name}: no such file or folder"


def entries() -> list[tuple[str, str]]:
    """Heading and text of each entry of docs/differences.md."""
    parts = re.split(r"^### (.*)\n", re.sub(r"^## .*\n", "", DIFFERENCES.read_text("utf-8"), flags=re.M), flags=re.M)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def test_every_difference_is_in_the_table_of_contents() -> None:
    text = DIFFERENCES.read_text(encoding="utf-8")
    listed = re.findall(r"^ *- \[(.*)\]\(#", text, re.MULTILINE)
    assert listed == headings(text)[2:], "the table of contents must list every heading, in the same order"


@pytest.mark.parametrize(("heading", "text"), entries(), ids=[heading for heading, _ in entries()])
def test_every_difference_has_the_same_fields(heading: str, text: str) -> None:
    fields = re.findall(r"^- \*\*(.*?):\*\*", text, re.MULTILINE)
    assert fields in (list(FIELDS), [field for field in FIELDS if field != "Golden values"])
