#!/usr/bin/env bash
# Prints the folder of a Triton Inference Server with its Python backend, which needs no GPU. The Python package
# nvidia-pytriton contains it. That backend was compiled for NumPy 1, which is put beside it.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=.cache/triton
if [ ! -d "$folder" ]; then
  echo "Downloading Triton Inference Server (73 MB) …" >&2
  mkdir -p .cache
  scratch=$(mktemp -d -p .cache)
  trap 'rm -rf "$scratch"' EXIT
  "${PYTHON:-python3}" -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --target "$scratch" \
    nvidia-pytriton==0.7.0 numpy==1.26.4 >&2
  chmod +x "$scratch"/pytriton/tritonserver/bin/* "$scratch"/pytriton/tritonserver/python_backend_stubs/*/*
  chmod 755 "$scratch"
  mv "$scratch" "$folder"
fi
echo "$PWD/$folder"
