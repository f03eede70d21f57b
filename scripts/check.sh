#!/usr/bin/env bash
# Checks the format, the code style and the types. Continuous integration runs the same checks.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ ! -x .venv/bin/mypy ]; then
  echo "check.sh: .venv contains no mypy. Run first: bash scripts/setup.sh dev" >&2
  exit 2
fi
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
