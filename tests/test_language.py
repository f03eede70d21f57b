"""The language rules that a program can check: sentence length, first words of docstrings, number of parameters.

The checks read README.md, docs/*.md, and the docstrings of the package and of scripts/. A sentence may have 30 words.
Code, tables and headings are left out.
"""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = sorted([*(ROOT / "sdxl_finetune").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")])

MAX_WORDS = 30
"""Words in a sentence. Longer ones have to be read twice by readers whose second language is English."""
MAX_PARAMETERS = 8
"""Parameters of a function without self and cls. More of them are a sign that some belong together."""
EXEMPT = {"sdxl.py": "forward"}
"""Functions that may have more parameters, by file name: SDXL.forward receives one tensor for each model input."""
FORBIDDEN_START = re.compile(r"(Of|So|What|Whether|Likewise|The same)\b")
"""First words of a docstring that starts in the middle of a thought."""

LIST_ITEM = re.compile(r"([-*]|\d+\.) ")
RULE = re.compile(r"[-=|: ]+")
CODE_BLOCK = re.compile(r"^( *)```.*?^\1```", re.DOTALL | re.MULTILINE)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
CODE = re.compile(r"`[^`]*`")
LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
SENTENCE_END = re.compile(r"(?<=[.!?])[)\"']*\s+|(?<=[。！？])")


def paragraphs(text: str) -> Iterator[str]:
    """Yields the paragraphs and list items of a text, without headings, tables and indented code."""
    lines: list[str] = []
    for line in text.split("\n"):
        bare = line.strip()
        is_code = line.startswith("    ") and not lines
        is_break = not bare or is_code or bare.startswith(("|", "#")) or RULE.fullmatch(bare)
        if is_break or LIST_ITEM.match(bare):
            yield " ".join(lines)
            lines = []
        if not is_break:
            lines.append(LIST_ITEM.sub("", bare, count=1) if LIST_ITEM.match(bare) else bare)
    yield " ".join(lines)


def sentences(text: str) -> Iterator[str]:
    """Yields the sentences of a text. Inline code counts as one word; of a link only its words count."""
    text = COMMENT.sub("", CODE_BLOCK.sub("", text))
    for paragraph in paragraphs(text):
        yield from SENTENCE_END.split(LINK.sub(r"\1", CODE.sub("code", paragraph)))


def long_sentences(text: str) -> list[str]:
    """Returns the sentences of more than MAX_WORDS words, each after its number of words."""
    counted = [
        (sum(bool(re.search(r"\w", word)) for word in sentence.split()), sentence) for sentence in sentences(text)
    ]
    return [f"{count} words: {sentence}" for count, sentence in counted if count > MAX_WORDS]


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yields line and text of each string that stands alone: docstrings, and descriptions of fields and constants."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, inspect.cleandoc(node.value.value)


def docstring_findings(source: str) -> list[str]:
    """Returns what is wrong with the docstrings of a module, with the line of each docstring."""
    findings = []
    for line, text in docstrings(ast.parse(source)):
        findings += [f"line {line}: {finding}" for finding in long_sentences(text)]
        if FORBIDDEN_START.match(text):
            findings.append(f"line {line}: starts in the middle of a thought: {text.splitlines()[0]}")
    return findings


def parameter_findings(source: str, exempt: str | None = None) -> list[str]:
    """Returns the functions of a module that have more than MAX_PARAMETERS parameters."""
    findings = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name != exempt:
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = sum(argument.arg not in ("self", "cls") for argument in arguments)
            if count > MAX_PARAMETERS:
                findings.append(f"line {node.lineno}: {node.name} has {count} parameters")
    return findings


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_sentences_of_pages_are_short(path: Path) -> None:
    findings = long_sentences(path.read_text(encoding="utf-8"))
    assert not findings, "\n".join(findings)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_docstrings_stand_alone_in_short_sentences(path: Path) -> None:
    findings = docstring_findings(path.read_text(encoding="utf-8"))
    assert not findings, "\n".join(findings)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_functions_have_few_parameters(path: Path) -> None:
    findings = parameter_findings(path.read_text(encoding="utf-8"), EXEMPT.get(path.name))
    assert not findings, "\n".join(findings)


LONG = " ".join(["word"] * (MAX_WORDS + 1))
SHORT = " ".join(["word"] * MAX_WORDS)


@pytest.mark.parametrize("text", [f"{LONG}.", f"Short.\n{LONG}.", f"- {LONG}", f"(Short.) {LONG}"])
def test_a_long_sentence_is_found(text: str) -> None:
    assert len(long_sentences(text)) == 1


@pytest.mark.parametrize(
    "text",
    [
        f"{SHORT}. {SHORT}!",
        f"- {SHORT}\n- {SHORT}\n1. {SHORT}",
        f"{SHORT}\n\n{SHORT}",
        f"# {LONG}",
        f"| {LONG} |",
        f"Short.\n\n```\n{LONG}\n```",
        f"- Item:\n  ```\n  {LONG}\n  ```",
        f"Short.\n\n    {LONG}",
        f"{SHORT[:-4]} `{LONG}`",
        f"{SHORT[:-4]} [word]({LONG})",
        f"<!-- {LONG} -->",
    ],
)
def test_short_sentences_code_tables_and_headings_pass(text: str) -> None:
    assert long_sentences(text) == []


def test_a_docstring_that_starts_in_the_middle_of_a_thought_is_found() -> None:
    source = 'def f():\n    """What the user has to change."""\n\nX = 1\n"""Unit of X."""\n'
    assert docstring_findings(source) == [
        "line 2: starts in the middle of a thought: What the user has to change.",
    ]
    assert len(docstring_findings(f'"""{LONG}."""')) == 1
    assert docstring_findings('"""Offers a value."""') == []  # "Of" counts as a whole word only


def test_a_function_of_many_parameters_is_found() -> None:
    names = [f"p{number}" for number in range(MAX_PARAMETERS + 1)]
    many = f"def f({', '.join(names)}): ..."
    assert parameter_findings(many) == [f"line 1: f has {len(names)} parameters"]
    assert parameter_findings(f"class C:\n    async def f(self, *, {', '.join(names)}): ...") != []
    assert parameter_findings(f"def f({', '.join(names[:-1])}): ...") == []
    assert parameter_findings(many, exempt="f") == []
