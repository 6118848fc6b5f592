#!/usr/bin/env bash
# SmolLM2 with trained MEDUSA heads: export to ONNX, answer a prompt, compare with transformers.
# Usage: scripts/demo.sh [PROMPT]
set -euo pipefail
. "$(dirname "$0")/setup.sh"

model=$(scripts/smollm2.sh)
bundle=.cache/demo/smollm2-medusa
heads=scripts/smollm2_heads
medusa-export onnx "$model" --heads $heads --calibration $heads/calibration.json --output "$bundle" --overwrite
python scripts/demo.py "$bundle" "$model" "${1:-Explain in a few sentences why the sky is blue.}"

cat <<TEXT
For an NVIDIA GPU, the same in two commands (docs/gpu.md; leave --target out on the machine that has the GPU):
  . .venv/bin/activate
  medusa-export onnx "$model" --heads $heads --calibration $heads/calibration.json --dtype fp16 -o fp16
  medusa-export trt fp16 --target sm86,sm89 -o engine
TEXT
