"""Runs every command of docs/guide.md in its order.

    python -m scripts.toy.guide            prints what the commands print
    python -m scripts.toy.guide --write    also writes their output into docs/guide.md and its translation

Blocks that start with a comment such as `# guide/my.toml` are saved as that file. The folder `guide` is made anew.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "guide.md"
CHINESE = GUIDE.with_name("guide.zh-CN.md")
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```(console|toml|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOISE = re.compile(r"^(Failed to load CPU gemm|.*: UserWarning|\s+warnings\.warn).*\n?", re.MULTILINE)
"""Lines that libraries print and that say nothing about this program."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--write", action="store_true", help="write the output into docs/guide.md and docs/guide.zh-CN.md"
    )
    arguments = parser.parse_args()
    shutil.rmtree(ROOT / "guide", ignore_errors=True)
    text = BLOCK.sub(run_block, GUIDE.read_text(encoding="utf-8"))
    if arguments.write:
        GUIDE.write_text(text, encoding="utf-8")
        CHINESE.write_text(with_blocks(CHINESE.read_text(encoding="utf-8"), text), encoding="utf-8")


def with_blocks(page: str, source: str) -> str:
    """The page with the code blocks of another page, which has as many of them, in their order."""
    blocks = iter(FENCED.findall(source))
    return FENCED.sub(lambda _: next(blocks), page)


def run_block(block: re.Match[str]) -> str:
    """Saves a file or runs the commands of one block; returns the block with the new output."""
    kind, content = block.groups()
    if kind != "console":
        path = ROOT / content.splitlines()[0].removeprefix("# ")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content.partition("\n")[2], encoding="utf-8")
        return block.group()
    lines = [line for command in commands(content) for line in (f"$ {command}", *output_of(command))]
    return "\n".join(["```console", *lines, "```"])


def commands(content: str) -> Iterator[str]:
    """The commands of a block, without the `$` before them and the output below them."""
    yield from (line.removeprefix("$ ") for line in content.splitlines() if line.startswith("$ "))


def output_of(command: str) -> list[str]:
    """Runs a command in the repository's root; returns the lines that a terminal shows at its end.

    The programs of this Python are on PATH, as after `source .venv/bin/activate`.
    """
    environment = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    print(f"$ {command}", flush=True)
    done = subprocess.run(
        command,
        shell=True,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    # A progress bar is redrawn after each carriage return, so only the last text of a line stays.
    lines = [line.rstrip().rpartition("\r")[2].rstrip() for line in NOISE.sub("", done.stdout).split("\n")]
    lines = [line for line in lines if line]
    print("\n".join(lines), flush=True)
    if done.returncode not in (0, 124, 130):  # 124: ended by `timeout`
        sys.exit(f"the command ended with exit status {done.returncode}")
    return lines


if __name__ == "__main__":
    main()
