#!/usr/bin/env bash
# Runs the checks that need a GPU and prints a report to paste. docs/gpu.md describes the checks.
#
#   bash scripts/gpu_acceptance.sh [names of checks] [--folder FOLDER] [--cpu]
#
# Needs a machine with an NVIDIA GPU and a fresh clone, and takes about ten minutes. On a CPU it marks the checks that
# need CUDA as not run. The exit status is 1 if a check failed.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
exec .venv/bin/python -m scripts.benchmarks.gpu_acceptance "$@"
