#!/usr/bin/env bash
# Tries and measures all backends on an NVIDIA GPU, and writes gpu_check.json and gpu_check.md.
# Usage: scripts/gpu_check.sh [FOLDER FOR THE REPORTS]     exit code 3 if no backend can run here
set -euo pipefail
. "$(dirname "$0")/setup.sh"

if command -v nvidia-smi > /dev/null; then
  # These packages can't be installed everywhere. A backend whose package is missing is reported as refused.
  pip install --quiet --constraint constraints.txt --editable '.[tensorrt]' || echo "note: no tensorrt" >&2
  # The packages for GPUs and CPUs provide the same module, so one replaces the other. Their versions differ.
  pip uninstall --quiet --yes onnxruntime
  if ! pip install --quiet --constraint constraints.txt "onnxruntime-gpu[cuda,cudnn]"; then
    echo "note: no onnxruntime-gpu; ONNX Runtime runs on the CPU only, and onnxruntime-cuda is reported as refused" >&2
    pip install --quiet --constraint constraints.txt onnxruntime
  fi
fi

model=$(scripts/smollm2.sh)
heads=scripts/smollm2_heads
bundle=.cache/gpu_check/bundle
medusa-export onnx "$model" --heads $heads --calibration $heads/calibration.json --dtype fp16 -o "$bundle" --overwrite
python scripts/gpu_check.py "$bundle" "$model" $heads "${1:-.cache/gpu_check}"
