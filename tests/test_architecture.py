"""The layout keeps: layers, no cycles, sizes, no stubs, nothing heavy where --help passes."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sdxl_finetune"
FILES = sorted(PACKAGE.rglob("*.py"))
LAYERS = [
    {
        "errors",
        "files",
        "progress",
        "seeding",
        "low_bits",
        "clip_vocabulary",
        "storage",
        "parsing",
        "redaction",
        "printable",
    },
    {"batch", "config"},
    {"data", "diffusion", "model", "optim", "runtime"},
    {"latents"},
    {"output", "pages"},
    {"report"},
    {"tag_report"},
    {"training", "card"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MAY_SHARE = {"errors", "files", "progress", "storage", "seeding", "low_bits", "batch", "config", "parsing", "redaction"}
MAY_SHARE |= {"printable"}
"""Lower layers whose members may import one another."""
MAX_FILE, MAX_FUNCTION, MAX_PACKAGE, MAX_TRAIN = 400, 60, 27000, 120


def module_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """The parts of this package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            names = [node.module or ""]
            if node.module == "sdxl_finetune":
                names = [f"sdxl_finetune.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("sdxl_finetune.")}
    return found - {"__version__", "OFFLINE_BY_DEFAULT"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    own = module_of(path)
    if own == "__init__":
        return
    for other in imports(path) - {own}:
        below = LEVEL[other] < LEVEL[own]
        assert below or {own, other} <= MAY_SHARE, f"{own} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_sizes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno + 1 <= MAX_FUNCTION, node.name
    assert not re.search(r"\b(TODO|FIXME|XXX|NotImplementedError)\b", text)


def code_lines(path: Path) -> int:
    """Lines with code on them: no docstrings, comments and empty lines, of which there cannot be too many."""
    text = path.read_text(encoding="utf-8")
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings |= set(range(node.lineno, node.end_lineno + 1))
    empty = {tokenize.NL, tokenize.NEWLINE, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in empty:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - docstrings)


def test_package_size() -> None:
    lines = {path: code_lines(path) for path in FILES}
    assert sum(lines.values()) <= MAX_PACKAGE
    assert lines[PACKAGE / "training" / "loop.py"] <= MAX_TRAIN


@pytest.mark.parametrize("module", ["cli", "config", "errors"])
def test_starts_without_heavy_imports(module: str) -> None:
    heavy = "{'torch', 'numpy', 'diffusers', 'transformers', 'accelerate', 'pyarrow', 'cv2', 'PIL', 'obstore'}"
    code = f"import sys, sdxl_finetune.{module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
