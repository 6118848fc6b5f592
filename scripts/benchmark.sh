#!/usr/bin/env bash
# Compares plain decoding of SmolLM2 in fp32 on this CPU, in one interleaved run: bundles with and without heads,
# onnxruntime-genai, transformers. Arguments go to scripts/benchmark.py.
set -euo pipefail
MEDUSA_EXTRAS=bench
. "$(dirname "$0")/setup.sh"

model=$(scripts/smollm2.sh)
work=.cache/bench
medusa-export onnx "$model" --init-heads 4 --output $work/heads --overwrite --quiet
medusa-export onnx "$model" --no-heads --output $work/no-heads --overwrite --quiet
if [ ! -f $work/genai/genai_config.json ]; then
  python - "$model" $work/hf <<'PYTHON'
import sys

import torch

from medusa_export.models.checkpoints import load_model, load_tokenizer

source, target = sys.argv[1:]
load_model(source, dtype=torch.float32).save_pretrained(target)
load_tokenizer(source).save_pretrained(target)
PYTHON
  python -m onnxruntime_genai.models.builder -m $work/hf -o $work/genai -p fp32 -e cpu -c $work/cache \
    > $work/genai.log 2>&1 || { cat $work/genai.log >&2; exit 1; }
fi
python scripts/benchmark.py --heads $work/heads --no-heads $work/no-heads --genai $work/genai --model "$model" "$@"
