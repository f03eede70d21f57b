#!/usr/bin/env bash
# Checks in about ten minutes on any NVIDIA machine, from a fresh clone, what only a GPU can show, and prints a report
# to paste: docs/gpu.md. Runs on a CPU too, with what needs CUDA marked as not run. Exit status 1 if a check failed.
# Arguments go to scripts/benchmarks/gpu_acceptance.py: names of checks, --folder FOLDER, --cpu.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
exec .venv/bin/python -m scripts.benchmarks.gpu_acceptance "$@"
