"""Control characters of file names, captions and metadata reach no terminal."""

import io
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from sdxl_finetune.config import Config
from sdxl_finetune.errors import Problem
from sdxl_finetune.output.console import console
from sdxl_finetune.printable import CONTROL, PrintableFormatter, PrintableMessages, PrintableStream, printable
from sdxl_finetune.progress import Progress

HOSTILE = "a\x1b[2J\x1b]0;title\x07b\r\nerror: c\x9b31m\u202ed\udcff"
SHOWN = r"a\x1b[2J\x1b]0;title\x07b\r\nerror: c\x9b31m\u202ed\udcff"


def assert_harmless(text: str) -> None:
    assert not CONTROL.search(text.replace("\n", "").replace("\t", "")), ascii(text)


def test_a_value_is_one_line_of_visible_characters() -> None:
    assert printable(HOSTILE) == SHOWN
    assert printable("Zürich 図 🙂, a\\b") == "Zürich 図 🙂, a\\b"
    assert printable("abcdef", 4) == "abc…" and printable("\n\n", 4) == r"\n\n"


def test_a_problem_is_cut_after_its_control_characters_are_visible() -> None:
    assert str(Problem("is wrong", file=HOSTILE)) == f"{SHOWN}: is wrong"
    text = str(Problem("\x1b" * 3000, file="a"))
    assert len(text) < 4100 and "…" in text and text.startswith(r"a: \x1b")


@pytest.mark.parametrize(
    ("message", "arguments", "shown"),
    [
        ("%s: %d files in %s", (HOSTILE, 3, Path("x\ny")), rf"{SHOWN}: 3 files in x\ny"),
        ("%s", ("first\n\tsecond \x1b[2J",), "first\n\tsecond \\x1b[2J"),
        ("%s is skipped:\n%s", ("a\nb", "c\nd"), "a\\nb is skipped:\nc\nd"),
        ("no arguments \x1b[2J\nsecond line", (), "no arguments \\x1b[2J\nsecond line"),
    ],
)
def test_the_arguments_of_a_log_message_stay_in_their_line(message: str, arguments: tuple, shown: str) -> None:
    record = logging.LogRecord("a", logging.INFO, "a.py", 1, message, arguments, None)
    assert PrintableFormatter().format(record) == shown
    assert record.args == arguments, "other handlers have the record as it was"


def test_messages_and_tracebacks_of_a_run_hold_no_control_characters(tmp_path: Path) -> None:
    logger = logging.getLogger("sdxl_finetune.test")
    with console(Config(console_log_file=tmp_path / "log.txt"), 0):
        logger.warning("%s cannot be read", HOSTILE)
        try:
            raise ValueError(HOSTILE)
        except ValueError:
            logger.exception("it failed")
    text = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert_harmless(text)
    assert f"WARNING {SHOWN} cannot be read\n" in text and "\nValueError: a\\x1b[2J" in text


def test_cursor_movements_and_colours_of_libraries_stay_in_stderr_and_nothing_else() -> None:
    stdout, stderr = io.StringIO(), io.StringIO()
    print("a\tb\r\x1b[1mc\x1b[A", file=PrintableStream(stdout))
    assert stdout.getvalue() == "a\tb\\r\\x1b[1mc\\x1b[A\n"
    stream = PrintableMessages(stderr)
    stream.writelines(["\x1b[1;35mbold\x1b[0m \x1b[8mhidden \x1b[40mblack\x1b[m\x1b[Aup\rstart\n"])
    expected = "\x1b[1;35mbold\x1b[0m \\x1b[8mhidden \\x1b[40mblack\x1b[m\\x1b[Aup\\rstart\n"
    assert stderr.getvalue() == expected


class Recorded(PrintableMessages):
    """Also remembers what it was given."""

    given = ""

    def write(self, text: str) -> int:
        self.given += text
        return super().write(text)


def test_progress_bars_in_several_lines_reach_stderr_as_they_are() -> None:
    stderr = io.StringIO()
    stream = Recorded(stderr)
    bars = [tqdm(range(3), desc=f"bar {place}", file=stream, mininterval=0, position=place) for place in range(2)]
    for bar in bars:
        bar.update(2)
        tqdm.write("a message", file=stream)
        bar.close()
    assert stderr.getvalue() == stream.given
    assert all(text in stream.given for text in ("\x1b[A", "a message", "bar 1"))


def test_the_label_of_a_progress_bar_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    Progress(HOSTILE, 3, "images").close()
    assert SHOWN.encode("utf-8", "backslashreplace").decode() in terminal.getvalue()


@pytest.mark.parametrize("wrong", [False, True])
def test_a_program_shows_no_control_characters_of_a_foreign_model(tmp_path: Path, wrong: bool) -> None:
    """Name, metadata and names of tensors come from the file."""
    model = tmp_path / "m\x1b[2J\nerror: b.safetensors"
    metadata = {f"k\x1b{number}\n": "v\x1b]0;t\x07\r\nerror: c" for number in range(2)}
    name = "lora_te1\x1b[2J.lora_up.weight" if not wrong else "model.diffusion_model.\x1b[2J"
    save_file({name: torch.ones(1, 1)}, tmp_path / "m.safetensors", metadata)
    (tmp_path / "m.safetensors").rename(model)
    command = [sys.executable, "-c", "from sdxl_finetune.cli import model; model()", "info", str(model)]
    if wrong:
        command[3:] = ["generate", str(model), "--prompt", "a\x1b[2J"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True)
    told = (done.stdout + done.stderr).decode()
    assert done.returncode == (2 if wrong else 0), told
    assert_harmless(told)
    assert r"m\x1b[2J\nerror: b.safetensors: " in told and "Traceback" not in told
    assert not any(line.startswith(("error: b", "error: c")) for line in told.splitlines())
    assert wrong or r"metadata k\x1b1\n: v\x1b]0;t\x07\r\nerror: c" in told
