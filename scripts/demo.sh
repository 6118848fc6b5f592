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
