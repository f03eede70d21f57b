#!/usr/bin/env bash
# Fine-tunes a small SDXL model as an example, from set-up to checkpoint, in a few minutes on a CPU.
#
# The script sets up .venv, draws pictures in a style that the small model of tests/toy does not know, trains the model
# on these pictures, and draws the same prompts before and after. All pictures, logs and checkpoints go to ./quickstart.
# Arguments go to sdxl-train, for example: bash scripts/quickstart.sh --max_train_epochs 2
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

The training is done. Look at these files:
  before and after   quickstart/before_after.png
  checkpoint         quickstart/quickstart.safetensors
  previews           quickstart/sample/
  log                $log

Try these commands:
  describe the checkpoint   .venv/bin/sdxl-model info quickstart/quickstart.safetensors
  draw another picture      .venv/bin/sdxl-model generate quickstart/quickstart.safetensors --width 64 --height 64 \\
                              --prompt "best quality, gallery style, flat style, one object, red cross, white background"
  show the curves           .venv/bin/tensorboard --logdir quickstart/logs
DONE
