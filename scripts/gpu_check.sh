#!/usr/bin/env bash
# Tries and measures on an NVIDIA GPU what this project runs there, in stages. Reports are in .cache/gpu_check.
#   scripts/gpu_check.sh                          in its own environment, with packages from the network
#   scripts/gpu_check.sh --offline wheelhouse     with this machine's own Python and the parts that have arrived so far
# Other options are those of scripts/gpu_check.py, such as --stages torch. Exit code 3: no stage could run here.
set -euo pipefail
cd "$(dirname "$0")/.."

offline=
options=()
while [ $# -gt 0 ]; do
  case $1 in
    --offline) offline=$2; shift 2 ;;
    *) options+=("$1"); shift ;;
  esac
done
heads=scripts/smollm2_heads

if [ -n "$offline" ]; then
  python=${PYTHON:-python3}
  # Parts that haven't arrived yet are no error: stages whose packages are missing report that.
  "$python" scripts/wheelhouse_join.py "$offline" || [ $? = 4 ]
  site=$offline/site
  mkdir -p "$site" "$offline/files"  # a machine that lacks nothing has no parts
  for wheel in "$offline"/files/*.whl; do
    done_already=$site/.has-$(basename "$wheel")
    if [ -f "$wheel" ] && [ ! -e "$done_already" ]; then
      "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --upgrade \
        --target "$site" "$wheel"
      touch "$done_already"
    fi
  done
  # The project runs from its source. Libraries ask for its version all the same.
  "$python" - "$site" <<'PYTHON'
import sys, tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
folder = Path(sys.argv[1]) / f"medusa_export-{project['version']}.dist-info"
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
PYTHON
  # These packages come before those of the machine: onnxruntime-gpu replaces an onnxruntime for CPUs.
  PYTHONPATH=$(cd "$site" && pwd):$PWD:$PWD/runtime${PYTHONPATH:+:$PYTHONPATH}
  export PYTHONPATH
  model=$(find "$offline/files" -name '*.gguf' | head -n 1)
else
  . scripts/setup.sh
  python=python
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
fi
given=()
[ -z "$model" ] || given=(--model "$model" --heads "$heads")
"$python" scripts/gpu_check.py "${given[@]}" "${options[@]}"
