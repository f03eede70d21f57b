"""Runs a Python program of its own for a check, with its output on the terminal."""

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence

LONGEST = 600
"""Seconds after which a program is ended."""


def run_python(command: Sequence[str], *, cpu: bool) -> str:
    """Runs a Python program, shows its output on the terminal as it comes, and returns it.

    Raises RuntimeError with the last line of its messages if it fails, or if it has not ended after LONGEST seconds.
    """
    environment = {**os.environ, **({"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"} if cpu else {})}
    lines, late = [], threading.Event()
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as messages,
        subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, stderr=messages, text=True, env=environment
        ) as process,
    ):

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(LONGEST, end)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                print(line, end="", file=sys.stderr, flush=True)
            status = process.wait()
        finally:
            timer.cancel()
        if status:
            messages.seek(0)
            said = messages.read()
            print(said, file=sys.stderr)
            errors = [line for line in said.splitlines() if line.startswith("error: ")] or said.splitlines()
            how = f"not ended after {LONGEST} seconds" if late.is_set() else f"status {status}"
            raise RuntimeError(f"{how}: {errors[-1] if errors else 'no message'}")
    return "".join(lines)
