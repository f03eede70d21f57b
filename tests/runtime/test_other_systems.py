"""The programs run on a system that is not POSIX. Windows is imitated for this package, its children included."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdxl_finetune.commands.model import main as model_tool
from sdxl_finetune.runtime import host

ROOT = Path(__file__).parents[2]
IMITATION = '''
import builtins, os, signal, sys, types

HIDDEN_MODULES = {"resource", "fcntl", "pwd", "grp", "termios", "posix", "_posixshmem", "syslog", "tty", "pty"}
HIDDEN = {
    "os": {"sysconf", "memfd_create", "fork", "register_at_fork", "sched_getaffinity", "getuid", "geteuid", "statvfs",
           "fchmod", "mkfifo", "killpg", "getpgid", "setsid", "kill", "uname", "nice", "pread", "getloadavg"},
    "signal": {"pthread_sigmask", "SIGKILL", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGALRM", "sigwait", "alarm"},
}


def partly(module):
    """A module without the names that Windows does not have."""
    seen = types.ModuleType(module.__name__)
    hidden = HIDDEN[module.__name__]
    seen.__dict__.update({key: value for key, value in vars(module).items() if key not in hidden})
    if module is os:
        seen.name = "nt"
    return seen


SEEN = {"os": partly(os), "signal": partly(signal)}
real_import = builtins.__import__


def import_as_on_windows(name, globals=None, locals=None, fromlist=(), level=0):
    if str((globals or {}).get("__name__", "")).startswith("sdxl_finetune"):
        if name.partition(".")[0] in HIDDEN_MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name in SEEN:
            return SEEN[name]
    return real_import(name, globals, locals, fromlist, level)


builtins.__import__ = import_as_on_windows


def refuse_mapped(function):
    """Windows neither replaces nor removes a file that a process has mapped."""
    def checked(*paths, **options):
        for path in paths:
            full = os.path.abspath(os.fspath(path))
            with open("/proc/self/maps", errors="surrogateescape") as maps:
                if any(line.rstrip().endswith(full) for line in maps):
                    raise PermissionError(13, "a mapped file cannot be changed", full)
        return function(*paths, **options)
    return checked


for name in ("replace", "rename", "unlink", "remove"):
    setattr(os, name, refuse_mapped(getattr(os, name)))
'''


@pytest.fixture
def run(tmp_path: Path):
    """run(program, *options): the output of a program on the imitated system. Fails the test for a status above 0."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(IMITATION, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{ROOT}", "PYTHONIOENCODING": "cp1252"}

    def run_program(program: str, *options: str, status: int = 0) -> str:
        command = [sys.executable, "-c", f"from sdxl_finetune import cli; cli.{program}()", *options]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, encoding="cp1252")
        assert done.returncode == status, done.stdout + done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout + done.stderr

    return run_program


def test_check_cache_and_train_need_nothing_of_posix(run, tmp_path: Path, write_images) -> None:
    model_tool(["init", str(tmp_path / "base.safetensors"), "--preset", "tiny"])
    write_images(tmp_path / "絵" / "1_cat", {f"{number}.png": (64, 64) for number in range(3)})
    options = ["--pretrained_model_name_or_path", "base.safetensors", "--train_data_dir", "絵", "--output_dir", "出力"]
    options += ["--resolution", "64", "--max_train_steps", "2", "--seed", "1", "--save_state", "--logging_dir", "logs"]
    options += ["--cache_latents"]
    said = run("check", *options, "--no_memory")
    assert "none found" in said and r"free in \u51fa\u529b" in said, "letters that the console lacks are escaped"
    run("cache", *options, "--cache_latents_to_disk")
    write_images(tmp_path / "絵" / "1_cat", {"new.png": (64, 64)}, seed=7)  # the last scan is replaced
    run("cache", *options, "--cache_latents_to_disk")
    run("train", *options, "--max_data_loader_n_workers", "1")  # latents in memory, and a worker that is spawned
    assert (tmp_path / "出力" / "last.safetensors").exists() and (tmp_path / "出力" / "last-state").is_dir()
    again = run("train", *options, "--max_train_steps", "3", "--resume", "auto", "--cache_latents_to_disk")
    assert "resuming after step 2" in again


def test_memory_of_the_machine_and_of_this_process() -> None:
    assert 1 << 28 < host.peak_memory_bytes() < host.memory_bytes() < 1 << 50
