#!/usr/bin/env bash
# Installs the package and the versions of constraints.txt into .venv in the repository root.
#
#   bash scripts/setup.sh        for training
#   bash scripts/setup.sh dev    for training and for the tests
#
# Needs Python 3.10 to 3.14. PYTHON names another interpreter than python3: PYTHON=python3.12 bash scripts/setup.sh.
# Does nothing if .venv is up to date. The other scripts call it first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=${1:-}
stamp=.venv/.installed${extras:+-$extras}
python=${PYTHON:-python3}

# Prints the arguments, one on each line, and ends the set-up.
stop() {
  printf '%s\n' "$@" >&2
  exit 2
}

check_python() {
  command -v "$python" > /dev/null || stop \
    "setup.sh: no program named $python was found. Python 3.10 to 3.14 is needed." \
    "Install Python, or name the interpreter: PYTHON=/path/to/python3.12 bash scripts/setup.sh"
  "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' || stop \
    "setup.sh: $python is $("$python" --version 2>&1). Python 3.10 to 3.14 is needed." \
    "Name another interpreter: PYTHON=python3.12 bash scripts/setup.sh"
}

if [ ! -e .venv ]; then
  check_python
  echo "setup.sh: creating .venv with $("$python" --version)"
  "$python" -m venv .venv || {
    rm -rf .venv
    stop "setup.sh: $python could not create .venv. The message above says why." \
      "If it names ensurepip, install your system's venv package (Debian and Ubuntu: apt install python3-venv)."
  }
fi
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ constraints.txt -nt "$stamp" ]; then
  .venv/bin/python -m pip --version > /dev/null 2>&1 || stop \
    "setup.sh: .venv does not work: its Python is gone or has no pip." \
    "Remove the folder .venv and run this script again."
  echo "setup.sh: installing into .venv. The first time this downloads several GB and takes some minutes."
  # --quiet twice hides pip's warnings and progress; errors are still printed.
  install=(.venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt)
  # torch first and by its exact version, so that no other package's range chooses another one.
  "${install[@]}" "$(grep '^torch==' constraints.txt)"
  "${install[@]}" --editable ".${extras:+[$extras]}"
  touch "$stamp"
fi
