#!/usr/bin/env bash
# Set-up, scripts/check.sh, then every test. Arguments go to pytest: scripts/test.sh tests/data -k crop
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh dev
bash scripts/check.sh
.venv/bin/python -m pytest -n auto --dist worksteal "$@"
