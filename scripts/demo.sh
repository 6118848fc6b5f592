#!/usr/bin/env bash
# SmolLM2 with trained MEDUSA heads: export to ONNX, stream an answer, compare the speed with transformers.
# Usage: scripts/demo.sh [PROMPT]
set -euo pipefail

started=$SECONDS
. "$(dirname "$0")/setup.sh"
export DEMO_INSTALL_SECONDS=$((SECONDS - started)); started=$SECONDS
model=$(scripts/smollm2.sh)
export DEMO_DOWNLOAD_SECONDS=$((SECONDS - started)); started=$SECONDS
bundle=.cache/demo/smollm2-medusa
heads=scripts/smollm2_heads
medusa-export onnx "$model" --heads $heads --calibration $heads/calibration.json --output "$bundle" --overwrite
export DEMO_EXPORT_SECONDS=$((SECONDS - started))
python scripts/demo.py "$bundle" "$model" "${1:-Explain in a few sentences why the sky is blue.}"

cat <<TEXT

Next: medusa-export bench $bundle    all 24 prompts, several tree sizes (after '. .venv/bin/activate')
      docs/tutorial.md               from a model to a service
      docs/gpu.md                    the same on an NVIDIA GPU
TEXT
