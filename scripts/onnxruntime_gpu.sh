#!/usr/bin/env bash
# Unpacks onnxruntime-gpu (250 MB) into .cache, beside the environment's onnxruntime, and prints the folder. A test runs
# its CUDA provider on stubs of CUDA: tests/runtime/backends/test_onnxruntime_cuda_provider.py.
set -euo pipefail
. "$(dirname "$0")/setup.sh"

version=$(sed -n 's/^onnxruntime-gpu==//p' constraints.txt)
folder=$PWD/.cache/onnxruntime-gpu/$version
if [ ! -d "$folder/onnxruntime" ]; then
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --dest "$scratch" \
    "onnxruntime-gpu==$version" >&2
  mkdir -p "$folder"
  python -m zipfile -e "$scratch"/*.whl "$scratch/unpacked"
  mv "$scratch/unpacked/onnxruntime" "$folder/onnxruntime"
fi
echo "$folder"
