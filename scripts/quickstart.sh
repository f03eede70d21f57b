#!/usr/bin/env bash
# From nothing to a trained checkpoint: sets up .venv, makes a small random SDXL, takes a few photographs that the
# scikit-image package ships, trains a few epochs and says where everything lies. Writes only to ./quickstart.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh quickstart

mkdir -p quickstart
[ -e quickstart/model.safetensors ] || .venv/bin/sdxl-model init quickstart/model.safetensors
.venv/bin/python scripts/photos.py quickstart/photos
cat > quickstart/prompts.txt <<'PROMPTS'
masterpiece, photo, cat, tabby, close-up --w 128 --h 128 --s 12 --l 5 --d 1
masterpiece, photo, rocket, launch pad, night --w 192 --h 96 --s 12 --l 5 --d 2
PROMPTS

.venv/bin/sdxl-train --config configs/quickstart.toml "$@"

log=$(ls -dt quickstart/logs/*/ | head -n 1)
cat <<DONE

Trained. Look at
  checkpoint   quickstart/quickstart.safetensors   (.venv/bin/sdxl-model info quickstart/quickstart.safetensors)
  previews     quickstart/sample/                  (a random model of this size draws colours, not cats)
  log          $log
  TensorBoard  .venv/bin/tensorboard --logdir quickstart/logs
DONE
