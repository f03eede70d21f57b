#!/usr/bin/env bash
# Sets up .venv, runs scripts/check.sh, then all tests. Continuous integration runs this script.
# Arguments go to pytest and choose tests, for example: bash scripts/test.sh tests/data -k crop
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh dev
bash scripts/check.sh
.venv/bin/python -m pytest -n auto --dist worksteal "$@"
