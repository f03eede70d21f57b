#!/usr/bin/env bash
# Format, lint and types; the same checks as in CI.
set -euo pipefail
cd "$(dirname "$0")/.."
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
