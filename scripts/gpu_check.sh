#!/usr/bin/env bash
# Everything that this project can do on an NVIDIA GPU, tried and measured: writes gpu_check.json and gpu_check.md.
# Usage: scripts/gpu_check.sh [FOLDER FOR THE REPORTS]     exit code 3 if nothing could be run here
set -euo pipefail
. "$(dirname "$0")/setup.sh"

if command -v nvidia-smi > /dev/null; then
  # Where there is a GPU, also what can't be installed everywhere; a backend that is missing is reported as refused.
  pip install --quiet --constraint constraints.txt --editable '.[tensorrt]' || echo "note: no tensorrt" >&2
  # The package for GPUs has versions of its own, and takes the place of the one for CPUs: both are the same module.
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
