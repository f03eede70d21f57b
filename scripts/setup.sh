#!/usr/bin/env bash
# Makes .venv in the repository root if it is missing and installs the package with the versions of
# constraints.txt. `setup.sh dev` adds what the tests need. Sourced or called by the other scripts; does
# nothing, quickly, when all is in place.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=${1:-}
stamp=.venv/.installed${extras:+-$extras}
if [ ! -x .venv/bin/python ]; then
  "${PYTHON:-python3}" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 13))' || {
    echo "Python 3.10, 3.11 or 3.12 is needed (set PYTHON to one)" >&2
    exit 2
  }
  "${PYTHON:-python3}" -m venv .venv
fi
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ constraints.txt -nt "$stamp" ]; then
  # torch first and by its exact version, so that no other package's range chooses one.
  .venv/bin/pip install --quiet --constraint constraints.txt "$(grep '^torch==' constraints.txt)"
  .venv/bin/pip install --quiet --constraint constraints.txt --editable ".${extras:+[$extras]}"
  touch "$stamp"
fi
