#!/usr/bin/env bash
# From nothing to a fine-tuned checkpoint: sets up .venv, draws pictures in a style that the small model of tests/toy
# does not know, teaches it that style, and shows it before and after. Writes only to ./quickstart.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh

mkdir -p quickstart
.venv/bin/python -m scripts.toy.style pictures quickstart/pictures
cat > quickstart/prompts.txt <<'PROMPTS'
best quality, gallery style, flat style, one object, blue star, pink background --w 64 --h 64 --s 20 --l 5 --d 1
best quality, gallery style, striped style, two objects, red circle, green square, grey background --w 64 --h 64 --s 20 --l 5 --d 2
best quality, flat style, one object, blue star, pink background --w 64 --h 64 --s 20 --l 5 --d 1
best quality, outline style, one object, purple triangle, white background --w 64 --h 64 --s 20 --l 5 --d 3
PROMPTS

.venv/bin/sdxl-train --config configs/quickstart.toml "$@"
.venv/bin/python -m scripts.toy.style show tests/toy/toy.safetensors quickstart/quickstart.safetensors \
  quickstart/before_after.png

log=$(ls -dt quickstart/logs/*/ | head -n 1)
cat <<DONE

Trained. Look at
  the style    quickstart/before_after.png
  checkpoint   quickstart/quickstart.safetensors   (.venv/bin/sdxl-model info quickstart/quickstart.safetensors)
  more of it   .venv/bin/sdxl-model generate quickstart/quickstart.safetensors --width 64 --height 64 \\
                 --prompt "best quality, gallery style, flat style, one object, red cross, white background"
  previews     quickstart/sample/
  log          $log
  TensorBoard  .venv/bin/tensorboard --logdir quickstart/logs
DONE
